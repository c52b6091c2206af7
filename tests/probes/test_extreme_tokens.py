"""Extreme tokens: hand-made attention, brute force over queries and keys, every way that models attend."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynascope
from dynascope.nn.toy_transformer import ToyTransformer
from dynascope.probes.extreme_tokens import (
    ExtremeTokens,
    document_starts,
    extreme_token_summary,
    find_sink,
    norm_contributions,
    output_weights,
    peak_ratios,
    quantization_risk,
    value_drain,
)
from dynascope.probes.probe import Need
from dynascope.probes.views import AttentionCall, ModuleOutput, attention_blocks
from dynascope.watching.shadow import tap


def random_call(
    kv_heads: int = 2, length: int = 12, mask: Tensor | None = None, kind: str = "softmax"
) -> AttentionCall:
    key, value = torch.randn(2, 3, kv_heads, length, 8).unbind(1)[:2]
    query = torch.randn(2, 4, length, 8)
    return AttentionCall("", query, key, value, 0.7, is_causal=mask is None, mask=mask, kind=kind)


def to_position(place: int, length: int = 12, **settings: Any) -> AttentionCall:
    """Every query gives all of its attention to one key (or the first it sees, before that)."""
    key = torch.zeros(1, 1, length, 4)
    key[:, :, place] = 100.0
    return AttentionCall(
        "", torch.ones(1, 1, length, 4), key, torch.ones(1, 1, length, 4), 1.0, is_causal=True, **settings
    )


def test_a_full_sink_by_hand() -> None:
    summary = extreme_token_summary(to_position(0))
    assert summary["sink_score"].item() == 1
    assert summary["sink_share"].item() == 1
    assert summary["row_entropy"].item() == pytest.approx(0, abs=1e-6)
    assert summary["column_entropy"].item() == pytest.approx(1)
    assert summary["sink_logit"].item() == pytest.approx(400)
    assert summary["sink_logit_spread"].item() == 0


def test_uniform_causal_attention_by_hand() -> None:
    zeros = torch.zeros(1, 1, 12, 4)
    summary = extreme_token_summary(AttentionCall("", zeros, zeros, zeros + 1, 1.0, is_causal=True))
    # Rows are uniform but for the first, which has one key: 11 of 12. Queries 5 … 11 give 1 / (i + 1) to the sink.
    assert summary["row_entropy"].item() == pytest.approx(11 / 12)
    assert summary["column_entropy"].item() < 1
    assert summary["sink_score"].item() == pytest.approx(sum(1 / (i + 1) for i in range(5, 12)) / 7)
    assert summary["sink_share"].item() == 0
    assert summary["sink_logit"].item() == summary["sink_logit_lme"].item() == 0
    assert summary["value_drain"].item() == 1


def by_loop(call: AttentionCall, sink: list[int], first: list[int], visible: Tensor) -> dict[str, Tensor]:
    """The definitions, one query and key at a time."""
    rows, heads, length, _ = call.query.shape
    groups = heads // call.key.shape[1]
    out = {
        name: [[] for _ in range(heads)] for name in ("sink_score", "sink_share", "sink_logit", "sink_logit_lme", "row")
    }
    columns: list[list[float]] = [[] for _ in range(heads)]
    for row in range(rows):
        for head in range(heads):
            weights = torch.zeros(length, length)
            for i in range(length):
                seen = [j for j in range(length) if visible[row, i, j]]
                if not seen:
                    continue
                logits = (
                    torch.stack([call.query[row, head, i] @ call.key[row, head // groups, j] for j in seen])
                    * call.scale
                )
                if call.kind == "softmax":
                    weights[i, seen] = logits.softmax(0)
                elif call.kind == "relu":
                    weights[i, seen] = logits.clamp(min=0) / len(seen)
                else:
                    weights[i, seen] = logits.sigmoid()
                share = weights[i, seen] / weights[i].sum() if weights[i].sum() > 0 else torch.zeros(len(seen))
                entropy = float(torch.special.entr(share).sum())
                out["row"][head].append(entropy / math.log(len(seen)) if len(seen) > 1 else 0.0)
                if i - first[row] < 5:
                    continue
                out["sink_score"][head].append(float(weights[i, sink[row]]))
                out["sink_share"][head].append(float(weights[i, sink[row]] > 0.3))
                others = torch.tensor([float(logits[seen.index(j)]) for j in seen if j not in (sink[row], i)])
                at_sink = float(logits[seen.index(sink[row])])
                out["sink_logit"][head].append(at_sink - float(others.mean()))
                out["sink_logit_lme"][head].append(at_sink - float(others.exp().mean().log()))
            largest = 0.0
            for j in range(length):
                number, mass = int(visible[row, :, j].sum()), weights[:, j].sum()
                if number > 1 and mass > 0:
                    largest = max(largest, float(torch.special.entr(weights[:, j] / mass).sum()) / math.log(number))
            columns[head].append(largest)
    found = {("row_entropy" if name == "row" else name): torch.tensor(one).mean(1) for name, one in out.items()}
    found["sink_logit_spread"] = torch.tensor(out["sink_logit"]).std(1, correction=0)
    found["column_entropy"] = torch.tensor(columns).mean(1)
    return found


@pytest.mark.parametrize("kind", ["softmax", "relu", "sigmoid"])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("is_padded", [False, True])
def test_summary_equals_the_definitions(kind: str, kv_heads: int, is_padded: bool) -> None:
    visible = torch.ones(2, 12, 12, dtype=torch.bool).tril()
    first = [3 if is_padded else 0, 0]
    visible[0, :, : first[0]] = False
    call = random_call(kv_heads, mask=visible[:, None] if is_padded else None, kind=kind)
    sink = [first[0] + 1, 1]
    expected = by_loop(call, sink, first, visible)
    summary = extreme_token_summary(call, torch.tensor(sink)[:, None], block=5)
    for name, value in expected.items():
        torch.testing.assert_close(
            summary[name], value, rtol=1e-4, atol=1e-4, msg=lambda told, name=name: f"{name}: {told}"
        )


def test_queries_can_be_narrowed() -> None:
    call = random_call()
    chosen = torch.zeros(2, 12, dtype=torch.bool)
    chosen[:, 7] = True
    weights = torch.einsum("bhd,bhkd->bhk", call.query[:, :, 7], call.key[:, :, :8].repeat_interleave(2, 1)) * 0.7
    expected = weights.softmax(-1)[..., 0].mean(0)
    torch.testing.assert_close(
        extreme_token_summary(call, queries=chosen)["sink_score"], expected, rtol=1e-4, atol=1e-5
    )


def test_few_queries_at_even_distances_stand_for_all() -> None:
    call = random_call()
    assert [part.first_query for part in attention_blocks(call, most=4)] == [2, 5, 8, 11]
    chosen = torch.zeros(2, 12, dtype=torch.bool)
    chosen[:, [2, 5, 8, 11]] = True
    few, narrowed = extreme_token_summary(call, most=4), extreme_token_summary(call, queries=chosen)
    for name in ("sink_score", "sink_share", "sink_logit", "sink_logit_lme", "sink_logit_spread", "value_drain"):
        torch.testing.assert_close(few[name], narrowed[name], rtol=1e-5, atol=1e-6)
    every, whole = extreme_token_summary(call, most=12), extreme_token_summary(call)
    assert all(torch.equal(every[name], whole[name]) for name in whole)
    assert find_sink(to_position(3), most=4)[0].tolist() == [[3] * 12]


def test_few_queries_are_what_the_probe_looks_at_if_asked() -> None:
    call = to_position(0, length=64)
    found = ExtremeTokens(sink=0, most=16).measure(call)
    assert float(found["extreme/sink_score"]) == 1
    assert float(found["extreme/column_entropy"]) == pytest.approx(1)
    with pytest.raises(ValueError, match="most=0"):
        ExtremeTokens(most=0)


@pytest.mark.parametrize("place", [0, 3, 7])
def test_the_sink_is_found_among_the_first_eight(place: int) -> None:
    sink, first = find_sink(to_position(place))
    assert (sink[0, -1].item(), first.item()) == (place, 0)


def test_a_delimiter_further_on_is_found_where_it_is_one() -> None:
    tokens = torch.zeros(1, 24, dtype=torch.long)
    tokens[0, 10] = 7
    assert find_sink(to_position(10, 24, tokens=tokens), delimiters=[7])[0][0, -1].item() == 10
    assert find_sink(to_position(2, 24, tokens=tokens), delimiters=[7])[0][0, -1].item() == 2


def test_packed_documents_have_a_sink_each() -> None:
    lone = random_call(length=12)
    packed_mask = torch.block_diag(torch.ones(12, 12), torch.ones(12, 12)).bool().tril().expand(1, 1, 24, 24)
    packed = AttentionCall(
        "", *(torch.cat([one[:1], one[1:]], 2) for one in (lone.query, lone.key, lone.value)), 0.7, mask=packed_mask
    )
    assert document_starts(packed).tolist() == [[0] * 12 + [12] * 12]
    assert torch.equal(find_sink(packed)[0][0, [0, -1]] - find_sink(lone)[0][:, 0], torch.tensor([0, 12]))
    apart, together = extreme_token_summary(lone), extreme_token_summary(packed)
    for name in ("sink_score", "sink_share", "sink_logit", "sink_logit_lme", "sink_logit_spread", "row_entropy"):
        torch.testing.assert_close(together[name], apart[name], rtol=1e-4, atol=1e-5)


def test_a_sliding_window_has_one_start() -> None:
    window = torch.ones(12, 12).tril().triu(-3).bool().expand(1, 1, 12, 12)
    assert document_starts(random_call(mask=window)).tolist()[0] == [0] * 12


def test_value_drain_by_hand_and_after_projection() -> None:
    value = torch.tensor([[[[0.3, 0.4], [1.0, 0.0], [0.0, 3.0]]]])
    torch.testing.assert_close(value_drain(value, torch.tensor([0])), torch.tensor([0.25]))
    # A projection that keeps the first coordinate only, doubled: norms 0.6, 2 and 0.
    weight = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(value_drain(value, torch.tensor([0]), output_weight=weight), torch.tensor([0.6]))
    # Two query heads on one of values.
    both = value_drain(value, torch.tensor([0]), output_weight=torch.cat([weight, torch.eye(2)[None]]))
    torch.testing.assert_close(both, torch.tensor([0.6, 0.25]))


def test_peak_ratios_by_hand() -> None:
    states = torch.tensor([9.0, 4.0, 1.0, 3.0, 1.0]).view(1, 5, 1)
    mean, median = peak_ratios(states, torch.tensor([1]), torch.tensor([1]))  # the 9 is padding
    assert mean.item() == pytest.approx(4 / (5 / 3))
    assert median.item() == pytest.approx(4.0)


def test_quantization_risk_by_hand() -> None:
    assert quantization_risk(torch.tensor([[[1.0, -2.0, 3.0, -40.0, 1.0]]])).item() == 20


def test_contributions_to_a_norm_add_up_to_its_change() -> None:
    weight, other = torch.randn(3, 3, dtype=torch.float64, requires_grad=True), torch.zeros(2, requires_grad=True)
    x = torch.randn(3, dtype=torch.float64)
    update = 1e-6 * torch.randn(3, 3, dtype=torch.float64)
    found = norm_contributions(
        (weight @ x).norm(), {"w": weight, "other": other}, {"w": update, "other": torch.ones(2)}
    )
    assert found["w"].item() == pytest.approx(
        ((weight + update) @ x).norm().item() - (weight @ x).norm().item(), rel=1e-4
    )
    assert found["other"].item() == 0


# Through real models


def measured(
    model: nn.Module, tokens: Tensor, probe: ExtremeTokens | None = None, **inputs: Tensor
) -> dict[str, Tensor]:
    """Each series of the probe stacked over places."""
    probe = probe or ExtremeTokens(model)
    found: dict[str, list[Tensor]] = {}

    def observe(need: Need, view: AttentionCall | ModuleOutput) -> None:
        for name, value in probe.measure(view).items():
            found.setdefault(name, []).append(value)

    tap(model.eval(), (tokens,), inputs, probe.needs, observe)
    return {name: torch.stack(values) for name, values in found.items()}


def llama(implementation: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(1)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    return model


TOKENS = torch.randint(19, (3, 14), generator=torch.Generator().manual_seed(3))


def test_fused_attention_is_read_as_eager_attention_is() -> None:
    fused, eager = (measured(llama(implementation), TOKENS) for implementation in ("sdpa", "eager"))
    assert set(fused) == {series.name for series in ExtremeTokens.series}
    for name, value in fused.items():
        torch.testing.assert_close(value, eager[name], rtol=1e-5, atol=1e-5)
    weights = torch.stack(llama("eager")(TOKENS, output_attentions=True).attentions)
    torch.testing.assert_close(
        measured(llama("eager"), TOKENS, ExtremeTokens(sink=0))["extreme/sink_score"],
        weights[:, :, :, 5:, 0].mean((1, 3)),
        rtol=1e-5,
        atol=1e-5,
    )


def test_side_of_padding_and_order_of_rows_make_no_difference() -> None:
    model = llama("sdpa")
    plain = measured(model, TOKENS)
    shuffled = measured(model, TOKENS[[2, 0, 1]])
    padding = torch.zeros(3, 4, dtype=torch.long)
    real = torch.ones_like(TOKENS)
    left = measured(
        model,
        torch.cat([padding, TOKENS], 1),
        attention_mask=torch.cat([padding, real], 1),
        position_ids=torch.cat([padding, real.cumsum(1) - 1], 1),
    )
    for name, value in plain.items():
        torch.testing.assert_close(shuffled[name], value, rtol=1e-4, atol=1e-5)
        if name != "extreme/quantization_risk":  # of the whole stream, padding too
            torch.testing.assert_close(
                left[name], value, rtol=1e-4, atol=1e-4, msg=lambda told, name=name: f"{name}: {told}"
            )


@pytest.mark.parametrize("attention", ["softmax", "relu", "softmax1", "sigmoid"])
def test_every_attention_of_the_toy_is_read(attention: str) -> None:
    model = ToyTransformer(19, 14, width=8, depth=2, num_heads=2, attention=attention)
    found = measured(model, TOKENS, ExtremeTokens(model, sink=0))
    assert found["extreme/sink_score"].shape == (2, 2)
    from dynascope.nn.head_intervention import HeadIntervention

    scores: list[Tensor] = []
    with HeadIntervention(
        model, None, lambda state: (scores.append(state.weights[:, :, 5:, 0].mean((0, 2))), state)[1]
    ):
        model(TOKENS)
    torch.testing.assert_close(found["extreme/sink_score"], torch.stack(scores), rtol=1e-4, atol=1e-5)


def test_output_projections_are_found_under_their_usual_names() -> None:
    linear = nn.ModuleDict({"o_proj": nn.Linear(6, 4, bias=False)})
    weights = output_weights(linear, 3)
    assert weights is not None
    torch.testing.assert_close(weights[1], linear["o_proj"].weight[:, 2:4])
    assert output_weights(None, 3) is None
    transformers = pytest.importorskip("transformers")
    conv = nn.ModuleDict({"c_proj": transformers.pytorch_utils.Conv1D(4, 6)})
    weights = output_weights(conv, 3)
    assert weights is not None
    torch.testing.assert_close(weights[1], conv["c_proj"].weight.T[:, 2:4])


def test_it_runs_under_a_watch(tmp_path: Path) -> None:
    model = ToyTransformer(19, 14, width=8, depth=2, num_heads=2, attention="relu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with dynascope.watch(model, optimizer, run=tmp_path / "run", every=1, probes=[ExtremeTokens(model)]):
        for _ in range(3):
            optimizer.zero_grad()
            model(TOKENS).square().mean().backward()
            optimizer.step()
    record = dynascope.open(tmp_path / "run")
    assert record["extreme/output_drain"].sizes == {"step": 3, "layer": 2, "head": 2}
    assert record["extreme/peak_median"].dims == ("step", "block")
    assert not [event for event in record.events if event.kind == "probe-off"]


def test_layers_can_be_chosen_and_an_impossible_sink_is_told() -> None:
    model = ToyTransformer(19, 14, width=8, depth=2)
    found = measured(model, TOKENS, ExtremeTokens(layers=["blocks.1.attention"]))
    assert found["extreme/sink_score"].shape == (1, 1)
    assert "extreme/output_drain" not in found
    with pytest.raises(ValueError, match="a position below 8"):
        ExtremeTokens(sink=9)
