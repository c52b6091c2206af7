"""Scan and snap read from attention calls: by hand, against dense computation, and in live runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dynascope
from dynascope.data import SequenceClassData, token_stats
from dynascope.data.token_stats import TokenStats
from dynascope.probes.scan_snap import ScanSnap, attention_on_tokens, sampled_queries, scan_snap
from dynascope.probes.views import AttentionCall


def call_of(
    weights: Tensor, tokens: Tensor | None, mask: Tensor | None = None, is_causal: bool = False
) -> AttentionCall:
    """Attention with these weights (rows, heads, queries, keys): their logarithms against unit keys."""
    query = weights.log().clamp(min=-1e4)
    key = torch.eye(weights.shape[3]).expand(*weights.shape[:2], -1, -1)
    return AttentionCall("layer", query, key, key, 1.0, is_causal, mask, tokens)


def stats_of(commonness: list[float], pairs: dict[tuple[int, int], int]) -> TokenStats:
    vocab = len(commonness)
    keys = sorted(pairs)
    return TokenStats(
        vocab,
        torch.tensor([context * vocab + following for context, following in keys]),
        torch.tensor([pairs[key] for key in keys]),
        torch.tensor(commonness),
        threshold=0.5,
    )


STATS = stats_of([1.0, 0.1, 0.1, float("nan")], {(1, 3): 8, (2, 3): 2, (0, 3): 5})


def test_masses_entropy_and_gain_by_hand() -> None:
    # Tokens 1 2 1 0 3; the query at position 3, whose next token is 3, sees the first four.
    weights = torch.tensor([0.3, 0.2, 0.1, 0.4]).expand(1, 1, 5, 4)
    weights = torch.cat([weights, torch.zeros(1, 1, 5, 1)], dim=3)
    mask = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    mask[0, 0, 3, :4] = True  # no other query sees anything
    found = scan_snap(call_of(weights, torch.tensor([[1, 2, 1, 0, 3]]), mask), STATS)
    assert float(found["scan/common_mass"]) == pytest.approx(0.4)
    assert float(found["scan/distinct_mass"]) == pytest.approx(0.6)
    assert float(found["scan/common_share"]) == pytest.approx(0.25)
    # -(0.3 ln 0.3 + 0.2 ln 0.2 + 0.1 ln 0.1 + 0.4 ln 0.4) / ln 4
    assert float(found["scan/entropy"]) == pytest.approx(1.279854 / 1.386294, abs=1e-5)
    # Token 1 goes with token 3 most often, token 2 least: (0.3 + 0.1)² / 0.2² - 1.
    assert float(found["scan/relative_gain"]) == pytest.approx(3.0, rel=1e-5)


def test_uniform_attention_has_entropy_one_and_the_common_share() -> None:
    tokens = torch.randint(3, (4, 20))
    call = call_of(torch.ones(4, 2, 20, 20), tokens, is_causal=True)
    found = scan_snap(call, STATS)
    torch.testing.assert_close(found["scan/entropy"], torch.ones(2))
    torch.testing.assert_close(found["scan/common_mass"], found["scan/common_share"])
    torch.testing.assert_close(found["scan/common_mass"] + found["scan/distinct_mass"], torch.ones(2))


@pytest.mark.parametrize("kind", ["causal", "mask", "added", "half", "padding"])
def test_masks_of_every_kind_say_the_same(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(3, heads, 13, 8, generator=generator) for heads in (4, 2))
    tokens = torch.randint(3, (3, 13), generator=generator)
    causal = torch.ones(13, 13, dtype=torch.bool).tril()[None, None]
    shown = torch.ones(3, 1, 1, 13, dtype=torch.bool)
    if kind in ("half", "padding"):
        shown[0, ..., :4] = False
    wanted = AttentionCall("", query, key, key, 0.3, mask=causal & shown, tokens=tokens)
    low = torch.finfo(torch.float16).min
    given: dict[str, dict[str, Any]] = {
        "causal": {"is_causal": True},
        "mask": {"mask": causal},
        "added": {"mask": torch.zeros(1, 1, 13, 13).masked_fill(~causal, float("-inf"))},
        "half": {"mask": torch.zeros(3, 1, 1, 13).masked_fill(~shown, low).half(), "is_causal": True},
        "padding": {"mask": shown, "is_causal": True},
    }
    other = AttentionCall("", query, key, key, 0.3, tokens=tokens, **given[kind])
    for first, second in zip(scan_snap(wanted, STATS).values(), scan_snap(other, STATS).values(), strict=True):
        torch.testing.assert_close(first, second, equal_nan=True)


def test_few_queries_stand_for_many() -> None:
    call = call_of(torch.rand(5, 2, 300, 300), torch.randint(3, (5, 300)), is_causal=True)
    few, positions = sampled_queries(call, 64)
    assert few.query.shape[:3] == (5, 2, 12)
    assert positions.min() > 5
    assert positions.max() > 280
    mask = few.mask
    assert mask is not None
    assert torch.equal(mask.sum(-1).flatten(), positions + 1)
    one, _ = sampled_queries(call_of(torch.rand(100, 1, 7, 7), None), 64)
    assert one.query.shape[:3] == (64, 1, 1)
    whole = scan_snap(call, STATS, most=5000)
    part = scan_snap(call, STATS)
    torch.testing.assert_close(part["scan/entropy"], whole["scan/entropy"], rtol=0.02, atol=0)


def test_without_tokens_there_is_the_entropy_only() -> None:
    assert set(scan_snap(call_of(torch.rand(2, 1, 6, 6), None), STATS)) == {"scan/entropy"}
    across = call_of(torch.rand(2, 1, 6, 9), torch.randint(3, (2, 6)))
    assert set(scan_snap(across, STATS)) == {"scan/entropy"}
    with pytest.raises(ValueError, match="knows no tokens"):
        attention_on_tokens(across, 4)


def test_attention_on_tokens_by_hand() -> None:
    weights = torch.tensor([[1.0, 0.0], [0.25, 0.75]])[None, None]
    received, uniform = attention_on_tokens(call_of(weights, torch.tensor([[2, 0]]), is_causal=True), 3)
    # The first query sees one key only; the second gives 0.25 to token 2 and 0.75 to token 0.
    torch.testing.assert_close(received, torch.tensor([0.75, 0.0, 0.25]))
    torch.testing.assert_close(uniform, torch.tensor([0.5, 0.0, 0.5]))


class Model(nn.Module):
    """A causal layer that may be asked for eager attention."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        logits: Tensor = self.head(self.attention(x, x, x, attn_mask=mask, need_weights=False)[0])
        return logits


def watched(model: nn.Module, read: Callable[[Any], Tensor], probe: ScanSnap, folder: Path) -> dict[str, Any]:
    data = SequenceClassData(2, 1, length=16, batch_size=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with dynascope.watch(model, optimizer, run=folder, every=1, probes=[probe]):
        for _, (tokens, _) in zip(range(3), data, strict=False):
            logits = read(model(tokens))
            nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    record = dynascope.open(folder)
    return {name: record[name].values for name in record.names() if name.startswith("scan/")}


@pytest.fixture(scope="module")
def stats() -> TokenStats:
    data = SequenceClassData(2, 1, length=16, batch_size=8)
    return token_stats([data.sample(200, torch.Generator().manual_seed(0))], data.vocab)


def test_a_watched_run_records_every_series(stats: TokenStats, tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = watched(Model(stats.vocab), lambda output: output, ScanSnap(stats), tmp_path / "run")
    assert set(found) == {one.name for one in ScanSnap.series}
    assert found["scan/entropy"].shape == (3, 1, 2)
    total = found["scan/common_mass"] + found["scan/distinct_mass"]
    assert (total <= 1 + 1e-5).all()
    assert (total > 0.8).all()  # the query token is of neither kind


def test_hugging_face_kernels_make_no_difference(stats: TokenStats, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    found = {}
    second = ["model.layers.1.self_attn"]
    for name, kernel, layers in (("sdpa", "sdpa", None), ("eager", "eager", None), ("second", "sdpa", second)):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            num_hidden_layers=2,
            hidden_size=16,
            intermediate_size=16,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=stats.vocab,
            attn_implementation=kernel,
        )
        model = transformers.LlamaForCausalLM(config)
        found[name] = watched(model, lambda output: output.logits, ScanSnap(stats, layers=layers), tmp_path / name)
    assert found["sdpa"]["scan/distinct_mass"].shape == (3, 2, 4)
    for name, values in found["second"].items():
        np.testing.assert_array_equal(values, found["sdpa"][name][:, 1:])
    for name, values in found["sdpa"].items():
        torch.testing.assert_close(
            torch.from_numpy(values), torch.from_numpy(found["eager"][name]), rtol=1e-3, atol=1e-3, equal_nan=True
        )
