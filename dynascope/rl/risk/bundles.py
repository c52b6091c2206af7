"""Bundles of questions: sums of the rewards of several, which have more to tell than right and wrong (2510.00911, section 3)."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Credit = Literal["uniform", "score", "std", "sum-mean"]
Remainder = Literal["normalize", "drop"]


@dataclass(frozen=True, eq=False)
class Bundles:
    """K sets of at most `size` questions, in each of which G bundles hold one response of every question.

    Bundle j of set k holds response `order[i, j]` of each question i from k · size on; every response is in exactly one.
    """

    scores: Float[Tensor, "K G"]
    """Sums of rewards. A set with fewer questions has them scaled up by size / questions, so that scores are comparable."""
    order: Int64[Tensor, "P G"]
    size: int

    def by_question(self, values: Float[Tensor, "K G"]) -> Float[Tensor, "P G"]:
        """A value of each bundle at the places of its members; questions that belong to no set have 0."""
        spread = values.repeat_interleave(self.size, 0)[: len(self.order)]
        return torch.cat([spread, spread.new_zeros(len(self.order) - len(spread), spread.shape[1])])

    def sums(self, values: Float[Tensor, "P G"]) -> Float[Tensor, "K G"]:
        """Sums over the members of each bundle of a value (P, G) of each response."""
        return _sums(values.gather(1, self.order), self.size, len(self.scores))


def bundle(
    rewards: Float[Tensor, "P G"],
    size: int = 5,
    *,
    generator: torch.Generator | None = None,
    permutes: bool = True,
    remainder: str = "normalize",
) -> Bundles:
    """Questions, in the order given, to sets of `size`, and their responses to bundles by a random permutation each.

    Args:
        rewards: Of G responses to each of P questions.
        generator: On the CPU, so that a seed means the same on every device; processes that share it bundle alike.
        permutes: False puts the j-th responses together, as the released code does.
        remainder: What becomes of a last set that is not full: its scores are "normalize"d, or it is "drop"ped.

    Raises ValueError for a size below 1, another remainder, or when "drop" leaves nothing.

    >>> bundle(torch.tensor([[1.0, 1], [0, 1]]), size=2, permutes=False).scores
    tensor([[1., 2.]])
    """
    if size < 1:
        raise ValueError(f"bundles of {size} questions: at least 1 is needed")
    if remainder not in get_args(Remainder):
        raise ValueError(f"remainder is normalize or drop, not {remainder!r}")
    num_questions, width = rewards.shape
    num_sets = num_questions // size if remainder == "drop" else -(-num_questions // size)
    if not num_sets:
        raise ValueError(
            f"{num_questions} questions fill no bundle of {size}; use smaller bundles or remainder='normalize'"
        )
    if permutes:
        order = torch.rand(num_questions, width, generator=generator, dtype=torch.float64).argsort(1)
        order = order.to(rewards.device)
    else:
        order = torch.arange(width, device=rewards.device).repeat(num_questions, 1)
    scores = _sums(rewards.gather(1, order), size, num_sets)
    left = num_questions - (num_sets - 1) * size
    if left < size:
        scores[-1] *= size / left
    return Bundles(scores, order, size)


def unbundle(
    advantage: Float[Tensor, "K G"],
    bundles: Bundles,
    rewards: Float[Tensor, "P G"] | None = None,
    credit: str = "uniform",
) -> Float[Tensor, "P G"]:
    """The advantage of every response from those of the bundles; responses in no bundle have 0.

    - "uniform": each member has its bundle's advantage.
    - "score": times 0.5 for a member whose reward is positive, 1.5 for another.
    - "std": over the standard deviation of its question's rewards, where that is above 1e-3.
    - "sum-mean": the members share it in proportion to reward − the question's mean reward, and equally where those cancel.

    All but "uniform" need `rewards`, and are of the released code. Raises ValueError for another credit, or without rewards.

    >>> unbundle(torch.tensor([[-1.0, 0]]), bundle(torch.tensor([[1.0, 1], [0, 1]]), size=2, permutes=False))
    tensor([[-1.,  0.],
            [-1.,  0.]])
    """
    if credit not in get_args(Credit):
        raise ValueError(f"credit is {', '.join(get_args(Credit))}, not {credit!r}")
    spread = torch.zeros_like(bundles.order, dtype=advantage.dtype)
    spread = spread.scatter(1, bundles.order, bundles.by_question(advantage))
    if credit == "uniform":
        return spread
    if rewards is None:
        raise ValueError(f"credit={credit!r} needs rewards")
    if credit == "score":
        return spread * torch.where(rewards > 0, 0.5, 1.5)
    if credit == "std":
        deviation = rewards.std(1, correction=int(rewards.shape[1] > 1), keepdim=True)
        return spread / deviation.where(deviation > 1e-3, 1.0)
    away = rewards - rewards.mean(1, keepdim=True)
    total, members = bundles.sums(away), bundles.sums(torch.ones_like(rewards))
    cancels = total.abs() < 1e-6
    each = torch.zeros_like(spread).scatter(1, bundles.order, bundles.by_question((1 / members) * cancels))
    scale = torch.zeros_like(spread).scatter(1, bundles.order, bundles.by_question((1 / total).where(~cancels, 0.0)))
    return spread * (each + away * scale)


def _sums(in_bundles: Float[Tensor, "P G"], size: int, num_sets: int) -> Float[Tensor, "K G"]:
    num_questions, width = in_bundles.shape
    whole = in_bundles.new_zeros(num_sets * size, width)
    kept = min(num_questions, num_sets * size)
    whole[:kept] = in_bundles[:kept]
    return whole.view(num_sets, size, width).sum(1)
