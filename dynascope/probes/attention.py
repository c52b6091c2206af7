"""Attention: how concentrated it is, where it goes when it goes nowhere, and how large its logits are."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dynascope.probes.probe import Need, Probe
from dynascope.probes.spectra import eigenvalues
from dynascope.probes.views import AttentionBlock, AttentionCall, attention_blocks, shown_by
from dynascope.record import Series

# The first key positions that are recorded one by one, and the first queries that are left out of a sink's mass:
# the first query can look nowhere else, and the next few hardly.
POSITIONS, EARLY_QUERIES, NORM_ROWS = 8, 5, 2


def attention_entropy(
    query: Float[Tensor, "rows heads queries head_dim"],
    key: Float[Tensor, "rows kv_heads keys head_dim"],
    *,
    scale: float | None = None,
    is_causal: bool = False,
    mask: Tensor | None = None,
    block: int = 128,
) -> Float[Tensor, " heads"]:
    """Mean entropy of the attention rows of each head, in nats: 0 for one-hot rows, log(keys) for uniform ones.

    `mask` is as in `scaled_dot_product_attention` (bool: True = visible; float: added). Hidden keys take no part. Rows
    that see no key are not averaged, nor are, in self-attention, those of positions that the mask hides from every query:
    they are padding. Never keeps more than `block` rows of the queries × keys map.
    Source: 2303.06296, section 3 (Ent(A_i) = -Σ_j A_ij log A_ij).

    >>> attention_entropy(torch.zeros(1, 1, 8, 4), torch.zeros(1, 1, 8, 4))  # log 8
    tensor([2.0794])
    """
    call = _call(query, key, scale, is_causal, mask)
    return attention_summary(call, block)["attention/entropy"]


def attention_entropy_from_weights(
    weights: Float[Tensor, "rows heads queries keys"],
    mask: Bool[Tensor, "#rows #heads #queries"] | None = None,
) -> Float[Tensor, " heads"]:
    """Mean entropy of given attention rows of each head, in nats; `mask` is True for the queries to average.

    >>> attention_entropy_from_weights(torch.full((1, 1, 4, 8), 1 / 8))
    tensor([2.0794])
    """
    entropy = torch.special.entr(weights.float()).sum(-1)
    counted = torch.ones_like(entropy, dtype=torch.bool) if mask is None else mask.expand_as(entropy)
    mean: Tensor = (entropy * counted).sum((0, 2)) / counted.sum((0, 2))
    return mean


def entropy_lower_bound(logit_norm: float | Float[Tensor, "*shape"], num_keys: int) -> Float[Tensor, "*shape"]:
    """The smallest entropy that a row of `num_keys` logits of Euclidean norm at most `logit_norm` can have, in nats.

    0 for a single key. Reached by one logit at s·sqrt((T-1)/T) and the others at -s/sqrt(T(T-1)). With s the spectral
    norm of the query-key map times that of the inputs (and the attention scale), this bounds a head's entropy.
    Source: 2303.06296, Theorem 3.1.

    >>> entropy_lower_bound(0.0, 8)  # log 8
    tensor(2.0794)
    """
    norm = torch.as_tensor(logit_norm, dtype=torch.get_default_dtype())
    rest = torch.exp(-norm * math.sqrt(num_keys / max(1, num_keys - 1)))
    total = 1 + (num_keys - 1) * rest
    return torch.log(total) + norm * math.sqrt(num_keys * (num_keys - 1)) * rest / total


def logit_spectral_norm(
    query_weight: Float[Tensor, "head_dim width"],
    key_weight: Float[Tensor, "head_dim width"],
    inputs: Float[Tensor, "positions width"],
    scale: float = 1.0,
) -> Float[Tensor, ""]:
    """Largest singular value of one head's logits `scale · X W_qᵀ W_k Xᵀ`, without forming that map.

    Source: the quantity that 2303.06296, Theorem 3.1 bounds entropy with.

    >>> logit_spectral_norm(torch.eye(2), torch.eye(2), torch.eye(2))
    tensor(1.)
    """
    queries, keys = inputs @ query_weight.T, inputs @ key_weight.T
    return _product_norm(queries, keys) * abs(scale)


def sink_mass(
    query: Float[Tensor, "rows heads queries head_dim"],
    key: Float[Tensor, "rows kv_heads keys head_dim"],
    *,
    scale: float | None = None,
    is_causal: bool = False,
    mask: Tensor | None = None,
    block: int = 128,
) -> Float[Tensor, "heads positions"]:
    """Mean attention that each of the first 8 visible key positions receives, over queries from the sixth on.

    NaN for positions that do not exist. With left padding, the first key that a row's last query sees counts as
    position 0. Source: sink score of 2410.13835 (and 2410.10781), for every early position instead of the first.

    >>> sink_mass(torch.zeros(1, 1, 16, 4), torch.zeros(1, 1, 16, 4)).shape
    torch.Size([1, 8])
    """
    return attention_summary(_call(query, key, scale, is_causal, mask), block)["attention/sink_mass"]


def value_norm(
    value: Float[Tensor, "rows kv_heads keys value_dim"],
    num_heads: int,
    first: Tensor | None = None,
) -> Float[Tensor, "heads positions"]:
    """Norm of the value at each of the first 8 positions over the mean norm of all positions (2410.13835: value drain).

    `first` gives each row's first position where rows are padded on the left. NaN for positions that do not exist.

    >>> value_norm(torch.ones(1, 2, 16, 4), num_heads=2)[0, 0]
    tensor(1.)
    """
    norms = value.float().norm(dim=-1)
    relative = norms / norms.mean(dim=-1, keepdim=True)
    early = from_first(relative, first)
    return early.mean(0).repeat_interleave(num_heads // value.shape[1], dim=0)


def attention_summary(call: AttentionCall, block: int = 128) -> dict[str, Tensor]:
    """Every attention series of one call in one pass over its queries, a value a head; `block` bounds the memory."""
    rows, num_heads, *_ = call.query.shape
    num_keys = call.key.shape[2]
    device = call.query.device
    first = first_visible(call)
    zeros = torch.zeros(num_heads, device=device)
    entropy, normalized, seen, choices = zeros.clone(), zeros.clone(), zeros.clone(), zeros.clone()
    largest = torch.full((num_heads,), float("-inf"), device=device)
    mass = torch.zeros(rows, num_heads, num_keys, device=device)
    num_late = torch.zeros(rows, num_heads, 1, device=device)
    for part in attention_blocks(call, block):
        weights, visible = part.weights, part.num_visible
        row_entropy = -torch.linalg.vecdot(part.shares, part.log_shares().clamp(min=-1e4))
        attends = visible > 0 if part.kind == "softmax" else weights.sum(-1) > 0
        entropy += row_entropy.sum((0, 2))
        seen += attends.sum((0, 2))
        # A row with one visible key has no choice, so no share of it.
        has_choice = attends & (visible > 1)
        normalized += torch.where(has_choice, row_entropy / visible.clamp(min=2).log(), 0.0).sum((0, 2))
        choices += has_choice.sum((0, 2))
        largest = torch.maximum(largest, part.logits.amax((0, 2, 3)))
        is_late = late_queries(part, first[:, None])
        mass += (is_late.float().unsqueeze(2) @ weights).squeeze(2)
        num_late += is_late.sum(2, keepdim=True)
    received = from_first(mass / num_late, first).nanmean(0)
    queries, keys = (part[:NORM_ROWS].float() for part in (call.query, call.key))
    keys = keys.repeat_interleave(num_heads // call.key.shape[1], dim=1)
    return {
        "attention/entropy": entropy / seen,
        "attention/entropy_normalized": normalized / choices,
        "attention/logit_max": largest,
        "attention/logit_spectral_norm": _product_norm(queries, keys).mean(0) * abs(call.scale),
        "attention/sink_mass": received,
        "attention/value_norm": value_norm(call.value, num_heads, first),
    }


class Attention(Probe):
    """Entropy, largest logit, spectral norm of the logits, sinks and value norms of every head."""

    name = "attention"
    needs = frozenset({Need.ATTENTION})
    series = (
        Series("attention/entropy", ("layer", "head"), "nats", "Mean entropy of each head's attention rows."),
        Series(
            "attention/entropy_normalized",
            ("layer", "head"),
            description="Entropy over the log of the number of visible keys: 1 is uniform, 0 one-hot.",
        ),
        Series("attention/logit_max", ("layer", "head"), description="Largest visible attention logit."),
        Series(
            "attention/logit_spectral_norm",
            ("layer", "head"),
            description="Largest singular value of the scaled query-key map, before masking; mean over two rows.",
        ),
        Series(
            "attention/sink_mass",
            ("layer", "head", "position"),
            "share of attention",
            "Mean attention that each early position receives from later queries.",
        ),
        Series(
            "attention/value_norm",
            ("layer", "head", "position"),
            description="Norm of the value at each early position over the mean norm.",
        ),
    )

    def measure(self, view: AttentionCall) -> Mapping[str, Tensor]:
        """All series for the heads of one attention call."""
        return attention_summary(view)


def _call(query: Tensor, key: Tensor, scale: float | None, is_causal: bool, mask: Tensor | None) -> AttentionCall:
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return AttentionCall("", query, key, key, scale, is_causal, mask)


def _product_norm(left: Float[Tensor, "*batch n d"], right: Float[Tensor, "*batch m d"]) -> Float[Tensor, "*batch"]:
    """Spectral norm of left rightᵀ from its d × d Gram matrices: σ² is the top eigenvalue of (LᵀL)(RᵀR)."""
    # With C Cᵀ = LᵀL the product is similar to the symmetric Cᵀ(RᵀR)C; C from eigenvectors also serves singular Grams.
    gram = left.transpose(-2, -1) @ left
    values, vectors = torch.linalg.eigh(gram.nan_to_num(0.0, 0.0, 0.0))
    half = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    # What is not finite in the first Gram comes back with its diagonal.
    inner = half.transpose(-2, -1) @ (right.transpose(-2, -1) @ right) @ half + 0 * gram
    top: Tensor = eigenvalues(inner)[..., -1]
    return top.clamp(min=0).sqrt()


def first_visible(call: AttentionCall) -> Int[Tensor, " rows"]:
    """Each row's first key that its last query sees: 0 unless a mask hides padding on the left."""
    rows = call.query.shape[0]
    if call.mask is None:
        return torch.zeros(rows, dtype=torch.long, device=call.query.device)
    shown = shown_by(call.mask[:, :1, -1])
    return shown[:, 0].to(torch.uint8).argmax(-1).expand(rows)


def late_queries(part: AttentionBlock, start: Int[Tensor, "rows starts"]) -> Bool[Tensor, "rows heads block"]:
    """True for queries from the sixth after their start on, which see enough keys for a sink to mean something.

    `start` is a position for each query of the block, or one a row.
    """
    position = torch.arange(part.first_query, part.first_query + part.logits.shape[2], device=start.device)
    return (position - start >= EARLY_QUERIES)[:, None] & (part.num_visible > 0)


def from_first(values: Float[Tensor, "rows heads keys"], first: Tensor | None) -> Float[Tensor, "rows heads positions"]:
    """The first 8 positions of each row, counted from its first visible one; NaN where there are fewer."""
    rows, heads, keys = values.shape
    start = torch.zeros(rows, dtype=torch.long, device=values.device) if first is None else first
    index = start[:, None] + torch.arange(POSITIONS, device=values.device)
    taken = values.gather(2, index.clamp(max=keys - 1)[:, None].expand(rows, heads, POSITIONS))
    return taken.masked_fill((index >= keys)[:, None], float("nan"))
