"""When to fine-tune between steps of RL, and on which questions: ReLIFT's own schedule and those it was compared with.

| name           | questions that enter the buffer                                  | a step of fine-tuning |
|----------------|------------------------------------------------------------------|-----------------------|
| `relift`       | those with no right answer                                       | when a batch is there |
| `threshold(p)` | those with a share of right answers of at most p                 | when a batch is there |
| `random`       | as many as are hardest, drawn from those that are not            | when a batch is there |
| `all`          | all                                                              | after every RL step   |
| `uniform(k)`   | all                                                              | after every k-th      |
| `never`        | none: plain RL                                                   | never                 |
| `always`       | all, and the rollout is not learned from: plain fine-tuning      | every step            |
"""

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dynascope.rl.interleaving.hardest import hardest_questions


@dataclass(frozen=True)
class Schedule:
    """One row of the table.

    >>> Schedule.named("uniform(8)").every
    8
    """

    name: str
    threshold: float | None = None
    """The highest share of right answers with which a question enters; None lets all in."""
    is_inverted: bool = False
    """Enter, for each question under the threshold, one drawn from those above it."""
    every: int | None = None
    """RL steps from one step of fine-tuning to the next; None waits for a whole batch; 0 is never."""
    has_rl: bool = True

    @staticmethod
    def named(name: str) -> "Schedule":
        """By the name in the table.

        Raises ValueError for another one.
        """
        known = {
            "relift": Schedule("relift", threshold=0.0),
            "random": Schedule("random", threshold=0.0, is_inverted=True),
            "all": Schedule("all", every=1),
            "never": Schedule("never", threshold=-1.0, every=0),
            "always": Schedule("always", every=1, has_rl=False),
        }
        if name in known:
            return known[name]
        if match := re.fullmatch(r"uniform\((\d+)\)", name):
            if int(match[1]) < 1:
                raise ValueError("uniform(k): k is a number of RL steps, at least 1")
            return Schedule(name, every=int(match[1]))
        if match := re.fullmatch(r"threshold\((0?\.\d+|0|1(?:\.0*)?)\)", name):
            return Schedule(name, threshold=float(match[1]))
        raise ValueError(f"there is no schedule {name!r}; there are {', '.join(known)}, uniform(8) and threshold(0.25)")

    def entering(
        self, questions: Sequence[Hashable], accuracy: Float[Tensor, " questions"], generator: torch.Generator
    ) -> list[Hashable]:
        """Which of a rollout's questions enter the buffer.

        >>> Schedule.named("relift").entering(["a", "b"], torch.tensor([0.0, 0.5]), torch.Generator())
        ['a']
        """
        if self.every == 0:
            return []
        if self.threshold is None:
            return list(questions)
        hard = hardest_questions(questions, accuracy, self.threshold)
        if not self.is_inverted:
            return hard
        others = [question for question in questions if question not in set(hard)]
        order = torch.randperm(len(others), generator=generator).tolist()
        return [others[place] for place in order[: len(hard)]]

    def is_due(self, step: int, is_full: bool) -> bool:
        """Whether to fine-tune after this RL step (counted from 0), a whole batch waiting or not."""
        if self.every is None:
            return is_full
        return self.every > 0 and (step + 1) % self.every == 0
