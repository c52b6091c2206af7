"""The rule of shared prompts as one call of flash attention over sequences of different lengths.

Every stretch of queries is a sequence of its own, and its keys are the whole path to it, in order: those of its prompt and its
own. Causal attention of flash attention is aligned at the end of queries and keys, which is the rule; and as keys stand in
the order of positions, a window counts positions.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Runs:
    """Queries and keys of every sequence, as flat cells of packed rows, one sequence behind the other."""

    query_cells: Int[Tensor, " queries"]
    query_lengths: Int[Tensor, " sequences"]
    key_cells: Int[Tensor, " keys"]
    key_lengths: Int[Tensor, " sequences"]

    @cached_property
    def query_bounds(self) -> Int32[Tensor, " bounds"]:
        """Where each sequence's queries begin, and where the last end."""
        return _bounds(self.query_lengths)

    @cached_property
    def key_bounds(self) -> Int32[Tensor, " bounds"]:
        """Likewise of keys."""
        return _bounds(self.key_lengths)

    @cached_property
    def longest(self) -> tuple[int, int]:
        """The most queries and the most keys of a sequence."""
        return int(self.query_lengths.max()), int(self.key_lengths.max())


def flash_varlen(
    query: Float[Tensor, "rows H T d"],
    key: Float[Tensor, "rows K T d"],
    value: Float[Tensor, "rows K T d"],
    runs: Runs,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Float[Tensor, "rows H T d"]:
    """Attention of packed rows by the package `flash_attn` (2.1 or later), on GPUs and in half precision; 0 at padding.

    Raises ValueError where the package is missing.

    >>> flash_varlen(query, key, value, layout.runs, scale=query.shape[-1] ** -0.5)
    """
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        raise ValueError("backend 'flash_varlen' needs the package flash_attn: pip install flash-attn") from None
    q, k, v = (one.transpose(1, 2).flatten(0, 1) for one in (query, key, value))
    mixed = flash_attn_varlen_func(
        q[runs.query_cells],
        k[runs.key_cells],
        v[runs.key_cells],
        runs.query_bounds,
        runs.key_bounds,
        *runs.longest,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=soft_cap or 0.0,
    )
    cells: Tensor = torch.zeros_like(q).index_copy(0, runs.query_cells, mixed)
    packed: Tensor = cells.unflatten(0, (query.shape[0], query.shape[2]))
    return packed.transpose(1, 2)


def _bounds(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
