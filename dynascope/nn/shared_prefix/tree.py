"""Shared prefixes of prefixes: whatever sequences begin alike is worked out once, as in conversations that branch.

Tokens that several sequences share become one node of a tree. Nodes stand in a row in depth-first order, so that everything
below node k has the places k … leave(k) − 1, and a token sees exactly its ancestors: k ≤ q < leave(k).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from dynascope.nn.shared_prefix.grouping import common_with_the_one_before, sorted_rows, without_padding


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
        has_both = self.mask[:, 1:] & self.mask[:, :-1]
        return self.cell_of[:, :-1].masked_fill(~has_both, 0)

    def dense_mask(self) -> Bool[Tensor, "1 T T"]:
        """Which token (query) sees which (key): its ancestors and itself."""
        places = torch.arange(self.rows.shape[1], device=self.rows.device)
        query, key = places[:, None], places
        return ((key <= query) & (query < self.leave))[None]
