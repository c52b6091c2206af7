"""Shared prefixes of prefixes: whatever sequences begin alike is worked out once, as in conversations that branch.

Tokens that several sequences share become one node of a tree. Nodes stand in a row in depth-first order, so that everything
below node k has the places k … leave(k) − 1, and a token sees exactly its ancestors: k ≤ q < leave(k).
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from dynascope.nn.shared_prefix.grouping import common_with_the_one_before, sorted_rows, without_padding
from dynascope.nn.shared_prefix.layout import Rule
from dynascope.nn.shared_prefix.varlen import Runs


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """N sequences as a tree of T tokens in one row.

    >>> tree = PrefixTree.of(torch.tensor([[1, 2, 3], [1, 2, 4], [1, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0]]))
    >>> tree.rows
    tensor([[1, 2, 3, 4, 5]])
    """

    rows: Int[Tensor, "1 T"]
    position_ids: Int[Tensor, "1 T"]
    leave: Int[Tensor, " T"]
    """The place behind everything below each token."""
    cell_of: Int[Tensor, "N S"]
    """Where each sequence's tokens are in the row; 0 at padding."""
    mask: Bool[Tensor, "N S"]
    """Where sequences have tokens."""
    block_masks: dict[int | None, Any] = field(default_factory=dict, repr=False)
    """As in `SharedPrefix`."""

    @classmethod
    def of(cls, input_ids: Int[Tensor, "N S"], attention_mask: Shaped[Tensor, "N S"]) -> "PrefixTree":
        """From sequences padded on either side. Raises ValueError for a sequence without a token."""
        mask = attention_mask.bool()
        tokens, lengths = without_padding(input_ids, mask)
        order = sorted_rows(tokens)
        # In dictionary order the tokens that a sequence does not share with the one before are new nodes, depth first.
        shared = torch.cat([lengths.new_zeros(1), common_with_the_one_before(tokens[order], lengths[order])])
        fresh = lengths[order] - shared
        first = fresh.cumsum(0) - fresh
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        cells = tokens.new_zeros(tokens.shape)
        for row, (start, old) in enumerate(zip(first.tolist(), shared.tolist(), strict=True)):
            cells[row, :old] = cells[row - 1, :old]
            cells[row, old:] = start + columns[: len(columns) - old]
        is_token = columns < lengths[order][:, None]
        num = int(fresh.sum())
        last = cells.gather(1, lengths[order][:, None] - 1).expand_as(cells)
        leave = tokens.new_zeros(num).scatter_reduce(0, cells[is_token], last[is_token] + 1, "amax")
        packed = tokens.new_zeros(num).scatter(0, cells[is_token], tokens[order][is_token])
        positions = tokens.new_zeros(num).scatter(0, cells[is_token], columns.expand_as(cells)[is_token])
        compact = torch.zeros_like(cells)
        compact[order] = cells
        cell_of = torch.zeros_like(cells)
        cell_of[mask] = compact[columns < lengths[:, None]]
        return cls(packed[None], positions[None], leave, cell_of, mask)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return 1, self.rows.shape[1]

    @property
    def longest(self) -> int:
        """Positions from the first to the last."""
        return int(self.position_ids.max()) + 1

    @cached_property
    def target_index(self) -> Int[Tensor, "N targets"]:
        """For every token but a sequence's first, the cell that predicts it; 0 where there is none."""
        return self.cell_of[:, :-1].masked_fill(~self.has_target, 0)

    @cached_property
    def has_target(self) -> Bool[Tensor, "N targets"]:
        """Where a token and its predecessor are."""
        return self.mask[:, 1:] & self.mask[:, :-1]

    @property
    def allows(self) -> Rule:
        """Whether the token at place `query` sees that at `key`: its ancestors and itself; there is one row."""
        leave = self.leave
        return lambda row, query, key: (key <= query) & (query < leave[key])

    def dense_mask(self) -> Bool[Tensor, "1 T T"]:
        """`allows` as a mask (query, key)."""
        places = torch.arange(self.rows.shape[1], device=self.rows.device)
        return self.allows(torch.zeros_like(places[:1]), places[:, None], places)[None]

    @cached_property
    def stretches(self) -> list[tuple[int, int, int, int]]:
        """Stretches without branches, in their order: the row, their first place, that behind, and that behind all below."""
        is_first = torch.ones_like(self.leave, dtype=torch.bool)
        is_first[1:] = self.leave[1:] != self.leave[:-1]
        starts = is_first.nonzero().flatten()
        ends = torch.cat([starts[1:], starts.new_tensor([len(self.leave)])])
        return [(0, *one) for one in zip(starts.tolist(), ends.tolist(), self.leave[starts].tolist(), strict=True)]

    @cached_property
    def runs(self) -> Runs:
        """What each sequence adds to those before it, behind the keys of its whole path, for flash attention."""
        numbers = torch.arange(len(self.mask), device=self.rows.device)[:, None].expand_as(self.mask)
        num = len(self.leave)
        owner = numbers.new_full((num,), len(self.mask)).scatter_reduce(
            0, self.cell_of[self.mask], numbers[self.mask], "amin"
        )
        is_own = (owner[self.cell_of] == numbers) & self.mask
        lengths = is_own.sum(1)
        is_key = self.mask & (lengths > 0)[:, None]
        return Runs(self.cell_of[is_own], lengths[lengths > 0], self.cell_of[is_key], is_key.sum(1)[lengths > 0])
