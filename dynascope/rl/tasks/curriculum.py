"""Queries of the right difficulty: neither so hard that no answer is right nor so easy that all are (arXiv 2503.18892).

A group of G answers teaches only when it holds both right and wrong ones: with probability 1 − p^G − (1 − p)^G.
"""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.data import Sampler


def learnable_share(pass_rate: Float[Tensor, "*queries"] | float, num_samples: int) -> Float[Tensor, "*queries"]:
    """How often a group of answers to a query holds both right and wrong ones; symmetric in p, 0 at both ends.

    Raises ValueError for a rate outside [0, 1], or no answer.

    >>> learnable_share(0.05, 8)
    tensor(0.3366)
    """
    p = torch.as_tensor(pass_rate, dtype=torch.float64)
    if num_samples < 1 or not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError(f"pass rates must lie between 0 and 1, and num_samples={num_samples} be at least 1")
    return (1 - p**num_samples - (1 - p) ** num_samples).float()


def recommend_level(
    pass_rates: Mapping[str, Float[Tensor, " queries"]], num_samples: int = 8
) -> tuple[str, dict[str, float]]:
    """The level of difficulty that teaches a model most, and the mean learnable share of each level.

    `pass_rates` are the base model's, by level. Rates estimated from a few answers are pulled towards the ends, which makes
    every level look less learnable alike; the order is what counts. Levels that teach equally go to the harder one.

    Raises ValueError when a level is empty or nothing at all can be learned.

    >>> recommend_level({"easy": torch.tensor([1.0, 0.9]), "hard": torch.tensor([0.3, 0.1])})[0]
    'hard'
    """
    if not pass_rates or any(not len(rates) for rates in pass_rates.values()):
        raise ValueError("every level needs the pass rates of some queries")
    shares = {level: float(learnable_share(rates, num_samples).mean()) for level, rates in pass_rates.items()}
    if max(shares.values()) == 0:
        raise ValueError("no level holds a query with both right and wrong answers; take easier ones, or harder ones")
    means = {level: float(rates.mean()) for level, rates in pass_rates.items()}
    return max(shares, key=lambda level: (round(shares[level], 6), -means[level])), shares


def in_band(pass_rate: Float[Tensor, " queries"], low: float = 1 / 8, high: float = 7 / 8) -> Bool[Tensor, " queries"]:
    """Which queries have a pass rate within [low, high].

    Raises ValueError unless 0 <= low <= high <= 1.

    >>> in_band(torch.tensor([0.0, 0.5, 1.0]))
    tensor([False,  True, False])
    """
    if not 0 <= low <= high <= 1:
        raise ValueError(f"the band [{low}, {high}] must lie within [0, 1], its lower end first")
    return (pass_rate >= low - 1e-6) & (pass_rate <= high + 1e-6)


class QueryDifficultySelector(Sampler[int]):
    """Draws queries whose pass rate lies in a band, and learns from rollouts which ones do.

    Args:
        pass_rate: The base model's, of every query of the data set, or static levels turned into rates.
        low, high: The band.
        memory: Share of the old estimate that a new group of answers leaves; 1 never learns (a static choice), 0 forgets.
        explore: Queries from outside the band in a pass, as a share of those within: what was too hard, or fell out by
            chance, comes back only by being asked again. 0 for a static choice.
        seed: Of the order; each pass over it has another one.

    It is a PyTorch sampler; `indices()` goes into `Dataset.select` of Hugging Face and `torch.utils.data.Subset`. When
    nothing lies in the band the queries nearest to it are drawn, so that training goes on.

    >>> selector = QueryDifficultySelector(base_pass_rates, low=0.1, high=0.9)
    >>> loader = DataLoader(queries, batch_size=64, sampler=selector)
    >>> selector.update(places, correct)  # after each rollout
    """

    def __init__(
        self,
        pass_rate: Float[Tensor, " queries"],
        *,
        low: float = 1 / 8,
        high: float = 7 / 8,
        memory: float = 0.5,
        explore: float = 0.1,
        seed: int = 0,
    ) -> None:
        if not len(pass_rate) or not bool(((pass_rate >= 0) & (pass_rate <= 1)).all()):
            raise ValueError("pass rates must lie between 0 and 1, of one query at least")
        if not 0 <= memory <= 1 or not 0 <= explore <= 1:
            raise ValueError(f"memory={memory} and explore={explore} are shares: between 0 and 1")
        in_band(pass_rate, low, high)
        self.pass_rate = pass_rate.float().clone()
        self.low, self.high, self.memory, self.explore = low, high, memory, explore
        self._generator = torch.Generator().manual_seed(seed)

    @classmethod
    def of_answers(cls, correct: Bool[Tensor, "queries samples"], **settings: float) -> "QueryDifficultySelector":
        """From answers of the base model."""
        return cls(correct.float().mean(1), **settings)  # type: ignore[arg-type]

    def indices(self) -> list[int]:
        """The queries in the band now, in their order; those nearest to it where there is none."""
        chosen = in_band(self.pass_rate, self.low, self.high)
        if not bool(chosen.any()):
            away = torch.maximum(self.low - self.pass_rate, self.pass_rate - self.high)
            chosen = away <= away.min() + 1e-6
        return chosen.nonzero().flatten().tolist()

    def update(self, queries: Sequence[int], correct: Bool[Tensor, "queries samples"]) -> None:
        """Learn from answers to queries, by their places in the data set; a query that comes twice counts twice.

        Raises ValueError for queries without answers, and for places outside the data set.
        """
        if correct.ndim != 2 or not correct.shape[1]:
            raise ValueError(f"correct has shape {tuple(correct.shape)}; a query's rate needs an answer at least")
        outside = [query for query in queries if not 0 <= query < len(self.pass_rate)]
        if outside:
            raise ValueError(f"queries {outside[:5]} are not among the {len(self.pass_rate)} of the data set")
        for query, rate in zip(queries, correct.float().mean(1).tolist(), strict=True):
            self.pass_rate[query] = self.memory * self.pass_rate[query] + (1 - self.memory) * rate

    def learnable(self, num_samples: int = 8) -> float:
        """The mean learnable share of what is drawn."""
        return float(learnable_share(self.pass_rate[self.indices()], num_samples).mean())

    def __len__(self) -> int:
        chosen = self.indices()
        return len(chosen) + self._num_explored(len(chosen))

    def __iter__(self) -> Iterator[int]:
        chosen = torch.tensor(self.indices())
        others = torch.ones_like(self.pass_rate, dtype=torch.bool).index_fill(0, chosen, False).nonzero().flatten()
        explored = others[torch.randperm(len(others), generator=self._generator)[: self._num_explored(len(chosen))]]
        drawn = torch.cat([chosen, explored])
        yield from drawn[torch.randperm(len(drawn), generator=self._generator)].tolist()

    def _num_explored(self, num_chosen: int) -> int:
        return min(math.ceil(self.explore * num_chosen), len(self.pass_rate) - num_chosen)

    def state_dict(self) -> dict[str, Tensor]:
        """What later draws depend on."""
        return {"pass_rate": self.pass_rate.clone(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` gave."""
        self.pass_rate = state["pass_rate"].clone()
        self._generator.set_state(state["generator"])


def levels_of(levels: Sequence[Hashable], pass_rate: Float[Tensor, " queries"]) -> dict[str, Tensor]:
    """Pass rates by static level, as `recommend_level` takes them.

    >>> levels_of([1, 1, 5], torch.tensor([0.9, 0.8, 0.1]))["5"]
    tensor([0.1000])
    """
    named = [str(level) for level in levels]
    return {level: pass_rate[torch.tensor([one == level for one in named])] for level in dict.fromkeys(named)}
