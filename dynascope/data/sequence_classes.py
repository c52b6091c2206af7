"""Sequences whose last token asks and whose bag of context tokens tells the next one (2305.16380)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from dynascope.data.alias_tables import AliasTables, columns_and_chances

LIGHTEST = 0.1
"""Unnormalized weight of the rarest distinct token of a class; the heaviest has 1, as every common token has."""


@dataclass(frozen=True)
class Population:
    """What sequences of infinite length would show: one row a class."""

    probs: Float[Tensor, "classes vocab"]
    """P(l|n), the law of a context token given the next one."""
    queries: Int[Tensor, " classes"]
    """The query psi(n) of each class."""
    targets: Int[Tensor, " classes"]
    """The next token n of each class."""


@dataclass(frozen=True)
class SequenceClass:
    """One next token, the query that goes before it, and the law of its context."""

    query: int
    target: int
    probs: Float[Tensor, " vocab"]


class SequenceClassData(IterableDataset[tuple[Tensor, Tensor]]):
    """Batches of `length` tokens (context, then the query) and of the token that follows, without end.

    Each of `num_last` queries has `num_next_per_last` next tokens, which are the classes. Of the context's tokens
    `num_common` occur with every class, `num_common_per_last` with every class of one query, and `num_unique` with one
    class only: these are its distinct tokens, with weights rising from 0.1 to 1, while common ones have 1. Token numbers:
    common, common of each query, distinct of each class, queries, next tokens. Context tokens are independent draws, so
    that their order says nothing; `sample_counts` leaves it out altogether. Every worker of a DataLoader draws its own.

    Source: 2305.16380, section 3 and its synthetic experiments (where `num_common_per_last` is 0).

    Raises ValueError for a number below 1 (`num_common` and `num_common_per_last`: below 0), or a length below 2.

    >>> data = SequenceClassData(num_last=2, num_next_per_last=1)
    >>> tokens, targets = next(iter(torch.utils.data.DataLoader(data, batch_size=None)))
    >>> tokens.shape, targets.shape
    (torch.Size([128, 128]), torch.Size([128]))
    """

    def __init__(
        self,
        num_last: int = 2,
        num_next_per_last: int = 2,
        *,
        num_common: int = 10,
        num_common_per_last: int = 0,
        num_unique: int = 10,
        length: int = 128,
        batch_size: int = 128,
        seed: int = 0,
    ) -> None:
        if min(num_last, num_next_per_last, num_unique, batch_size) < 1 or min(num_common, num_common_per_last) < 0:
            raise ValueError(
                "num_last, num_next_per_last, num_unique and batch_size start at 1, numbers of common at 0"
            )
        if length < 2:
            raise ValueError(f"length={length}: a sequence has at least one context token and the query")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        num_classes = num_last * num_next_per_last
        per_last = num_common + torch.arange(num_last * num_common_per_last).view(num_last, num_common_per_last)
        first_unique = num_common + per_last.numel()
        unique = first_unique + torch.arange(num_classes * num_unique).view(num_classes, num_unique)
        first_query = first_unique + unique.numel()
        self.vocab = first_query + num_last + num_classes
        asked = torch.arange(num_classes) // num_next_per_last
        weights = torch.zeros(num_classes, self.vocab, dtype=torch.float64)
        weights[:, :num_common] = 1.0
        weights.scatter_(1, per_last[asked], 1.0)
        weights.scatter_(1, unique, torch.linspace(LIGHTEST, 1.0, num_unique).double().expand(num_classes, -1))
        self.unique: Int[Tensor, "classes num_unique"] = unique
        """The distinct tokens of each class, rarest first."""
        self._population = Population(
            weights / weights.sum(1, keepdim=True),
            first_query + asked,
            first_query + num_last + torch.arange(num_classes),
        )

        self._tables = AliasTables.of(self._population.probs)

    def population(self) -> Population:
        """P(l|n), psi(n) and n of every class."""
        return self._population

    @property
    def classes(self) -> list[SequenceClass]:
        """The classes one by one."""
        whole = self._population
        rows = zip(whole.queries.tolist(), whole.targets.tolist(), whole.probs, strict=True)
        return [SequenceClass(query, target, probs) for query, target, probs in rows]

    @property
    def is_common(self) -> Bool[Tensor, " vocab"]:
        """Tokens that the contexts of several classes share."""
        return (self._population.probs > 0).sum(0) > 1

    @property
    def is_distinct(self) -> Bool[Tensor, " vocab"]:
        """Tokens that the context of one class alone has."""
        return (self._population.probs > 0).sum(0) == 1

    def sample(
        self, count: int, generator: torch.Generator
    ) -> tuple[Int[Tensor, "count length"], Int[Tensor, " count"]]:
        """So many sequences with their next tokens, classes with equal chances."""
        chosen, context = self._draw(count, generator)
        tokens = torch.cat([context, self._population.queries[chosen, None]], dim=1)
        return tokens, self._population.targets[chosen]

    def sample_counts(
        self, count: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "count vocab"], Int[Tensor, " count"], Int[Tensor, " count"]]:
        """The same as how often each token is in the context, the query, and the next token."""
        chosen, context = self._draw(count, generator)
        counts = torch.zeros(count, self.vocab).scatter_add_(1, context, torch.ones(context.shape))
        return counts, self._population.queries[chosen], self._population.targets[chosen]

    def _draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(self._population.probs), (count,), generator=generator)
        drawn = columns_and_chances((count, self.length - 1), self.vocab, generator)
        return chosen, self._tables.draw(chosen[:, None], *drawn)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = get_worker_info()
        generator = torch.Generator().manual_seed(self.seed + (1_000_003 * worker.id if worker else 0))
        while True:
            yield self.sample(self.batch_size, generator)
