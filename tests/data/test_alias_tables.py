"""Alias tables draw exactly what their laws say."""

import torch

from dynascope.data import dirichlet_bigram
from dynascope.data.alias_tables import AliasTables, columns_and_chances


def test_tables_by_hand() -> None:
    # Of three columns, b has 3 · 0.1 and c 3 · 0.2 of its own; both fill up from a.
    tables = AliasTables.of(torch.tensor([[0.7, 0.1, 0.2], [0.0, 0.0, 1.0]]))
    torch.testing.assert_close(tables.keep, torch.tensor([[1.0, 0.3, 0.6], [0.0, 0.0, 1.0]], dtype=torch.float64))
    assert tables.alias[0, 1:].tolist() == [0, 0]
    assert tables.alias[1, :2].tolist() == [2, 2]
    drawn = tables.draw(torch.tensor([0, 0, 1]), torch.tensor([1, 1, 0]), torch.tensor([0.29, 0.31, 0.0]).double())
    assert drawn.tolist() == [1, 0, 2]


def test_tables_give_back_the_laws() -> None:
    laws = dirichlet_bigram(23, seed=5).transitions
    laws = torch.where(laws < 0.005, 0.0, laws)
    laws = laws / laws.sum(1, keepdim=True)
    tables = AliasTables.of(laws)
    given = (tables.keep / 23).scatter_add(1, tables.alias, (1 - tables.keep) / 23)
    torch.testing.assert_close(given, laws, rtol=0, atol=1e-15)
    assert (given[laws == 0] == 0).all()


def test_columns_and_chances_are_even_and_their_own() -> None:
    columns, chances = columns_and_chances((20_000,), 7, torch.Generator().manual_seed(0))
    counts = torch.bincount(columns, minlength=7)
    assert len(counts) == 7
    assert (counts - 20_000 / 7).abs().max() < 4 * (20_000 / 7) ** 0.5
    assert 0 <= float(chances.min()) < 0.001
    assert 0.999 < float(chances.max()) < 1
    assert abs(float(torch.corrcoef(torch.stack([columns.double(), chances]))[0, 1])) < 0.03
