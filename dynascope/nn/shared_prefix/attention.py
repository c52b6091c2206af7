"""Attention of packed rows: a prompt sees itself, a completion the whole prompt and itself, never another completion.

Exact ways, all forward and backward:

- `cascade`, on CPUs, computes what completions see of the prompt and of themselves apart and merges both by their
  log-sum-exps, so that keys and values of the prompt are never copied;
- `two_call`, on every device, lets completions attend to copies of the prompt before them (arXiv 2506.05433, section 2);
- `dense_mask`, on every device, masks a square of scores;
- `flex` compiles the same rule by FlexAttention, on GPUs;
- `flash_varlen` is one call of the package flash_attn, on GPUs.
"""

from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dynascope.nn.shared_prefix.arrangement import as_many, fold, prompt_key_mask, unfold
from dynascope.nn.shared_prefix.cascade import cascade, has_kernels
from dynascope.nn.shared_prefix.layout import SharedPrefix
from dynascope.nn.shared_prefix.tree import PrefixTree
from dynascope.nn.shared_prefix.varlen import flash_varlen

Backend: TypeAlias = Literal["auto", "cascade", "two_call", "dense_mask", "flex", "flash_varlen"]

_SMALL = 96
"""Columns up to which a mask costs less than anything cleverer."""
_VERSATILE = ("dense_mask", "flex", "flash_varlen")
"""What takes windows and soft caps."""


def grouped_attention(
    query: Float[Tensor, "B H T d"],
    key: Float[Tensor, "B K T d"],
    value: Float[Tensor, "B K T e"],
    layout: SharedPrefix | PrefixTree,
    *,
    backend: Backend = "auto",
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Float[Tensor, "B H T e"]:
    """Attention by the rule of shared prompts, after positions went into queries and keys; H is a multiple of K.

    `scale` defaults to 1/√d. `window` counts positions, not columns: a token sees so many before it, itself included;
    `soft_cap` holds scores between its negative and itself by a tanh (2408.00118, section 2). Both take `dense_mask`, `flex` or
    `flash_varlen`. What comes out at padding means nothing.

    A `PrefixTree` takes every backend but `two_call`. Raises ValueError for tensors of another layout, a backend that cannot
    do it, or another name.

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
        backend = choose(query, value, layout, window, soft_cap)
    if (window is not None or soft_cap is not None) and backend not in _VERSATILE:
        what = "sliding window" if window is not None else "soft cap"
        raise ValueError(f"backend {backend!r} has no {what}; use {', '.join(_VERSATILE)} or auto")
    if backend == "dense_mask":
        return _dense(query, key, value, layout, scale, window, soft_cap)
    if backend == "flex":
        return _flex(query, key, value, layout, scale, window, soft_cap)
    if backend == "flash_varlen":
        return flash_varlen(query, key, value, layout.runs, scale, window, soft_cap)
    if backend == "two_call":
        if isinstance(layout, PrefixTree):
            raise ValueError("backend 'two_call' knows prompts and completions, not trees; use 'auto'")
        return _two_call(query, key, value, layout, scale)
    if backend == "cascade":
        if not has_kernels(query, value):
            raise ValueError("backend 'cascade' needs queries on a CPU and values as wide as they; use 'auto'")
        return cascade(query, key, value, layout, scale)
    raise ValueError(f"there is no backend {backend!r}; there are {', '.join(get_args(Backend))}")


def choose(
    query: Tensor,
    value: Tensor,
    layout: SharedPrefix | PrefixTree,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Backend:
    """The backend that `auto` takes: by device, size, and what is asked for.

    >>> choose(query, value, layout, window=128)
    'dense_mask'
    """
    if query.device.type == "cuda":
        return "flex"
    if window is not None or soft_cap is not None or layout.shape[1] <= _SMALL:
        return "dense_mask"
    if has_kernels(query, value):
        return "cascade"
    return "dense_mask" if isinstance(layout, PrefixTree) else "two_call"


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SharedPrefix | PrefixTree,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    mask = layout.dense_mask()
    if window is not None:
        positions = layout.position_ids
        mask = mask & (positions[:, :, None] - positions[:, None, :] < window)
    key, value = as_many(key, query.shape[1]), as_many(value, query.shape[1])
    if soft_cap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None], scale=scale)
    scores = soft_cap * ((query @ key.mT) * (scale / soft_cap)).tanh()
    wide = torch.promote_types(query.dtype, torch.float32)
    return scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1, dtype=wide).to(query.dtype) @ value


def _two_call(query: Tensor, key: Tensor, value: Tensor, layout: SharedPrefix, scale: float) -> Tensor:
    num_heads, (longest, group, completion) = query.shape[1], layout.sizes
    key, value = as_many(key, num_heads), as_many(value, num_heads)
    (own_q, q), (own_k, k), (own_v, v) = (unfold(one, layout) for one in (query, key, value))
    prompts = F.scaled_dot_product_attention(own_q, own_k, own_v, is_causal=True, scale=scale)

    def behind_prompt(prompt: Tensor, inside: Tensor) -> Tensor:
        copies = prompt[:, None].expand(-1, group, *prompt.shape[1:])
        return torch.cat([copies, inside], 3).flatten(0, 1)

    causal = torch.ones(completion, completion, dtype=torch.bool, device=query.device).tril()
    known = prompt_key_mask(layout)
    seen = torch.ones(1, 1, longest, dtype=torch.bool, device=query.device) if known is None else known[:, None]
    whole = torch.cat([seen.expand(-1, completion, -1), causal.expand(len(seen), -1, -1)], 2)
    whole = whole if known is None else whole.repeat_interleave(group, 0)
    completions = F.scaled_dot_product_attention(
        q.flatten(0, 1), behind_prompt(own_k, k), behind_prompt(own_v, v), attn_mask=whole[:, None], scale=scale
    )
    return fold(prompts, completions.unflatten(0, (-1, group)), layout)


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SharedPrefix | PrefixTree,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # One mask a layout serves all layers of a model.
    if window not in layout.block_masks:
        allows, positions, columns = layout.allows, layout.position_ids, layout.shape[1]
        reach = columns if window is None else window
        layout.block_masks[window] = create_block_mask(
            lambda row, _, at, seen: allows(row, at, seen) & (positions[row, at] - positions[row, seen] < reach),
            len(query),
            None,
            columns,
            columns,
            device=str(query.device),
        )
    attend: Any = _compiled() if query.device.type == "cuda" else flex_attention
    is_grouped = query.shape[1] != key.shape[1]
    capped = None if soft_cap is None else lambda score, *_: soft_cap * torch.tanh(score / soft_cap)
    output: Tensor = attend(
        query, key, value, capped, block_mask=layout.block_masks[window], scale=scale, enable_gqa=is_grouped
    )
    return output


_compiled_attention: list[Any] = []


def _compiled() -> Any:
    """FlexAttention compiled once, for packed rows of every length."""
    from torch.nn.attention.flex_attention import flex_attention

    if not _compiled_attention:
        _compiled_attention.append(torch.compile(flex_attention, dynamic=True))
    return _compiled_attention[0]
