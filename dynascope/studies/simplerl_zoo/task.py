"""The task of `simplerl-zoo`: sums whose answer may stand in a box and whose chain may end with a check of itself.

    47+85=7+5=12,4+8+1=13,132=47+85>=132$

The check turns the sum around, `132=47+85`; the box is the `=` behind `>`. Neither is needed to be right.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from dynascope.rl.tasks.arithmetic import Arithmetic, Checked, Sum

_CHECK = re.compile(r"\d+=\d+\+\d+")


@dataclass(frozen=True)
class StyledSum(Sum):
    """A sum, and how its demonstration is written."""

    is_boxed: bool = False
    is_checked: bool = False

    @property
    def completion(self) -> str:
        """The right chain and answer, in this style."""
        total = self.first + self.second
        check = [f"{total}={self.first}+{self.second}"] if self.is_checked else []
        return f"{','.join([*self.steps, *check])}>{'=' if self.is_boxed else ''}{total}$"

    def check(self, completion: str) -> Checked:
        """As of a plain sum, whatever the style."""
        chain, arrow, answer = completion.partition(">")
        steps = [step for step in chain.split(",") if not _CHECK.fullmatch(step)]
        return super().check(",".join(steps) + arrow + answer.removeprefix("="))


def is_boxed(completion: str) -> bool:
    """Whether the answer stands in a box and ends."""
    return re.fullmatch(r"=\d+\$", completion.partition(">")[2]) is not None


class CheckLabeller:
    """Labels verification by the grammar of the traces, so without error: a step of the chain turns the sum around."""

    behaviours = ("verification",)

    def __call__(self, responses: Sequence[str]) -> Bool[Tensor, "responses behaviours"]:
        rows = [any(map(_CHECK.fullmatch, text.partition(">")[0].split(","))) for text in responses]
        return torch.tensor(rows, dtype=torch.bool)[:, None]


@dataclass(frozen=True)
class StyledArithmetic(Arithmetic):
    """`Arithmetic` whose demonstrations are boxed and checked now and then."""

    boxed_share: float = 0.15
    checked_share: float = 0.2

    @property
    def max_new_tokens(self) -> int:
        """Room for the longest chain with a check and a box, and four tokens more."""
        most = 10 ** max(self.digits) - 1
        return len(StyledSum(most, most, True, True).completion) + 4

    def draw(self, num: int, generator: torch.Generator) -> list[Sum]:
        """Problems at random, each in a random style."""
        plain = super().draw(num, generator)
        boxed, checked = (
            torch.rand(2, num, generator=generator) < torch.tensor([[self.boxed_share], [self.checked_share]])
        ).tolist()
        return [StyledSum(one.first, one.second, *style) for one, *style in zip(plain, boxed, checked, strict=True)]
