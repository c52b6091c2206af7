"""How hard questions are for a policy, and how that changes between two checkpoints (arXiv 2506.07527, section 2)."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

STRATA = ("hardest", "hard", "medium", "easy")
EDGES = (0.0, 3 / 8, 6 / 8)
"""Accuracies above the first of which a question is hard, and from which it is medium or easy; the hardest have none right."""


def classify_difficulty(
    accuracy: Float[Tensor, " questions"], edges: Sequence[float] = EDGES
) -> Int[Tensor, " questions"]:
    """The stratum of each question from its accuracy, as a number: 0 is the hardest (`STRATA` names the paper's four).

    A question belongs to the stratum whose edge it reaches; an edge of 0 must be passed. Raises ValueError for accuracies
    outside [0, 1] and for edges that do not rise within [0, 1].

    >>> classify_difficulty(torch.tensor([0.0, 0.25, 0.5, 0.75]))
    tensor([0, 1, 2, 3])
    """
    if not bool(((accuracy >= 0) & (accuracy <= 1)).all()):
        raise ValueError("accuracies are shares of right answers: they must lie between 0 and 1")
    if list(edges) != sorted(set(edges)) or not all(0 <= edge <= 1 for edge in edges):
        raise ValueError(f"edges={tuple(edges)} must rise, from 0 or above and up to 1")
    # Shares such as 3/8 are exact in any float type, 0.1 is not: an accuracy at an edge reaches it.
    bounds = torch.tensor(list(edges), dtype=torch.float64, device=accuracy.device)
    bounds = (bounds - 1e-6).clamp(min=0)
    return torch.bucketize(accuracy.double(), bounds)


def transition_matrix(
    before: Int[Tensor, " questions"], after: Int[Tensor, " questions"], num_strata: int = len(STRATA)
) -> Int[Tensor, "strata strata"]:
    """How many questions of each stratum (rows) were in each stratum later (columns).

    >>> transition_matrix(torch.tensor([0, 0, 3]), torch.tensor([0, 1, 3])).diag()
    tensor([1, 0, 0, 1])
    """
    return torch.bincount(before * num_strata + after, minlength=num_strata**2).view(num_strata, num_strata)


def mean_by_stratum(
    values: Float[Tensor, " questions"], strata: Int[Tensor, " questions"], num_strata: int = len(STRATA)
) -> Float[Tensor, " strata"]:
    """The mean of each stratum's questions; NaN for a stratum without any.

    >>> mean_by_stratum(torch.tensor([1.0, 3.0]), torch.tensor([1, 1]), 2)
    tensor([nan, 2.])
    """
    sums = values.new_zeros(num_strata).index_add(0, strata, values)
    return sums / torch.bincount(strata, minlength=num_strata)


def chance_of_all_wrong(accuracy: Float[Tensor, "*questions"] | float, num_samples: int) -> Float[Tensor, "*questions"]:
    """(1 − a)^G: how often a question of true accuracy a looks hardest among G answers.

    >>> chance_of_all_wrong(0.2, 8)
    tensor(0.1678)
    """
    return (1 - torch.as_tensor(accuracy)) ** num_samples


@dataclass(frozen=True, eq=False)
class DifficultyProfile:
    """The same questions at one checkpoint: accuracy and mean length of each."""

    questions: tuple[Hashable, ...]
    accuracy: Float[Tensor, " questions"]
    length: Float[Tensor, " questions"]

    @classmethod
    def of(
        cls,
        questions: Sequence[Hashable],
        correct: Bool[Tensor, "questions samples"],
        lengths: Float[Tensor, "questions samples"] | None = None,
    ) -> "DifficultyProfile":
        """From answers to each question, right or not.

        Raises ValueError when a question occurs twice or the numbers of rows differ.

        >>> DifficultyProfile.of(["1+1=", "47+85="], torch.tensor([[True, True], [False, False]])).strata
        tensor([3, 0])
        """
        if len(set(questions)) < len(questions) or len(questions) != len(correct):
            raise ValueError(f"{len(correct)} rows of answers for {len(set(questions))} questions; give each one row")
        length = torch.full((len(correct),), torch.nan) if lengths is None else lengths.float().mean(1)
        return cls(tuple(questions), correct.float().mean(1), length)

    @property
    def strata(self) -> Int[Tensor, " questions"]:
        """Of the paper's four."""
        return classify_difficulty(self.accuracy)


class DifficultyProbe:
    """Follows questions by the stratum in which they began.

    >>> probe = DifficultyProbe(DifficultyProfile.of(ids, correct_before, lengths_before))
    >>> probe.compare(DifficultyProfile.of(ids, correct_now, lengths_now))["difficulty/accuracy"]
    """

    def __init__(self, start: DifficultyProfile) -> None:
        self.start = start
        self._place = {question: place for place, question in enumerate(start.questions)}

    def compare(self, now: DifficultyProfile) -> Mapping[str, Tensor]:
        """By first stratum, hardest first; NaN where there is no question.

        - `difficulty/questions` (stratum): how many began there.
        - `difficulty/accuracy`, `difficulty/length` (stratum): means now.
        - `difficulty/transitions` (stratum, later): shares of those that began in one and are in the other now.

        Raises ValueError for a question that was not there at the start.
        """
        unknown = [question for question in now.questions if question not in self._place]
        if unknown:
            raise ValueError(f"{len(unknown)} questions were not there at the start, {unknown[0]!r} among them")
        before = self.start.strata[torch.tensor([self._place[question] for question in now.questions])]
        moved = transition_matrix(before, now.strata)
        return {
            "difficulty/questions": moved.sum(1),
            "difficulty/accuracy": mean_by_stratum(now.accuracy, before),
            "difficulty/length": mean_by_stratum(now.length, before),
            "difficulty/transitions": moved / moved.sum(1, keepdim=True),
        }
