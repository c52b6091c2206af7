"""Attention in parts that meet in one softmax by their log-sum-exps, so that no key or value is copied.

With l₁ and l₂ the log-sum-exps of two parts and l = log(exp l₁ + exp l₂), the output is exp(l₁ − l) O₁ + exp(l₂ − l) O₂.
Backward, each part's kernel is given the merged output and l, and so works with the probabilities of the whole softmax.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dynascope.nn.shared_prefix.arrangement import as_many, fold, prompt_key_mask, unfold
from dynascope.nn.shared_prefix.layout import SharedPrefix
from dynascope.nn.shared_prefix.tree import PrefixTree

_SHORT = 24
"""Tokens of a mean stretch below which padding costs less than calls."""


def has_kernels(query: Tensor, value: Tensor) -> bool:
    """Whether PyTorch has kernels that hand out log-sum-exps for these.

    >>> has_kernels(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8))
    True
    """
    return query.device.type == "cpu" and query.shape[-1] == value.shape[-1]


def cascade(
    query: Float[Tensor, "rows H T d"],
    key: Float[Tensor, "rows K T d"],
    value: Float[Tensor, "rows K T d"],
    layout: SharedPrefix | PrefixTree,
    scale: float,
) -> Float[Tensor, "rows H T d"]:
    """Attention of packed rows, or of a tree, on a CPU; see the module.

    What is of one size goes through together, padded to the longest; what is not, stretch by stretch, unless stretches are
    so short that calling the kernel takes longer than its work.

    >>> cascade(query, key, value, layout, scale=query.shape[-1] ** -0.5)
    """
    if isinstance(layout, PrefixTree) or not (layout.is_uniform or layout.mean_stretch < _SHORT):
        many = query.shape[1]
        told: Tensor = _Stretches.apply(query, as_many(key, many), as_many(value, many), layout.stretches, scale)
        return told
    num_heads = query.shape[1]
    (own_q, q), (own_k, k), (own_v, v) = (unfold(one, layout) for one in (query, key, value))
    keys, values = as_many(own_k, num_heads), as_many(own_v, num_heads)
    prompts = F.scaled_dot_product_attention(own_q, keys, values, is_causal=True, scale=scale)
    known = prompt_key_mask(layout)
    bias = None if known is None else torch.zeros_like(known, dtype=query.dtype).masked_fill(~known, -torch.inf)
    completions: Tensor = _Cascade.apply(q, k, v, own_k, own_v, bias, scale)
    return fold(prompts, completions, layout)


class _Cascade(torch.autograd.Function):
    """Completions attend to their prompt and to themselves."""

    @staticmethod
    def forward(
        context: Any, q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        num_shared, group = k.shape[2], q.shape[1]
        folded, inside = _by_shared_head(q, num_shared), q.flatten(0, 1)
        mask = None if bias is None else bias[:, None, None].expand(-1, num_shared, folded.shape[2], -1)
        of_prompt, first = _kernel(folded, own_k, own_v, mask, scale)
        k_inside, v_inside = (as_many(one.flatten(0, 1), q.shape[2]) for one in (k, v))
        of_self, second = _kernel(inside, k_inside, v_inside, None, scale, is_causal=True)

        first = _from_shared_head(first[..., None], q)[..., 0]
        second = second.unflatten(0, (-1, group))
        total = torch.logaddexp(first, second)
        merged = _from_shared_head(of_prompt, q) * (first - total).exp()[..., None].to(q.dtype)
        merged += of_self.unflatten(0, (-1, group)) * (second - total).exp()[..., None].to(q.dtype)
        context.save_for_backward(q, k, v, own_k, own_v, bias, merged, total)
        context.scale = scale
        return merged

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, own_k, own_v, bias, merged, total = context.saved_tensors
        num_shared, group, num_heads = k.shape[2], q.shape[1], q.shape[2]
        d_folded, q_folded, o_folded = (_by_shared_head(one, num_shared) for one in (gradient, q, merged))
        mask = None if bias is None else bias[:, None, None].expand(-1, num_shared, q_folded.shape[2], -1)
        by_head = _by_shared_head(total[..., None], num_shared)[..., 0]
        dq, d_own_k, d_own_v = _kernel_backward(
            d_folded, q_folded, o_folded, own_k, own_v, by_head, mask, context.scale
        )
        dq = _from_shared_head(dq, q)

        d_inside, q_inside, o_inside = (one.flatten(0, 1) for one in (gradient, q, merged))
        k_inside, v_inside = (as_many(one.flatten(0, 1), num_heads) for one in (k, v))
        lse = total.flatten(0, 1)
        also, dk, dv = _kernel_backward(
            d_inside, q_inside, o_inside, k_inside, v_inside, lse, None, context.scale, is_causal=True
        )
        dq = dq + also.unflatten(0, (-1, group))
        dk, dv = (one.unflatten(1, (num_shared, -1)).sum(2).unflatten(0, (-1, group)) for one in (dk, dv))
        return dq, dk, dv, d_own_k, d_own_v, None, None


class _Stretches(torch.autograd.Function):
    """A stretch without branches attends to itself, and all that stands below it to the whole of it."""

    @staticmethod
    def forward(
        context: Any, q: Tensor, k: Tensor, v: Tensor, stretches: Sequence[tuple[int, int, int, int]], scale: float
    ) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        merged, total = torch.zeros_like(q, dtype=wide), q.new_full(q.shape[:3], -torch.inf, dtype=wide)
        for at, seen, is_causal in _blocks(stretches):
            part, lse = _kernel(q[at], k[seen], v[seen], None, scale, is_causal=is_causal)
            before = total[at]
            now = torch.logaddexp(before, lse)
            merged[at] = merged[at] * (before - now).exp()[..., None] + part * (lse - now).exp()[..., None]
            total[at] = now
        output = merged.to(q.dtype)
        context.save_for_backward(q, k, v, output, total)
        context.stretches, context.scale = stretches, scale
        return output

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, total = context.saved_tensors
        dq, dk, dv = (torch.zeros_like(one) for one in (q, k, v))
        for at, seen, is_causal in _blocks(context.stretches):
            of_q, of_k, of_v = _kernel_backward(
                gradient[at], q[at], output[at], k[seen], v[seen], total[at], None, context.scale, is_causal=is_causal
            )
            dq[at] += of_q
            dk[seen] += of_k
            dv[seen] += of_v
        return dq, dk, dv, None, None


_Place = tuple[slice, slice, slice]


def _blocks(stretches: Sequence[tuple[int, int, int, int]]) -> Iterator[tuple[_Place, _Place, bool]]:
    """Queries, keys, and whether they are the same stretch."""
    for row, start, end, leave in stretches:
        own = slice(row, row + 1), slice(None), slice(start, end)
        yield own, own, True
        if leave > end:
            yield (*own[:2], slice(end, leave)), own, False


def _by_shared_head(x: Tensor, num_shared: int) -> Tensor:
    """(B, G, H, R, d) as (B, K, G · H/K · R, d): all that attends to the same key heads as one long query."""
    apart: Tensor = x.unflatten(2, (num_shared, -1))
    return apart.permute(0, 2, 1, 3, 4, 5).flatten(2, 4)


def _from_shared_head(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_by_shared_head`, for the (B, G, H, R, d) of `like`."""
    _, group, num_heads, completion, _ = like.shape
    num_shared = x.shape[1]
    apart: Tensor = x.unflatten(2, (group, num_heads // num_shared, completion))
    return apart.permute(0, 2, 1, 3, 4, 5).flatten(2, 3)


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, *, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of PyTorch's own kernel, which `F.scaled_dot_product_attention` does not hand out."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    told: tuple[Tensor, Tensor] = kernel(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)
    return told


def _kernel_backward(
    gradient: Tensor,
    q: Tensor,
    merged: Tensor,
    k: Tensor,
    v: Tensor,
    log_sum_exp: Tensor,
    mask: Tensor | None,
    scale: float,
    *,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    told: tuple[Tensor, Tensor, Tensor] = kernel(
        gradient, q, k, v, merged, log_sum_exp, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    return told
