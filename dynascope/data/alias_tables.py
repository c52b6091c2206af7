"""Drawing from many laws at constant cost a draw: Walker's alias method, for whole tensors at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class AliasTables:
    """Draws from the laws in the rows of a matrix, by two look-ups each, whatever the number of tokens.

    A draw takes a column by even chances and keeps it with the row's own chance for it, or takes the column's alias.
    Source: Walker 1977, An efficient method for generating discrete random variables with general distributions.

    >>> tables = AliasTables.of(torch.tensor([[0.25, 0.75]]))
    >>> tables.keep, tables.alias
    (tensor([[0.5000, 1.0000]], dtype=torch.float64), tensor([[1, 1]]))
    >>> tables.draw(rows, *columns_and_chances(rows.shape, 2, generator))
    """

    keep: Float[Tensor, "rows tokens"]
    alias: Int[Tensor, "rows tokens"]

    @classmethod
    def of(cls, laws: Float[Tensor, "rows tokens"]) -> "AliasTables":
        """The tables of laws that sum to 1, in rows · tokens² operations."""
        size = laws.shape[1]
        mass, rows = laws.double() * size, torch.arange(len(laws), device=laws.device)
        keep, alias = torch.ones_like(mass), torch.arange(size, device=laws.device).repeat(len(laws), 1)
        is_full = torch.zeros_like(mass, dtype=torch.bool)
        for _ in range(size - 1):
            least = mass.masked_fill(is_full, torch.inf).argmin(1)
            most = mass.masked_fill(is_full, -torch.inf).argmax(1)
            taken = mass[rows, least]
            keep[rows, least], alias[rows, least], is_full[rows, least] = taken, most, True
            mass[rows, most] -= 1 - taken
        return cls(keep, alias)

    def to(self, device: torch.device | str) -> "AliasTables":
        """The same tables on another device."""
        return AliasTables(self.keep.to(device), self.alias.to(device))

    def draw(
        self, rows: Int[Tensor, "*#draws"], columns: Int[Tensor, "*draws"], chances: Float[Tensor, "*draws"]
    ) -> Int[Tensor, "*draws"]:
        """One token from the law of each row, made of what `columns_and_chances` gives."""
        cells = torch.add(columns, rows, alpha=self.keep.shape[1])
        return torch.where(chances < self.keep.take(cells), columns, self.alias.take(cells))


def columns_and_chances(
    shape: Sequence[int],
    num_tokens: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Int[Tensor, "..."], Float[Tensor, "..."]]:
    """Even columns below `num_tokens` and even chances below 1: the whole part of one random number, and what is left.

    >>> columns, chances = columns_and_chances((257, 512), 66, generator)
    """
    chances = torch.rand(*shape, dtype=torch.float64, device=device, generator=generator).mul_(num_tokens)
    columns = chances.long()
    return columns, chances.sub_(columns)
