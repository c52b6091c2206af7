"""Scores of circuits by hand, from factors as from products, and under a watch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynascope
from dynascope.nn.circuits import Circuits, attention_weights
from dynascope.nn.icl_attention import MultiHeadSoftmaxICL
from dynascope.probes.circuits import (
    HeadCircuits,
    PatternScores,
    factored_pattern_scores,
    pattern_scores,
    task_head_allocation,
)
from dynascope.probes.views import ModelView


def heads_of(*pairs: tuple[float, float], width: int = 4) -> tuple[Tensor, Tensor]:
    """Heads with the exact pattern: KQ = ω I on the inputs, OV = μ on the last coordinate."""
    kq, ov = torch.zeros(len(pairs), width, width), torch.zeros(len(pairs), 1, width)
    for head, (omega, mu) in enumerate(pairs):
        kq[head, : width - 1, : width - 1] = omega * torch.eye(width - 1)
        ov[head, 0, -1] = mu
    return kq, ov


def test_the_exact_pattern() -> None:
    scores = pattern_scores(*heads_of((0.2, 3.0), (-0.2, -2.0), (0.7, 0.01)))
    torch.testing.assert_close(scores.omega, torch.tensor([0.2, -0.2, 0.7]))
    torch.testing.assert_close(scores.mu[:, 0], torch.tensor([3.0, -2.0, 0.01]))
    assert float(scores.off_diagonal.max()) < 1e-6
    torch.testing.assert_close(scores.last_entry_share, torch.ones(3))
    assert scores.signs.tolist() == [1, -1, 0]
    assert scores.is_dummy.tolist() == [False, False, True]
    # The dummy's size is not counted; the sum over heads is 1.01 of 5.01.
    assert float(scores.homogeneity) == pytest.approx(0, abs=1e-6)
    assert float(scores.zero_sum[0]) == pytest.approx(1.01 / 5.01)


def test_off_diagonal_share_by_hand() -> None:
    """3 on the diagonal, 4 beside it: 4/5. What stands in the query's label column never acts, in the key's row it does."""
    kq, ov = torch.zeros(1, 3, 3), torch.ones(1, 1, 3)
    kq[0, 0, 0], kq[0, 2, 1], kq[0, 1, 2] = 3.0, 4.0, 100.0
    scores = pattern_scores(kq, ov)
    assert float(scores.off_diagonal[0]) == pytest.approx(0.8)
    assert float(scores.omega[0]) == pytest.approx(1.5)
    assert float(scores.last_entry_share[0]) == pytest.approx(1 / 3**0.5)


def test_unequal_heads() -> None:
    scores = pattern_scores(*heads_of((1.0, 1.0), (-3.0, -1.0)))
    assert float(scores.homogeneity) == pytest.approx(0.5)
    assert float(scores.zero_sum[0]) == 0


def test_several_labels() -> None:
    """Width 5, two outputs: three inputs; each output's own label counts."""
    ov = torch.zeros(2, 2, 5)
    ov[0, 0, 3], ov[1, 1, 4], ov[1, 0, 4] = 2.0, -1.0, 5.0
    scores = pattern_scores(torch.eye(5).expand(2, 5, 5), ov)
    assert scores.mu.tolist() == [[2, 0], [0, -1]]
    assert scores.zero_sum.tolist() == [1, 1]
    assert float(scores.last_entry_share.min()) == 1


def same(one: PatternScores, other: PatternScores) -> None:
    for name in ("omega", "mu", "off_diagonal", "last_entry_share", "homogeneity", "zero_sum"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), equal_nan=True, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_factors_tell_the_same_as_products_for_stacked_networks(num_outputs: int) -> None:
    model = MultiHeadSoftmaxICL(4, 3, num_outputs, num_networks=2)
    circuits = model.circuits()
    products = pattern_scores(circuits.kq, circuits.ov)
    assert products.omega.shape == (2, 3)
    same(products, factored_pattern_scores(model.attention_weights()))
    same(
        PatternScores(*(getattr(products, name)[1] for name in products.__dataclass_fields__)),
        pattern_scores(circuits.kq[1], circuits.ov[1]),
    )


def test_a_layer_inside_a_transformer_has_no_labels() -> None:
    weights = attention_weights(nn.MultiheadAttention(12, 3))
    scores = factored_pattern_scores(weights)
    circuits = weights.circuits()
    torch.testing.assert_close(scores.mu[:, 0], circuits.ov.diagonal(dim1=1, dim2=2).mean(1))
    diagonal = circuits.kq.diagonal(dim1=1, dim2=2)
    expected = (circuits.kq.square().sum((1, 2)) - diagonal.square().sum(1)).sqrt() / circuits.kq.norm(dim=(1, 2))
    torch.testing.assert_close(scores.off_diagonal, expected)
    assert scores.last_entry_share.isnan().all()
    half = factored_pattern_scores(weights, num_inputs=8)
    torch.testing.assert_close(half.omega, diagonal[:, :8].mean(1))
    assert not half.last_entry_share.isnan().any()


def test_scores_are_the_same_in_every_basis() -> None:
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    kq = torch.stack([2 * torch.eye(6), -torch.eye(6)]).double()
    same(pattern_scores(kq, 3 * kq), pattern_scores(turn @ kq @ turn.T, turn @ (3 * kq) @ turn.T))


def allocation_of(*heads: tuple[tuple[float, ...], tuple[float, float]]) -> Any:
    """Heads from the diagonal of KQ on four inputs, and μ of two tasks."""
    kq, ov = torch.zeros(len(heads), 6, 6), torch.zeros(len(heads), 2, 6)
    for index, (diagonal, mu) in enumerate(heads):
        kq[index, :4, :4] = torch.diag(torch.tensor(diagonal))
        ov[index, 0, 4], ov[index, 1, 5] = mu
    return task_head_allocation(Circuits(kq, ov), [(0, 1), (2, 3)])


def test_regimes_by_hand() -> None:
    first, second = (0.2, 0.2, 0.0, 0.0), (0.0, 0.0, 0.2, 0.2)
    own = allocation_of((first, (3.0, 0)), (first, (-3.0, 0)), (second, (0, 3.0)), (second, (0, -3.0)))
    assert own.regime == "dedicated"
    torch.testing.assert_close(own.share, torch.tensor([[0.5, 0], [0.5, 0], [0, 0.5], [0, 0.5]]))
    both = (-0.2, -0.2, -0.2, -0.2)
    three = allocation_of((first, (3.0, 0)), (second, (0, 3.0)), (both, (-3.0, -3.0)))
    assert three.regime == "superposition"
    assert three.serves.tolist() == [[True, False], [False, True], [True, True]]
    assert allocation_of((both, (3.0, 3.0)), (both, (-3.0, -3.0)), (first, (0.01, 0))).regime == "shared"


def watched(model: nn.Module, call: Any, folder: Path) -> dynascope.Record:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with dynascope.watch(model, optimizer, run=folder, every=1, probes=["circuits"]):
        for _ in range(3):
            optimizer.zero_grad()
            call(model).square().mean().backward()
            optimizer.step()
    record = dynascope.open(folder)
    assert [event for event in record.events if event.kind == "probe-off"] == []
    return record


def test_watching_a_torch_encoder(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(12, 3, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    before = factored_pattern_scores(attention_weights(model.layers[0].self_attn))
    record = watched(model, lambda model: model(torch.randn(2, 5, 12)), tmp_path)
    omega = record["circuits/omega"]
    assert list(omega["layer"].values) == ["layers.0.self_attn (bias)", "layers.1.self_attn (bias)"]
    assert omega.shape == (3, 2, 3)
    torch.testing.assert_close(torch.tensor(omega.values[0, 0]), before.omega.detach(), check_dtype=False)
    assert record["circuits/zero_sum"].dims == ("step", "layer")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_watching_a_hugging_face_model(kind: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "gpt2": {"n_embd": 16, "n_head": 4, "n_layer": 2},
        "llama": {
            "hidden_size": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 2,
            "intermediate_size": 8,
        },
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=11, **sizes[kind]))
    record = watched(model, lambda model: model(torch.randint(11, (2, 6))).logits, tmp_path)
    told = {"gpt2": "transformer.h.1.attn (bias)", "llama": "model.layers.1.self_attn (rotary)"}
    assert str(record["circuits/omega"]["layer"].values[1]) == told[kind]
    assert record["circuits/off_diagonal"].shape == (3, 2, 4)
    assert bool(((record["circuits/off_diagonal"] > 0) & (record["circuits/off_diagonal"] <= 1)).all())


def test_watching_our_own_model_and_one_without_attention(tmp_path: Path) -> None:
    model = MultiHeadSoftmaxICL(3, 2, num_networks=2)
    record = watched(model, lambda model: model(torch.randn(4, 6, 4), torch.randn(4, 4)), tmp_path / "own")
    assert list(record["circuits/mu"]["layer"].values) == ["MultiHeadSoftmaxICL 0", "MultiHeadSoftmaxICL 1"]
    assert float(record["circuits/last_entry_share"].max()) <= 1
    linear = watched(nn.Linear(3, 2), lambda model: model(torch.randn(4, 3)), tmp_path / "linear")
    assert "circuits/omega" not in linear


def test_layers_of_unequal_heads_are_padded_and_other_widths_left_out() -> None:
    model = nn.ModuleList(
        [nn.MultiheadAttention(12, 2), nn.MultiheadAttention(12, 3), nn.MultiheadAttention(12, 3, kdim=5)]
    )
    view = ModelView(0, model, (), {}, 0.1)
    measured = HeadCircuits().measure(view)
    assert measured["circuits/omega"].shape == (2, 3)
    assert measured["circuits/omega"].isnan().tolist() == [[False, False, True], [False, False, False]]
    assert HeadCircuits().coords(view)["layer"] == ["0 (bias)", "1 (bias)"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ((torch.zeros(1, 4, 3), torch.zeros(1, 1, 4)), "no common diagonal"),
        ((torch.zeros(1, 4, 4), torch.zeros(1, 1, 4), 5), "num_inputs=5"),
    ],
)
def test_impossible_requests_are_told(settings: tuple[Any, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        pattern_scores(*settings)


def test_impossible_tasks_are_told() -> None:
    circuits = MultiHeadSoftmaxICL(4, 2, 2).circuits()
    with pytest.raises(ValueError, match="as many outputs"):
        task_head_allocation(circuits, [(0, 1)])
    with pytest.raises(ValueError, match="from 0 to 3"):
        task_head_allocation(circuits, [(0, 1), (2, 4)])
