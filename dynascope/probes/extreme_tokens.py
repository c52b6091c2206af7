"""Extreme tokens: attention sinks, drained values and residual peaks, which come together (2410.13835).

Much of what a model's heads attend goes to one early token that has nothing to say; its value is tiny, its residual state
huge. The default probes record attention and value norms at every early position; this one finds the sink, wherever it is,
and measures all that is extreme about it.
"""

from collections.abc import Collection, Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dynascope.probes.attention import POSITIONS, first_visible, late_queries
from dynascope.probes.probe import Need, Probe
from dynascope.probes.views import AttentionCall, ModuleOutput, attention_blocks
from dynascope.record import Series

ATTENDED = 0.3
"""A query counts as one that attends to the sink above this weight (2410.10781)."""
PROJECTIONS = ("o_proj", "out", "out_proj", "c_proj", "dense", "wo")
"""What models call the map from heads to the residual stream."""


def find_sink(
    call: AttentionCall, delimiters: Collection[int] = (), block: int = 128, most: int | None = None
) -> tuple[Int[Tensor, "rows queries"], Int[Tensor, " rows"]]:
    """Where each query's sink is, and each row's first real position (of its last document, if several are packed).

    The sink is whichever of the first 8 positions of a document receives most attention over all rows and heads (from each
    document's sixth query on), or the row's first delimiter if that receives more. First positions are not always the
    sink, nor position 0 the first. `most` as in `attention_blocks`. Source: 2410.13835, section 2.

    >>> sink, first = find_sink(call, delimiters=[13])
    """
    first, starts = first_visible(call), document_starts(call)
    num_keys, device = call.key.shape[2], first.device
    offsets = torch.arange(POSITIONS, device=device)
    early, number = torch.zeros(POSITIONS, device=device), torch.zeros((), device=device)
    is_delimiter = torch.zeros(len(first), num_keys, dtype=torch.bool, device=device)
    if delimiters and call.tokens is not None:
        is_delimiter[:, : call.tokens.shape[1]] = torch.isin(call.tokens, torch.tensor(list(delimiters), device=device))
        is_delimiter &= torch.arange(num_keys, device=device) >= first[:, None]
    has_delimiter, delimiter = is_delimiter.any(1), is_delimiter.to(torch.uint8).argmax(1)
    at_delimiter, number_with = torch.zeros((), device=device), torch.zeros((), device=device)
    for part in attention_blocks(call, block, most):
        start = starts[:, part.first_query : part.first_query + part.logits.shape[2]]
        is_late = late_queries(part, start)
        weights = part.weights
        index = (start[..., None] + offsets).clamp(max=num_keys - 1)[:, None]
        received = weights.gather(3, index.expand(*weights.shape[:3], POSITIONS)) * is_late.unsqueeze(-1)
        early = early + received.sum((0, 1, 2))
        number = number + is_late.sum()
        taken = weights.gather(3, delimiter[:, None, None, None].expand(*weights.shape[:3], 1))[..., 0]
        at_delimiter = at_delimiter + (taken * (is_late & has_delimiter[:, None, None])).sum()
        number_with = number_with + (is_late & has_delimiter[:, None, None]).sum()
    # Short sequences have fewer positions than candidates; the last would count for those beyond it.
    early = torch.where(offsets < num_keys, early, -1.0)
    sink = (starts + early.argmax()).clamp(max=num_keys - 1)
    is_better = has_delimiter & (at_delimiter / number_with > early.max() / number)
    return torch.where(is_better[:, None], delimiter[:, None], sink), first


def document_starts(call: AttentionCall) -> Int[Tensor, "rows queries"]:
    """Where each query's document begins: the last position up to it that sees no key but itself.

    Without packing this is a row's first real key. Queries of padding get that too.

    >>> document_starts(AttentionCall("", query, key, value, scale=1.0, is_causal=True))  # zeros
    """
    first, num_queries = first_visible(call), call.query.shape[2]
    mask = call.mask
    if mask is None or mask.shape[-2] == 1:
        return first[:, None].expand(-1, num_queries)
    shown = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)[:, 0]
    position = torch.arange(num_queries, device=first.device)
    if call.is_causal:
        shown = shown.tril()
    # Padding sees everything in some frameworks, where a row that sees nothing would be NaN.
    is_start = shown.diagonal(dim1=-2, dim2=-1) & (shown.sum(-1) == 1) if shown.shape[-1] >= num_queries else None
    if is_start is None:
        return first[:, None].expand(-1, num_queries)
    starts = torch.where(is_start, position, -1).cummax(-1).values
    # A window of attention slides: there, a row has one start and later queries see not even that.
    return torch.where(starts < 0, first[:, None], starts).expand(len(first), num_queries)


def extreme_token_summary(
    call: AttentionCall,
    sink: Int[Tensor, "rows sinks"] | None = None,
    *,
    queries: Bool[Tensor, "rows queries"] | None = None,
    output_weight: Float[Tensor, "heads width value_dim"] | None = None,
    block: int = 128,
    most: int | None = None,
) -> dict[str, Tensor]:
    """Everything extreme about one call's sink, a value a head, without keeping a queries × keys map.

    With A the attention weights, s the sink and i a query (from a row's sixth on; `queries` narrows them further):

    - `sink_score`: mean A[i, s]; `sink_share`: share of queries with A[i, s] > 0.3.
    - `sink_logit`: mean over i of logit[i, s] − mean_j logit[i, j], over visible keys j other than s and i;
      `sink_logit_lme` with the log of the mean exponential instead; `sink_logit_spread`: its standard deviation over i.
    - `row_entropy`: mean over all queries of H(A[i]) / log(number of visible keys), 0 where there is one key.
    - `column_entropy`: the largest over keys of H(A[:, j] / Σᵢ A[i, j]) / log(number of queries that see j). A sink head has
      low row entropy and high column entropy.
    - `value_drain`: ‖v_s‖ over the mean ‖v_j‖ of the other real keys; `output_drain`: the same after the heads' share of
      the output projection, where that is given.

    The sink, a position for each query or one a row, defaults to the first key of its document; drains are those at the
    last query's. `most` as in `attention_blocks`: then all means are over so many queries. Source: 2410.13835, sections 2 and 4.

    >>> extreme_token_summary(call)["sink_score"]  # (heads,)
    """
    rows, num_heads, _, _ = call.query.shape
    num_keys, device = call.key.shape[2], call.query.device
    first, starts = first_visible(call), document_starts(call)
    sink = starts if sink is None else sink.expand(rows, starts.shape[1])
    key_position = torch.arange(num_keys, device=device)
    totals = torch.zeros(9, num_heads, device=device)
    column_mass, column_entr = torch.zeros(2, rows, num_heads, num_keys, device=device)
    seen_by = torch.zeros(rows, num_heads, num_keys, device=device)
    for part in attention_blocks(call, block, most):
        weights, visible, num_visible = part.weights, part.visible, part.num_visible
        # − p log p, of which a softmax's rows and columns want the same.
        row_entr = -(part.shares * part.log_shares().clamp(min=-1e4))
        inside = slice(part.first_query, part.first_query + weights.shape[2])
        query_position = torch.arange(part.first_query, inside.stop, device=device)
        at = sink[:, None, inside, None].expand(*weights.shape[:3], 1)
        to_sink, at_sink = (one.gather(3, at)[..., 0] for one in (weights, part.logits))
        counted = late_queries(part, starts[:, inside])
        if queries is not None:
            counted = counted & queries[:, None, inside]
        is_other = (key_position != sink[:, inside, None]) & (key_position != query_position[:, None])
        others = visible & is_other[:, None]
        num_others = others.sum(-1)
        compares = counted & (num_others > 0) & torch.isfinite(at_sink)
        logit = at_sink - part.logits.masked_fill(~others, 0.0).sum(-1) / num_others.clamp(min=1)
        log_mean = part.logits.masked_fill(~others, float("-inf")).logsumexp(-1) - num_others.clamp(min=1).log()
        logit, against_lme = (torch.where(compares, one, 0.0) for one in (logit, at_sink - log_mean))
        row_entropy = torch.where(num_visible > 1, row_entr.sum(-1) / num_visible.clamp(min=2).log(), 0.0)
        measured = (
            to_sink * counted,
            (to_sink > ATTENDED) & counted,
            counted,
            logit,
            logit.square(),
            against_lme,
            compares,
            row_entropy,
            num_visible > 0,
        )
        totals += torch.stack([one.float().sum((0, 2)) for one in measured])
        column_mass += weights.sum(2)
        column_entr += (row_entr if part.kind == "softmax" else torch.special.entr(weights)).sum(2)
        seen_by += visible.sum(2)
    score, share, num_counted, logit_sum, square_sum, lme_sum, num_compared, row_sum, num_rows = totals
    mean_logit = logit_sum / num_compared
    column = (column_entr / column_mass + column_mass.log()) / seen_by.clamp(min=2).log()
    column = torch.where((seen_by > 1) & (column_mass > 0), column, 0.0)
    real = (seen_by[:, 0] > 0) & (key_position >= first[:, None])
    summary = {
        "sink_score": score / num_counted,
        "sink_share": share / num_counted,
        "sink_logit": mean_logit,
        "sink_logit_spread": (square_sum / num_compared - mean_logit.square()).clamp(min=0).sqrt(),
        "sink_logit_lme": lme_sum / num_compared,
        "row_entropy": row_sum / num_rows,
        "column_entropy": column.amax(2).mean(0),
        "value_drain": value_drain(call.value, sink[:, -1], real).repeat_interleave(num_heads // call.value.shape[1]),
    }
    if output_weight is not None:
        summary["output_drain"] = value_drain(call.value, sink[:, -1], real, output_weight)
    return summary


def value_drain(
    value: Float[Tensor, "rows kv_heads keys value_dim"],
    sink: Int[Tensor, " rows"],
    real: Bool[Tensor, "rows keys"] | None = None,
    output_weight: Float[Tensor, "heads width value_dim"] | None = None,
) -> Float[Tensor, " heads"]:
    """Norm of the value at the sink over the mean norm at the other real keys, averaged over rows; below 1 it is drained.

    With `output_weight` (each query head's part of the output projection) norms are those of what reaches the residual
    stream, a value a query head. Source: 2410.13835, section 2.

    >>> value_drain(torch.tensor([0.5, 1.0, 1.0]).view(1, 1, 3, 1), torch.tensor([0]))
    tensor([0.5000])
    """
    value = value.float()
    if output_weight is None:
        norms = value.norm(dim=-1)
    else:
        value = value.repeat_interleave(len(output_weight) // value.shape[1], dim=1)
        gram = torch.einsum("hwi,hwj->hij", output_weight.float(), output_weight.float())
        norms = torch.einsum("bhki,hij,bhkj->bhk", value, gram, value).clamp(min=0).sqrt()
    return _against_others(norms, sink, real).mean(0)


def peak_ratios(
    states: Float[Tensor, "rows positions features"],
    sink: Int[Tensor, " rows"],
    first: Int[Tensor, " rows"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Norm of the residual state at the sink over the mean, and over the median, of the other real positions.

    Positions before `first` are padding. The mean is ruled by other outliers (delimiters), which is why there is a median.
    Both are averaged over rows. Source: 2410.13835, section 2.

    >>> peak_ratios(torch.tensor([4.0, 1.0, 3.0, 1.0]).view(1, 4, 1), torch.tensor([0]))
    (tensor(2.4000), tensor(4.))
    """
    norms = states.float().norm(dim=-1)[:, None]
    position = torch.arange(norms.shape[2], device=norms.device)
    real = None if first is None else position >= first[:, None]
    at_sink = norms.gather(2, sink[:, None, None])[..., 0]
    is_other = (position != sink[:, None]) if real is None else real & (position != sink[:, None])
    median = norms.masked_fill(~is_other[:, None], float("nan")).nanmedian(2).values
    return _against_others(norms, sink, real).mean(), (at_sink / median).mean()


def quantization_risk(states: Float[Tensor, "rows positions features"]) -> Float[Tensor, ""]:
    """Largest magnitude of any channel over the median magnitude: how much of a quantizer's range one outlier takes.

    A Gaussian stream of a million numbers has about 7. Source: 2410.13835, section 1 (outliers and quantization).

    >>> quantization_risk(torch.tensor([[[1.0, -1.0, 8.0]]]))
    tensor(8.)
    """
    magnitude = states.float().abs().flatten()
    risk: Tensor = magnitude.max() / magnitude.median()
    return risk


def norm_contributions(
    norm: Float[Tensor, ""], parameters: Mapping[str, Tensor], updates: Mapping[str, Tensor]
) -> dict[str, Float[Tensor, ""]]:
    """What each parameter's update adds to a norm, to first order: ⟨∂norm/∂parameter, update⟩.

    `norm` is differentiable in the parameters: a mean of ‖h_0‖ after some layer shows what drives a residual peak. The
    graph is kept. Parameters that the norm does not depend on add 0. Source: 2410.13835, section 3 (growth of the peak).

    >>> norm_contributions(states[:, 0].norm(dim=-1).mean(), dict(model.named_parameters()), view.updates)
    """
    names = [name for name in parameters if name in updates]
    gradients = torch.autograd.grad(norm, [parameters[name] for name in names], retain_graph=True, allow_unused=True)
    return {
        name: norm.new_zeros(()) if gradient is None else (gradient * updates[name]).sum()
        for name, gradient in zip(names, gradients, strict=True)
    }


class ExtremeTokens(Probe):
    """Sinks, their logits, drained values, residual peaks and the quantization risk, layer by layer.

    Args:
        model: Whose output projections are looked up for the drain of what reaches the residual stream; without it that
            one series is left out.
        sink: "auto" finds it anew at every look and layer; a number is its position, counted from a row's first real one.
        delimiters: Token ids that may be sinks too.
        layers: Names of attention modules to look at; None means all.
        most: Queries of each row that are looked at, at even distances: for long contexts. None means all.

    Source: 2410.13835, sections 2 and 4. Reads ReLU and sigmoid attention too (`dynascope.nn.relu_attention`).

    >>> dynascope.watch(model, optimizer, probes=["default", ExtremeTokens(model, delimiters=[tokenizer.eos_token_id])])
    """

    name = "extreme-tokens"
    needs = frozenset({Need.ATTENTION, Need.BLOCKS})
    default = False
    series = (
        Series("extreme/sink_position", ("layer",), "tokens", "Where the sink is, from the first real token on."),
        Series("extreme/sink_score", ("layer", "head"), description="Mean attention that the sink receives."),
        Series("extreme/sink_share", ("layer", "head"), description="Share of queries that give the sink over 0.3."),
        Series("extreme/sink_logit", ("layer", "head"), description="Logit of the sink less the mean of the others."),
        Series("extreme/sink_logit_spread", ("layer", "head"), description="Its standard deviation over queries."),
        Series(
            "extreme/sink_logit_lme", ("layer", "head"), description="The same less the log of the others' mean exp."
        ),
        Series(
            "extreme/row_entropy", ("layer", "head"), description="Mean entropy of attention rows, 1 for uniform ones."
        ),
        Series(
            "extreme/column_entropy", ("layer", "head"), description="Largest entropy of a column, 1 for a full sink."
        ),
        Series(
            "extreme/value_drain", ("layer", "head"), description="Norm of the sink's value over the mean of others."
        ),
        Series("extreme/output_drain", ("layer", "head"), description="The same after the output projection."),
        Series("extreme/peak_mean", ("block",), description="Norm of the sink's residual state over the others' mean."),
        Series("extreme/peak_median", ("block",), description="Norm of the sink's residual state over their median."),
        Series(
            "extreme/quantization_risk", ("block",), description="Largest channel magnitude over the median magnitude."
        ),
    )

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        sink: Literal["auto"] | int = "auto",
        delimiters: Collection[int] = (),
        layers: Collection[str] | None = None,
        most: int | None = None,
    ) -> None:
        if most is not None and most < 1:
            raise ValueError(f"most={most} must be at least 1 query a row, or None for all")
        if sink != "auto" and not 0 <= sink < POSITIONS:
            raise ValueError(f'sink={sink} must be "auto" or a position below {POSITIONS}')
        self._modules = {} if model is None else dict(model.named_modules())
        self._sink, self._delimiters, self._layers, self._most = sink, tuple(delimiters), layers, most
        self._last: tuple[Tensor, Tensor] | None = None

    def measure(self, view: AttentionCall | ModuleOutput) -> Mapping[str, Tensor]:
        """What concerns one attention call, or the output of one block, whose sink is that of the last call before it."""
        return self._of_attention(view) if isinstance(view, AttentionCall) else self._of_block(view)

    def _of_attention(self, call: AttentionCall) -> dict[str, Tensor]:
        if self._layers is not None and call.name not in self._layers:
            return {}
        if self._sink == "auto":
            sink, first = find_sink(call, self._delimiters, most=self._most)
        else:
            first = first_visible(call)
            sink = (document_starts(call) + self._sink).clamp(max=call.key.shape[2] - 1)
        self._last = sink[:, -1], first
        weight = output_weights(self._modules.get(call.name.split("#")[0]), call.query.shape[1])
        summary = extreme_token_summary(call, sink, output_weight=weight, most=self._most)
        summary["sink_position"] = (sink[:, -1] - first).float().mean()
        return {f"extreme/{name}": value for name, value in summary.items()}

    def _of_block(self, view: ModuleOutput) -> dict[str, Tensor]:
        states = view.tensor
        if states.ndim != 3 or view.is_channels_first:
            return {}
        sink = first = torch.zeros(len(states), dtype=torch.long, device=states.device)
        if self._last is not None and len(self._last[0]) == len(states):
            sink, first = (one.clamp(max=states.shape[1] - 1) for one in self._last)
        mean, median = peak_ratios(states, sink, first)
        return {
            "extreme/peak_mean": mean,
            "extreme/peak_median": median,
            "extreme/quantization_risk": quantization_risk(states),
        }


def output_weights(attention: nn.Module | None, num_heads: int) -> Float[Tensor, "heads width value_dim"] | None:
    """Each head's part of an attention module's output projection, where it has one under a usual name.

    >>> output_weights(model.model.layers[0].self_attn, num_heads=32).shape  # (32, width, head_dim)
    """
    for name, child in attention.named_children() if attention is not None else ():
        weight = getattr(child, "weight", None)
        if name in PROJECTIONS and isinstance(weight, Tensor) and weight.ndim == 2:
            # The Conv1D of GPT-2 keeps its weight the other way round.
            weight = weight if isinstance(child, nn.Linear) else weight.T
            if weight.shape[1] % num_heads == 0:
                by_head: Tensor = weight.unflatten(1, (num_heads, -1)).transpose(0, 1)
                return by_head
    return None


def _against_others(
    norms: Float[Tensor, "rows heads positions"],
    sink: Int[Tensor, " rows"],
    real: Bool[Tensor, "rows positions"] | None,
) -> Float[Tensor, "rows heads"]:
    """Norm at the sink over the mean norm at the other real positions."""
    position = torch.arange(norms.shape[2], device=norms.device)
    is_other = position != sink[:, None]
    is_other = (is_other if real is None else is_other & real)[:, None]
    at_sink = norms.gather(2, sink[:, None, None].expand(-1, norms.shape[1], 1))[..., 0]
    return at_sink / ((norms * is_other).sum(2) / is_other.sum(2))
