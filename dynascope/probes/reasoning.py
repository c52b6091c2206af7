"""Whether reinforcement learning teaches reasoning or guessing, from rollouts already drawn (2506.14245, section 5)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dynascope.record import Series
from dynascope.rl.monitors import Undisturbed
from dynascope.rl.reasoning.judge_ensemble import JudgeEnsemble
from dynascope.rl.reasoning.judges import Solution
from dynascope.rl.reasoning.pass_at_k import cot_pass_at_k, pass_at_k
from dynascope.rl.tasks.rewards import Reward, name_of, texts_of


class ReasoningDynamics:
    """P(CA), P(CC|CA), Pass@K and CoT-Pass@K of each rollout, to hand to `Watch.log` or a record's writer.

    Prompts whose answers were right at least once when they were first seen are the cohort. P(CC|CA) of the cohort alone is
    recorded too: the mean over all prompts that are solved now falls when hard ones join them, though none gets worse.

    Args:
        ks: The K of the two curves; none may exceed the answers of a prompt.

    Raises ValueError for no K at all.

    >>> dynamics = ReasoningDynamics([1, 4, 8])
    >>> w.log(dynamics.measure(prompt_ids, answer_correct, chain_correct))
    """

    def __init__(self, ks: Sequence[int]) -> None:
        if not ks:
            raise ValueError("ks is empty; give at least one K, like [1, 8]")
        self.ks = tuple(ks)
        self._is_cohort: dict[int, bool] = {}

    @property
    def series(self) -> tuple[Series, ...]:
        """The declarations of what is measured, for a record's writer: they label the curves with K."""
        labels = {"k": list(self.ks)}
        return (
            Series("reasoning/answer_correct", description="P(CA): share of right answers, mean over prompts."),
            Series("reasoning/solved", description="Share of prompts with right answers only."),
            Series("reasoning/learnable", description="Share of prompts with right and wrong answers."),
            Series("reasoning/unsolved", description="Share of prompts without a right answer."),
            Series("reasoning/pass_at_k", ("k",), description="Pass@K, mean over prompts.", coords=labels),
            Series(
                "reasoning/chain_correct",
                description="P(CC|CA): share of right chains among right answers, mean over prompts that have any.",
            ),
            Series("reasoning/cot_pass_at_k", ("k",), description="CoT-Pass@K, mean over prompts.", coords=labels),
            Series("reasoning/cohort_chain_correct", description="P(CC|CA) of prompts solved when first seen."),
        )

    def measure(
        self,
        prompt_ids: Int[Tensor, " prompts"],
        answer_correct: Bool[Tensor, "prompts answers"],
        chain_correct: Bool[Tensor, "prompts answers"] | None = None,
        mask: Bool[Tensor, "prompts answers"] | None = None,
        *,
        ks: Sequence[int] | None = None,
    ) -> dict[str, Float[Tensor, "..."]]:
        """The series of one rollout; without judged chains those of answers only.

        The chains of wrong answers may be anything. `mask` leaves out what was not drawn. Means over no prompt are NaN. `ks`
        are those of the curves, by default all; with none of them there are no curves.
        Raises ValueError for a prompt without answers, and for a K that exceeds the answers of a prompt.

        >>> ReasoningDynamics([1]).measure(torch.tensor([7]), torch.tensor([[True, False]]))["reasoning/answer_correct"]
        tensor(0.5000, dtype=torch.float64)
        """
        drawn = torch.ones_like(answer_correct) if mask is None else mask
        right = answer_correct & drawn
        n, c = drawn.sum(1), right.sum(1)
        ks = self.ks if ks is None else tuple(ks)
        measured = {
            "reasoning/answer_correct": (c.double() / n).mean(),
            "reasoning/solved": (c == n).double().mean(),
            "reasoning/learnable": ((c > 0) & (c < n)).double().mean(),
            "reasoning/unsolved": (c == 0).double().mean(),
        }
        if ks:
            measured["reasoning/pass_at_k"] = pass_at_k(n, c, ks).mean(0)
        for prompt, is_solved in zip(prompt_ids.tolist(), (c > 0).tolist(), strict=True):
            self._is_cohort.setdefault(prompt, is_solved)
        if chain_correct is not None:
            d = (right & chain_correct).sum(1)
            share = d.double() / c  # NaN where no answer is right
            is_cohort = torch.tensor([self._is_cohort[one] for one in prompt_ids.tolist()], device=c.device)
            if ks:
                measured["reasoning/cot_pass_at_k"] = cot_pass_at_k(n, d, ks).mean(0)
            measured |= {
                "reasoning/chain_correct": share.nanmean(),
                "reasoning/cohort_chain_correct": share[is_cohort].nanmean(),
            }
        return measured


def reasoning_monitored(
    reward: Reward,
    dynamics: ReasoningDynamics,
    ensemble: JudgeEnsemble | None = None,
    *,
    reference: str | None = None,
) -> Reward:
    """A reward for TRL's GRPOTrainer that logs what `dynamics` measures of its completions by the way, with none drawn for it.

    Values above 0 are right answers; with an ensemble the chains of those are judged, `reference` naming the column with the
    right answer, if it may see that. Groups are equal prompts that follow each other. Curves are logged by K, as
    `reasoning/pass_at_k/8`; what is a mean over nothing is left out, and so is a K above the smallest group. What fails here,
    like a judge's server, is told once as a warning and never ends training.

    >>> reward_funcs = reasoning_monitored(reward, ReasoningDynamics([1, 8]), JudgeEnsemble(judge), reference="answer")
    """
    numbers: dict[str, int] = {}

    def both(prompts: Sequence[Any], completions: Sequence[Any], **more: Any) -> Sequence[float | None]:
        values = list(reward(prompts=prompts, completions=completions, **more))
        with undisturbed():
            tell(prompts, completions, values, more)
        return values

    undisturbed = Undisturbed(f"reasoning dynamics of the reward {name_of(reward)!r}")

    def tell(
        prompts: Sequence[Any], completions: Sequence[Any], values: Sequence[float | None], more: Mapping[str, Any]
    ) -> None:
        questions, texts = texts_of(prompts), texts_of(completions)
        begins = [place == 0 or questions[place] != questions[place - 1] for place in range(len(questions))]
        groups = torch.tensor(begins).cumsum(0) - 1
        sizes = groups.bincount()
        mask = torch.arange(int(sizes.max())) < sizes[:, None]
        correct = torch.tensor([value is not None and value > 0 for value in values])
        chains = None
        if ensemble is not None:
            references = [None] * len(texts) if reference is None else more[reference]
            solutions = [Solution(*one) for one in zip(questions, texts, references, strict=True)]
            chains = _table(ensemble(solutions, correct).is_correct, mask)
        asked = [question for question, is_first in zip(questions, begins, strict=True) if is_first]
        ids = torch.tensor([numbers.setdefault(one, len(numbers)) for one in asked])
        ks = [k for k in dynamics.ks if k <= int(sizes.min())]
        for name, value in dynamics.measure(ids, _table(correct, mask), chains, mask, ks=ks).items():
            for place, one in enumerate(value.flatten().tolist()):
                if not math.isnan(one):
                    more["log_metric"](f"{name}/{ks[place]}" if value.ndim else name, one)

    both.__name__ = name_of(reward)
    return both


def _table(values: Tensor, mask: Tensor) -> Tensor:
    return torch.zeros_like(mask).masked_scatter(mask, values)
