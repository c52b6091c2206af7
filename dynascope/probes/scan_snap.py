"""Scan and snap: does attention still move from common to distinct tokens, or has it frozen? (2305.16380)"""

import dataclasses
from collections.abc import Collection, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dynascope.data.token_stats import TokenStats
from dynascope.probes.probe import Need, Probe
from dynascope.probes.views import AttentionCall, attention_blocks
from dynascope.record import Series


def sampled_queries(call: AttentionCall, most: int = 64) -> tuple[AttentionCall, Int[Tensor, " queries"]]:
    """The call with at most `most` of its rows × queries, evenly spread, and the positions of those queries.

    What each query sees becomes an explicit mask. Nothing of size queries × keys is made of what is left out.
    """
    rows = min(call.query.shape[0], most)
    num_queries, num_keys = call.query.shape[2], call.key.shape[2]
    count = min(num_queries, max(1, most // rows))
    # The middle of equal parts: where one query a row is taken it is no longer the first, which sees nothing but itself.
    positions = ((torch.arange(count, device=call.query.device) + 0.5) * num_queries / count).long()
    mask = call.mask
    if mask is not None:
        mask = mask[: rows if mask.shape[0] > 1 else 1]
        mask = mask if mask.shape[-2] == 1 else mask[..., positions, :]
    if call.is_causal:
        is_past = (torch.arange(num_keys, device=positions.device) <= positions[:, None])[None, None]
        if mask is None or mask.dtype == torch.bool:
            mask = is_past if mask is None else mask & is_past
        else:
            is_hidden = mask <= torch.finfo(mask.dtype).min / 2  # of its own type, before it becomes a wider one
            mask = mask.float().masked_fill(is_hidden | ~is_past, float("-inf"))
    few = dataclasses.replace(
        call,
        query=call.query[:rows, :, positions],
        key=call.key[:rows],
        value=call.value[:rows],
        is_causal=False,
        mask=mask,
        tokens=None if call.tokens is None else call.tokens[:rows],
    )
    return few, positions


def scan_snap(call: AttentionCall, stats: TokenStats, most: int = 64) -> dict[str, Tensor]:
    """Entropy, mass on common and distinct tokens, and relative gain of each head, over at most `most` queries.

    Weights are computed from queries and keys, so that it does not matter which kernel the model uses. Queries that see
    fewer than two keys are left out. Where the call knows no tokens, or has other keys than them, there is the entropy
    only. The next token of a query is the one after it, as in causal models. Memory: `most` × heads × keys numbers.

    Source: 2305.16380, whose theorem is about one layer with one head, without positions, residual stream or MLP; of any
    other model these are the same statistics without the theorem.

    >>> scan_snap(call, stats)["scan/distinct_mass"]
    """
    few, positions = sampled_queries(call, most)
    (part,) = attention_blocks(few, block=len(positions))
    weights, visible, num_visible = part.weights, part.visible, part.num_visible
    counts = num_visible > 1
    entropy = -torch.linalg.vecdot(weights, part.log_weights().clamp(min=-1e4)) / num_visible.clamp(min=2).log()
    measured = {"scan/entropy": _mean(entropy, counts)}
    tokens = few.tokens
    if tokens is None or tokens.shape[1] != few.key.shape[2]:
        return measured
    is_common, is_distinct = stats.is_common[tokens], stats.is_distinct[tokens]
    by_kind = [weights @ kind[:, None, :, None].float() for kind in (is_common, is_distinct)]
    share = (visible & is_common[:, None, None]).sum(-1) / num_visible
    return measured | {
        "scan/common_mass": _mean(by_kind[0][..., 0], counts),
        "scan/distinct_mass": _mean(by_kind[1][..., 0], counts),
        "scan/common_share": _mean(share, counts),
        "scan/relative_gain": _relative_gain(weights, visible, tokens, positions, stats),
    }


def attention_on_tokens(call: AttentionCall, vocab: int) -> tuple[Float[Tensor, " vocab"], Float[Tensor, " vocab"]]:
    """Attention that each token of the vocabulary receives over all queries and heads, and what uniform attention would give.

    Their ratio is how much a token is sought out. Queries that see fewer than two keys are left out.

    Raises ValueError where the call knows no tokens, or its keys are not the model's tokens.

    >>> received, uniform = attention_on_tokens(call, vocab)
    """
    tokens = call.tokens
    if tokens is None or tokens.shape[1] != call.key.shape[2]:
        raise ValueError("the attention call knows no tokens, or its keys are not the model's tokens")
    received = torch.zeros(call.key.shape[0], call.key.shape[2], device=call.key.device)
    uniform = torch.zeros_like(received)
    for part in attention_blocks(call):
        visible = part.visible
        num_visible = visible.sum(-1, keepdim=True)
        counts = num_visible > 1
        received += torch.where(counts, part.weights, 0.0).sum((1, 2))
        uniform += torch.where(counts, visible / num_visible, 0.0).sum((1, 2))
    empty = torch.zeros(vocab, device=call.key.device)
    flat = tokens.flatten()
    return empty.index_add(0, flat, received.flatten()), empty.index_add(0, flat, uniform.flatten())


class ScanSnap(Probe):
    """Attention's entropy, its mass on common and distinct tokens, and the relative gain of a context's best distinct token.

    Args:
        stats: `dynascope.data.token_stats` of the text that is trained on.
        most: Queries that are looked at in each layer.
        layers: Names of attention modules to look at; None means all.

    Works for every model whose attention the watch sees (fused, eager, Hugging Face). Needs the model to be called with
    token ids. The findings of these series are told by `attention-snap`; how fast they move in log step is told by
    `dynascope.findings.scan_snap.log_step_rate`.

    >>> dynascope.watch(model, optimizer, probes=["default", ScanSnap(token_stats(text, vocab=2000))])
    """

    name = "scan-snap"
    needs = frozenset({Need.ATTENTION})
    default = False
    series = (
        Series(
            "scan/entropy",
            ("layer", "head"),
            description="Entropy of attention over the log of the number of visible keys: 1 is uniform.",
        ),
        Series(
            "scan/common_mass",
            ("layer", "head"),
            "share of attention",
            "Attention on tokens that many next tokens share.",
        ),
        Series(
            "scan/distinct_mass",
            ("layer", "head"),
            "share of attention",
            "Attention on tokens that go with few next tokens.",
        ),
        Series(
            "scan/common_share",
            ("layer", "head"),
            "share of keys",
            "Visible keys that are common tokens: the common mass of uniform attention.",
        ),
        Series(
            "scan/relative_gain",
            ("layer", "head"),
            description="(attention on the distinct token that goes most often with the next one / on the one that goes "
            "least often)² - 1; median over queries.",
        ),
    )

    def __init__(self, stats: TokenStats, *, most: int = 64, layers: Collection[str] | None = None) -> None:
        self.stats, self.most, self._layers = stats, most, layers

    def measure(self, view: AttentionCall) -> Mapping[str, Tensor]:
        """All series for the heads of one attention call; none for a layer that was not asked for."""
        if self._layers is not None and view.name not in self._layers:
            return {}
        if self.stats.commonness.device != view.query.device:
            self.stats = self.stats.to(view.query.device)
        return scan_snap(view, self.stats, self.most)


def _mean(values: Float[Tensor, "rows heads queries"], counts: Bool[Tensor, "..."]) -> Float[Tensor, " heads"]:
    counts = counts.expand(values.shape)
    mean: Tensor = torch.where(counts, values, 0.0).sum((0, 2)) / counts.sum((0, 2))
    return mean


def _relative_gain(
    weights: Float[Tensor, "rows heads queries keys"],
    visible: Bool[Tensor, "rows heads queries keys"],
    tokens: Int[Tensor, "rows keys"],
    positions: Int[Tensor, " queries"],
    stats: TokenStats,
) -> Float[Tensor, " heads"]:
    # The token after the last one is not known, so a query there has no class.
    has_next = positions + 1 < tokens.shape[1]
    following = tokens[:, (positions + 1).clamp(max=tokens.shape[1] - 1)]
    shape = *following.shape, tokens.shape[1]
    seen = stats.co_occurrence(tokens[:, None].expand(shape), following[..., None].expand(shape))
    is_candidate = (stats.is_distinct[tokens][:, None] & (seen > 0) & has_next[:, None])[:, None] & visible
    often = torch.where(is_candidate, seen[:, None], -1)
    seldom = torch.where(is_candidate, seen[:, None], torch.iinfo(seen.dtype).max)
    most, least = often.max(-1), seldom.min(-1)
    is_pair = (most.values > least.values) & (most.values > 0)
    # Every occurrence of a token counts: weights are summed over equal tokens, which sorting brings together.
    order = tokens.sort(dim=1)
    group = torch.zeros_like(tokens)
    group[:, 1:] = (order.values.diff(dim=1) > 0).cumsum(1)
    group = torch.zeros_like(tokens).scatter_(1, order.indices, group)[:, None, None].expand(weights.shape)
    mixture = torch.zeros_like(weights).scatter_add_(-1, group, weights)
    top, bottom = (
        mixture.gather(-1, group.gather(-1, choice.indices[..., None])).squeeze(-1) for choice in (most, least)
    )
    gains = torch.where(is_pair, (top / bottom).square() - 1, torch.nan)
    median: Tensor = gains.transpose(0, 1).flatten(1).nanmedian(dim=1).values
    return median
