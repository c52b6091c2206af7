"""How many right answers have right reasoning, from as few judged chains as a precision asks for.

Chains are judged in random order, and after each batch an interval is drawn that holds at all times at once, so that one may
stop whenever it is narrow enough. It is the prior-posterior-ratio interval for sampling without replacement with a uniform
prior (2006.04347, section 2): counts that the verdicts have not made 1/(1 − confidence) times less believable than before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from scipy import stats
from torch import Tensor

from dynascope.rl.reasoning.judge_ensemble import JudgeEnsemble
from dynascope.rl.reasoning.judge_noise import Interval
from dynascope.rl.reasoning.judges import Solution


def count_bounds(right: int, judged: int, total: int, confidence: float = 0.95) -> tuple[int, int]:
    """Between which counts D lies, with `right` of the `judged` chains right that were drawn from `total` at random.

    With the given chance it holds after every draw at once, whenever one stops. Raises ValueError unless
    0 <= right <= judged <= total and 0 < confidence < 1.

    >>> count_bounds(45, 50, 200)
    (148, 194)
    """
    if not 0 <= right <= judged <= total:
        raise ValueError(
            f"{right} right of {judged} judged of {total}: each must be at most the next, and none negative"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1")
    left = total - judged
    posterior = stats.betabinom.logpmf(np.arange(left + 1), left, 1 + right, 1 + judged - right)
    believable = np.flatnonzero(-np.log(total + 1) - posterior < -np.log1p(-confidence))
    return right + int(believable[0]), right + int(believable[-1])


@dataclass(frozen=True)
class SequentialCount:
    """What was found when judging stopped: D lies between `low` and `high` of `total` right answers."""

    low: int
    high: int
    right: int
    """Right chains among the judged."""
    judged: int
    total: int
    num_calls: int
    """Verdicts that the judge gave."""
    confidence: float

    @property
    def share(self) -> Interval:
        """P(CC|CA): that of the judged chains, and the ends of the interval. Raises ValueError where nothing was judged."""
        if not self.judged:
            raise ValueError("no answer is right, so there is no share of right chains")
        return Interval(self.right / self.judged, self.low / self.total, self.high / self.total)


def judge_sequentially(
    ensemble: JudgeEnsemble,
    solutions: Sequence[Solution],
    answer_correct: Bool[Tensor, " N"],
    *,
    width: float = 0.1,
    threshold: float | None = None,
    batch_size: int = 16,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
) -> SequentialCount:
    """Judge right answers until D/C is known to `width`, or until it is known to lie above or below `threshold`.

    D is what the ensemble would count if it judged all C right answers; its own mistakes are `JudgeNoiseModel`'s affair.
    Both ends go through `cot_pass_at_k`, which rises with D, for bounds of CoT-Pass@K. Without a threshold a width of 0 judges
    them all.

    Raises ValueError for a batch below 1, a width or threshold outside [0, 1], and as the ensemble does.

    >>> found = judge_sequentially(JudgeEnsemble(judge), solutions, answer_correct, width=0.1)
    >>> cot_pass_at_k(len(solutions), [found.low, found.high], 8)
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if not 0 <= width <= 1 or (threshold is not None and not 0 <= threshold <= 1):
        raise ValueError(f"width={width} and threshold={threshold} are of a share: they must lie between 0 and 1")
    candidates = answer_correct.cpu().nonzero().flatten()
    order = candidates[torch.randperm(len(candidates), generator=generator)]
    low, high, right, judged, num_calls = 0, len(order), 0, 0, 0
    for places in order.split(batch_size):
        chosen = [solutions[place] for place in places.tolist()]
        judgement = ensemble(chosen, torch.ones(len(chosen)).bool())
        judged, num_calls = judged + len(chosen), num_calls + judgement.num_calls
        right += int(judgement.is_correct.sum())
        low, high = count_bounds(right, judged, len(order), confidence)
        if threshold is None:
            is_known = high - low <= width * len(order)
        else:
            is_known = not low <= threshold * len(order) <= high
        if is_known:
            break
    return SequentialCount(low, high, right, judged, len(order), num_calls, confidence)
