"""A judge of sums: which of two results is right, after a thought that a rule can check (arXiv 2505.02835, in small).

    3+9,13,12=12>2$

The prompt has a sum and two results; the judge writes the result that it believes in, then which side says so. Demonstrations
are careless: the thought is wrong with one chance, and the answer does not follow from it with another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from dynascope.rl.tasks.arithmetic import CHARACTERS, PAD, STOP, decode, encode
from dynascope.rl.tasks.pairwise import JudgeReward

BASE = 10
"""Results are written with two digits."""


@dataclass(frozen=True)
class Pair:
    """A sum and two results, one of them right, in the order shown; and one careless demonstration.

    >>> Pair(3, 9, 13, 12, "").label, Pair(3, 9, 13, 12, "").prompt
    (2, '3+9,13,12=')
    """

    one: int
    other: int
    first: int
    second: int
    completion: str

    @property
    def label(self) -> int:
        """The side with the right result."""
        return 1 if self.first == self.one + self.other else 2

    @property
    def prompt(self) -> str:
        """What the judge is given."""
        return f"{self.one}+{self.other},{self.first:02},{self.second:02}="

    def said(self, completion: str) -> int:
        """1 or 2; 0 where the answer is neither."""
        return {"1$": 1, "2$": 2}.get(completion.partition(">")[2], 0)

    def is_consistent(self, completion: str) -> bool:
        """Whether the side that is named has the result that was thought of: what a referee would say."""
        side = {1: self.first, 2: self.second}.get(self.said(completion))
        return side is not None and completion.partition(">")[0] == f"{side:02}"


@dataclass(frozen=True)
class Judging:
    """Where pairs come from, and how careless demonstrations are: the chances of a wrong thought, and of an answer beside it."""

    wrong_thought: float = 0.4
    beside: float = 0.25
    is_obvious: bool = False
    """Whether the wrong result is always 99, so that no sum needs to be known."""

    stop_token: ClassVar[int] = STOP
    pad_token: ClassVar[int] = PAD
    vocabulary: ClassVar[int] = len(CHARACTERS)
    max_new_tokens: ClassVar[int] = 6
    max_length: ClassVar[int] = 18

    def __post_init__(self) -> None:
        if not (0 <= self.wrong_thought <= 1 and 0 <= self.beside <= 1):
            raise ValueError("wrong_thought and beside are chances: they must lie between 0 and 1")

    def draw(self, num: int, generator: torch.Generator) -> list[Pair]:
        """Pairs at random, the right result on a random side; the wrong one is off by 1 or 10, up or down, or obvious."""
        digits = torch.randint(BASE, (2, num), generator=generator)
        right = digits.sum(0)
        off = torch.tensor([-10, -1, 1, 10])[torch.randint(4, (num,), generator=generator)]
        wrong = torch.where((right + off) < 0, right - off, right + off)
        if self.is_obvious:
            wrong = torch.full_like(right, 99)
        is_second, is_beside, is_wrong = torch.rand(3, num, generator=generator) < torch.tensor(
            [[0.5], [self.beside], [self.wrong_thought]]
        )
        first, second = torch.where(is_second, wrong, right), torch.where(is_second, right, wrong)
        thought = torch.where(is_wrong, wrong, right)
        answer = 1 + (is_second ^ is_wrong ^ is_beside).long()
        columns = torch.stack([*digits, first, second, thought, answer], 1).tolist()
        return [Pair(one, other, a, b, f"{thought:02}>{said}$") for one, other, a, b, thought, said in columns]

    def prompts(self, problems: Sequence[Pair]) -> tuple[Int64[Tensor, "N P"], Bool[Tensor, "N P"]]:
        """Tokens of the prompts, and where they are."""
        return encode([one.prompt for one in problems], side="left")

    def texts(self, tokens: Int64[Tensor, "N T"]) -> list[str]:
        """What completions say."""
        return decode(tokens)

    def are_right(self, problems: Sequence[Pair], completions: Sequence[str]) -> list[bool]:
        """Whether the right side is named."""
        return [one.said(text) == one.label for one, text in zip(problems, completions, strict=True)]


FORMAT = r"\d\d>[12]\$"
"""A result of two digits, and a side."""


class SumReward(JudgeReward):
    """Format, result and, if it is asked for, consistency, composed as the paper does; a rule is the referee."""

    def __init__(self, *, with_consistency: bool) -> None:
        super().__init__(pattern=FORMAT, read=_read)
        self.with_consistency = with_consistency

    def agreeing(self, judgements: Sequence[tuple[str, str]], problems: Sequence[Pair]) -> list[float]:
        """By the results that each side shows."""
        if not self.with_consistency:
            return super().agreeing(judgements, problems)
        pairs = zip(judgements, problems, strict=True)
        return [1.0 if pair.is_consistent(f"{thought}>{answer}$") else -1.0 for (thought, answer), pair in pairs]


def _read(text: str) -> tuple[str, str]:
    thought, _, answer = text.partition(">")
    return thought, answer[:-1] if answer.endswith("$") else ""


@dataclass(frozen=True)
class GivenPairs(Judging):
    """Pairs out of a list, at random."""

    pairs: tuple[Pair, ...] = ()

    def draw(self, num: int, generator: torch.Generator) -> list[Pair]:
        """Some of them, each as often as chance will have it."""
        return [self.pairs[place] for place in torch.randint(len(self.pairs), (num,), generator=generator).tolist()]
