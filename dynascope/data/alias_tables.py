"""Drawing from many laws at constant cost a draw: Walker's alias method, for whole tensors at once."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


class AliasTables:
    """Draws from the laws in the rows of a matrix, by two look-ups each, whatever the number of tokens.

    A draw takes a column by even chances and keeps it with the row's own chance for it, or takes the column's alias. The
    tables cost tokens · rows · tokens operations once. Source: Walker 1977, An efficient method for generating discrete
    random variables with general distributions.

    >>> tables = AliasTables(torch.tensor([[0.25, 0.75]]))
    >>> tables.keep, tables.alias
    (tensor([[0.5000, 1.0000]], dtype=torch.float64), tensor([[1, 1]]))
    >>> tables.draw(rows, *columns_and_chances(rows.shape, 2, generator))
    """

    def __init__(self, laws: Float[Tensor, "rows tokens"]) -> None:
        size = laws.shape[1]
        mass, rows = laws.double() * size, torch.arange(len(laws), device=laws.device)
        self.keep, self.alias = torch.ones_like(mass), torch.arange(size, device=laws.device).repeat(len(laws), 1)
        is_full = torch.zeros_like(mass, dtype=torch.bool)
        for _ in range(size - 1):
            least = mass.masked_fill(is_full, torch.inf).argmin(1)
            most = mass.masked_fill(is_full, -torch.inf).argmax(1)
            taken = mass[rows, least]
            self.keep[rows, least], self.alias[rows, least], is_full[rows, least] = taken, most, True
            mass[rows, most] -= 1 - taken

    def to(self, device: torch.device | str) -> "AliasTables":
        """The same tables on another device."""
        moved = AliasTables.__new__(AliasTables)
        moved.keep, moved.alias = self.keep.to(device), self.alias.to(device)
        return moved

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
