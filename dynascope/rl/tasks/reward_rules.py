"""Rewards that pay for right answers and, in several ways, for their format (arXiv 2503.18892, sections 2 and 3).

| rule               | right, formatted | right, not | wrong, formatted | wrong, not |
|--------------------|------------------|------------|------------------|------------|
| `correctness`      | 1                | 1          | 0                | 0          |
| `strict_format`    | 1                | −1         | 0                | −1         |
| `independent`      | 1                | 0.5        | −0.5             | −1         |
| `legacy_mix`       | 1                | −1         | −0.5             | −1         |

The paper trains with the first; the second holds weak base models back, since answers are paid for only where the format is
there already. The last two come with the authors' program, whose present `mix` is the first again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dynascope.rl.tasks.answer_checking import AnswerChecker
from dynascope.rl.tasks.gsm8k import boxed
from dynascope.rl.tasks.rewards import texts_of

Table = Mapping[tuple[bool, bool], float]
"""(right, formatted) -> reward."""


@dataclass(frozen=True)
class RewardRule:
    """A reward for each of the four things that an answer can be.

    Raises ValueError for a table without one of them, or with a value that is not finite.

    >>> RewardRule.named("independent")(torch.tensor([True, False]), torch.tensor([False, True]))
    tensor([ 0.5000, -0.5000])
    """

    name: str
    table: Table

    def __post_init__(self) -> None:
        cells = {(correct, formatted) for correct in (True, False) for formatted in (True, False)}
        if set(self.table) != cells or not all(abs(value) < float("inf") for value in self.table.values()):
            raise ValueError(
                "the table needs a finite reward for each of (True, True), (True, False), (False, True), (False, False)"
            )

    @staticmethod
    def named(name: str) -> "RewardRule":
        """One of `RULES`. Raises ValueError for another name."""
        if name not in RULES:
            raise ValueError(f"there is no reward rule {name!r}; there are {', '.join(RULES)}")
        return RewardRule(name, RULES[name])

    def __call__(self, correct: Bool[Tensor, "*N"], formatted: Bool[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        """The reward of each answer."""
        values = [[self.table[right, is_formatted] for is_formatted in (False, True)] for right in (False, True)]
        return torch.tensor(values, device=correct.device)[correct.long(), formatted.long()]

    def as_reward(
        self,
        is_right: Callable[[str, Any], bool] | None = None,
        is_formatted: Callable[[str], bool] = lambda completion: boxed(completion) is not None,
        *,
        column: str = "answer",
        checker: AnswerChecker | None = None,
    ) -> Callable[..., list[float]]:
        """A reward of the loop and of TRL: `is_right(completion, value of the column)`, and whether the format is there.

        In place of `is_right` a `checker` compares what is in the last box, or the whole completion where there is none; what
        takes longer than its time limit is wrong, as in the paper. Only the completion is looked at, so that a box in the
        prompt does not count.

        Raises ValueError unless there is one of the two.

        >>> reward = RewardRule.named("correctness").as_reward(checker=AnswerChecker(math_verify_equal, time_limit=10))
        """
        if (is_right is None) == (checker is None):
            raise ValueError("give is_right(completion, answer), or checker=AnswerChecker(…) in its place")

        def reward(completions: Sequence[Any], **columns: Any) -> list[float]:
            texts, answers = texts_of(completions), columns[column]
            if checker is not None:
                found = [boxed(text) for text in texts]
                said = [text if box is None else box for text, box in zip(texts, found, strict=True)]
                right = checker(said, [str(answer) for answer in answers])
            else:
                assert is_right is not None
                right = [is_right(text, answer) for text, answer in zip(texts, answers, strict=True)]
            return [self.table[one, is_formatted(text)] for one, text in zip(right, texts, strict=True)]

        reward.__name__ = self.name
        return reward


def _table(right_formatted: float, right: float, wrong_formatted: float, wrong: float) -> Table:
    return {(True, True): right_formatted, (True, False): right, (False, True): wrong_formatted, (False, False): wrong}


RULES: dict[str, Table] = {
    "correctness": _table(1.0, 1.0, 0.0, 0.0),
    "strict_format": _table(1.0, -1.0, 0.0, -1.0),
    "independent": _table(1.0, 0.5, -0.5, -1.0),
    "legacy_mix": _table(1.0, -1.0, -0.5, -1.0),
}


def correctness_signal(rule: RewardRule, correct: float, formatted: float) -> float:
    """How much one more unit of accuracy is worth in standard deviations of the reward, format being independent of it.

    (dE[r]/dc) / std(r) with P(right)=c and P(formatted)=b: what is left of the wish to be right once rewards are scaled by
    their deviation. 0 where the reward never differs.

    >>> round(correctness_signal(RewardRule.named("correctness"), 0.2, 0.1), 2)
    2.5
    """
    shares = {
        (right, is_formatted): (correct if right else 1 - correct) * (formatted if is_formatted else 1 - formatted)
        for right in (True, False)
        for is_formatted in (True, False)
    }
    mean = sum(share * rule.table[cell] for cell, share in shares.items())
    variance = sum(share * (rule.table[cell] - mean) ** 2 for cell, share in shares.items())
    slope = sum(
        (formatted if is_formatted else 1 - formatted)
        * (rule.table[True, is_formatted] - rule.table[False, is_formatted])
        for is_formatted in (True, False)
    )
    return float(slope / variance**0.5) if variance > 0 else 0.0
