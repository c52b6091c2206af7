"""Attention of packed rows: a prompt sees itself, a completion the whole prompt and itself, never another completion.

Three exact ways on every device, and a fourth for compilers:

- `cascade` computes what completions see of the prompt and of themselves apart and merges both by their log-sum-exps, so
  that keys and values of the prompt are never copied;
- `two_call` lets completions attend to copies of the prompt before them (arXiv 2506.05433, section 2);
- `dense_mask` masks a square of scores;
- `flex` compiles the same rule by FlexAttention, where there is a GPU.
"""

from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dynascope.nn.shared_prefix.layout import SharedPrefix
from dynascope.nn.shared_prefix.tree import PrefixTree

Backend: TypeAlias = Literal["auto", "cascade", "two_call", "dense_mask", "flex"]

_SMALL = 96
"""Columns up to which a mask costs less than anything cleverer."""


def grouped_attention(
    query: Float[Tensor, "B H T d"],
    key: Float[Tensor, "B K T d"],
    value: Float[Tensor, "B K T e"],
    layout: SharedPrefix | PrefixTree,
    *,
    backend: Backend = "auto",
    scale: float | None = None,
    window: int | None = None,
) -> Float[Tensor, "B H T e"]:
    """Attention by the rule of shared prompts, after positions went into queries and keys; H is a multiple of K.

    `scale` defaults to 1/√d. `window` counts positions, not columns: a token sees so many before it, itself included;
    it takes `dense_mask` or `flex`. What comes out at padding means nothing.

    A `PrefixTree` takes `dense_mask` alone. Raises ValueError for tensors of another layout, a backend that cannot do it, or
    another name.

    >>> grouped_attention(query, key, value, layout, backend="cascade")
    """
    rows, columns = layout.shape
    if (query.shape[0], query.shape[2]) != (rows, columns):
        raise ValueError(
            f"queries have {query.shape[0]} rows of {query.shape[2]} columns, but the layout packs {rows} rows of {columns}"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if window is not None and window >= layout.longest:
        window = None  # nothing is that far away
    if backend == "auto":
        backend = choose(query, value, layout, window)
    if window is not None and backend not in ("dense_mask", "flex"):
        raise ValueError(f"backend {backend!r} has no sliding window; use 'dense_mask', 'flex' or 'auto'")
    if backend == "dense_mask":
        mask = layout.dense_mask() if window is None else layout.dense_mask() & _near(layout, window)
        key, value = _as_many(key, query.shape[1]), _as_many(value, query.shape[1])
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None], scale=scale)
    if isinstance(layout, PrefixTree):
        raise ValueError(f"backend {backend!r} knows prompts and completions, not trees; use 'dense_mask' or 'auto'")
    if backend == "flex":
        return _flex(query, key, value, layout, scale, window)
    if backend == "two_call":
        return _two_call(query, key, value, layout, scale)
    if backend == "cascade":
        if not _has_log_sum_exp(query, value):
            raise ValueError("backend 'cascade' needs queries on a CPU and values as wide as they; use 'auto'")
        return _cascade(query, key, value, layout, scale)
    raise ValueError(f"there is no backend {backend!r}; there are auto, cascade, two_call, dense_mask and flex")


def choose(query: Tensor, value: Tensor, layout: SharedPrefix | PrefixTree, window: int | None = None) -> Backend:
    """The backend that `auto` takes: by device, size, and what is asked for."""
    if isinstance(layout, PrefixTree):
        return "dense_mask"
    if query.device.type == "cuda":
        return "flex"
    if window is not None or layout.num_columns <= _SMALL:
        return "dense_mask"
    return "cascade" if _has_log_sum_exp(query, value) else "two_call"


def _has_log_sum_exp(query: Tensor, value: Tensor) -> bool:
    return query.device.type == "cpu" and query.shape[-1] == value.shape[-1]


def _as_many(x: Tensor, num_heads: int) -> Tensor:
    """Key or value heads repeated for the query heads that share them."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], 1)


def _near(layout: SharedPrefix | PrefixTree, window: int) -> Tensor:
    positions = layout.position_ids
    return positions[:, :, None] - positions[:, None, :] < window


def _unfold(x: Tensor, layout: SharedPrefix) -> tuple[Tensor, Tensor]:
    """Packed (B, H, T, d) as prompts (B, H, P, d) and completions (B, G, H, R, d), padded to the longest of each."""
    prompt, group, completion = layout.sizes
    if not layout.is_uniform:
        rows = torch.arange(len(x), device=x.device)[:, None]
        x = x.transpose(1, 2)[rows, layout.unfold_index].transpose(1, 2)
    inside = x[:, :, prompt:].unflatten(2, (group, completion))
    return x[:, :, :prompt], inside.transpose(1, 2)


def _fold(prompts: Tensor, completions: Tensor, layout: SharedPrefix) -> Tensor:
    """The inverse of `_unfold`."""
    inside = completions.transpose(1, 2).flatten(2, 3)
    both = torch.cat([prompts, inside], 2)
    if layout.is_uniform:
        return both
    rows = torch.arange(len(both), device=both.device)[:, None]
    return both.transpose(1, 2)[rows, layout.fold_index].transpose(1, 2)


def _prompt_key_mask(layout: SharedPrefix) -> Tensor | None:
    """Where padded prompts have keys, (B, P); None where all are as long."""
    longest = layout.sizes[0]
    if bool((layout.prompt_lengths == longest).all()):
        return None
    return torch.arange(longest, device=layout.prompt_lengths.device) < layout.prompt_lengths[:, None]


def _two_call(query: Tensor, key: Tensor, value: Tensor, layout: SharedPrefix, scale: float) -> Tensor:
    num_heads, (longest, group, completion) = query.shape[1], layout.sizes
    key, value = _as_many(key, num_heads), _as_many(value, num_heads)
    (own_q, q), (own_k, k), (own_v, v) = (_unfold(one, layout) for one in (query, key, value))
    prompts = F.scaled_dot_product_attention(own_q, own_k, own_v, is_causal=True, scale=scale)

    def behind_prompt(prompt: Tensor, inside: Tensor) -> Tensor:
        copies = prompt[:, None].expand(-1, group, *prompt.shape[1:])
        return torch.cat([copies, inside], 3).flatten(0, 1)

    causal = torch.ones(completion, completion, dtype=torch.bool, device=query.device).tril()
    known = _prompt_key_mask(layout)
    seen = torch.ones(1, 1, longest, dtype=torch.bool, device=query.device) if known is None else known[:, None]
    whole = torch.cat([seen.expand(-1, completion, -1), causal.expand(len(seen), -1, -1)], 2)
    whole = whole if known is None else whole.repeat_interleave(group, 0)
    completions = F.scaled_dot_product_attention(
        q.flatten(0, 1), behind_prompt(own_k, k), behind_prompt(own_v, v), attn_mask=whole[:, None], scale=scale
    )
    return _fold(prompts, completions.unflatten(0, (-1, group)), layout)


def _cascade(query: Tensor, key: Tensor, value: Tensor, layout: SharedPrefix, scale: float) -> Tensor:
    num_heads = query.shape[1]
    (own_q, q), (own_k, k), (own_v, v) = (_unfold(one, layout) for one in (query, key, value))
    keys, values = _as_many(own_k, num_heads), _as_many(own_v, num_heads)
    prompts = F.scaled_dot_product_attention(own_q, keys, values, is_causal=True, scale=scale)
    known = _prompt_key_mask(layout)
    bias = None if known is None else torch.zeros_like(known, dtype=query.dtype).masked_fill(~known, -torch.inf)
    completions: Tensor = _Cascade.apply(q, k, v, own_k, own_v, bias, scale)
    return _fold(prompts, completions, layout)


class _Cascade(torch.autograd.Function):
    """Completions attend to their prompt and to themselves; both parts meet in one softmax.

    With l₁ and l₂ the log-sum-exps of the parts and l = log(exp l₁ + exp l₂), the output is exp(l₁ − l) O₁ + exp(l₂ − l) O₂.
    Backward, each part's kernel is given the merged output and l, and so works with the probabilities of the whole softmax.
    """

    @staticmethod
    def forward(
        context: Any, q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        num_shared, group = k.shape[2], q.shape[1]
        folded, inside = _by_shared_head(q, num_shared), q.flatten(0, 1)
        mask = None if bias is None else bias[:, None, None].expand(-1, num_shared, folded.shape[2], -1)
        of_prompt, first = _kernel(folded, own_k, own_v, mask, scale)
        k_inside, v_inside = (_as_many(one.flatten(0, 1), q.shape[2]) for one in (k, v))
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
        k_inside, v_inside = (_as_many(one.flatten(0, 1), num_heads) for one in (k, v))
        lse = total.flatten(0, 1)
        also, dk, dv = _kernel_backward(
            d_inside, q_inside, o_inside, k_inside, v_inside, lse, None, context.scale, is_causal=True
        )
        dq = dq + also.unflatten(0, (-1, group))
        dk, dv = (one.unflatten(1, (num_shared, -1)).sum(2).unflatten(0, (-1, group)) for one in (dk, dv))
        return dq, dk, dv, d_own_k, d_own_v, None, None


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


def _flex(query: Tensor, key: Tensor, value: Tensor, layout: SharedPrefix, scale: float, window: int | None) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # One mask a layout serves all layers of a model.
    if window not in layout.block_masks:
        segments, positions, columns = layout.segment_ids, layout.position_ids, layout.num_columns
        reach = columns if window is None else window
        layout.block_masks[window] = create_block_mask(
            lambda row, _, at, seen: (
                (at == seen)
                | (seen <= at)
                & (segments[row, at] >= 0)
                & ((segments[row, seen] == 0) | (segments[row, seen] == segments[row, at]))
                & (positions[row, at] - positions[row, seen] < reach)
            ),
            len(query),
            None,
            columns,
            columns,
            device=str(query.device),
        )
    attend: Any = _compiled() if query.device.type == "cuda" else flex_attention
    is_grouped = query.shape[1] != key.shape[1]
    output: Tensor = attend(
        query, key, value, block_mask=layout.block_masks[window], scale=scale, enable_gqa=is_grouped
    )
    return output


_compiled_attention: list[Any] = []


def _compiled() -> Any:
    """FlexAttention compiled once, for packed rows of every length."""
    from torch.nn.attention.flex_attention import flex_attention

    if not _compiled_attention:
        _compiled_attention.append(torch.compile(flex_attention, dynamic=True))
    return _compiled_attention[0]
