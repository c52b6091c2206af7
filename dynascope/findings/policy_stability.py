"""Findings on policy gradients that are about to break: exploding ratios, outlying advantages, rewards of one kind."""

from collections.abc import Iterable, Mapping
from typing import ClassVar

import numpy as np

from dynascope.findings.history import Streak
from dynascope.record import Finding, Piece

STABLE = "objective = objective.having(pre_clip=(1e-3, 1e3), post=(AdvantageFilter(),))  # from dynascope.rl"


class _Above:
    """A series above a threshold at several looks in a row; one finding a run."""

    reads: ClassVar[tuple[str, ...]]
    threshold: ClassVar[float]
    looks: ClassVar[int]
    id: ClassVar[str]
    source: ClassVar[str]
    remedy: ClassVar[str]

    def __init__(self) -> None:
        self._streak = Streak(self.looks)

    def feed(self, new: Mapping[str, Piece]) -> Iterable[Finding]:
        """At most one finding, at the first of the looks that showed it."""
        (name,) = self.reads
        if name not in new:
            return
        for step, value in zip(new[name].steps.tolist(), new[name].values.tolist(), strict=True):
            since = self._streak.fires(value > self.threshold, step)
            if since is not None:
                yield Finding(
                    id=self.id,
                    severity="warning",
                    step=since,
                    message=self.message(value),
                    evidence={name.rsplit("/", 1)[-1]: float(value), "seen_at": step},
                    remedy=self.remedy,
                    source=self.source,
                    series=name,
                )

    def message(self, value: float) -> str:
        """What to say of the value that settled it."""
        raise TypeError(f"{type(self).__name__} must define message(value)")


class RatioExplosion(_Above):
    """More than one token in a thousand has become e⁵ times likelier or unlikelier since it was sampled.

    A pre-clip keeps such tokens from breaking the update, and hides nothing of this: the share is taken before it.
    """

    reads = ("policy/ratio/exploded",)
    threshold, looks = 1e-3, 3
    id = "ratio-explosion"
    source = "2505.02835, section 3; e⁵ and one in a thousand are a convention"
    remedy = STABLE

    def message(self, value: float) -> str:
        return (
            f"{value:.2%} of the tokens have become e⁵ times likelier or unlikelier since they were sampled: "
            "the policy is far from the one that the rollout came from."
        )


class AdvantageOutliers(_Above):
    """A few advantages are more than five standard deviations out, and rule the update: rewards are nearly all equal."""

    reads = ("advantage/max_abs",)
    threshold, looks = 5.0, 3
    id = "advantage-outliers"
    source = "2505.02835, section 3, which leaves out what is beyond 3; 5 is a convention"
    remedy = "objective = objective.having(post=(AdvantageFilter(),))  # from dynascope.rl; or harder prompts"

    def message(self, value: float) -> str:
        return f"The largest normalized advantage is {value:.1f}: a few completions with a rare reward rule the update."


class OneSidedRewards(_Above):
    """More than nine completions in ten are right: normalized failures lie beyond three sigma, and a filter drops them all.

    √(q/(1−q)) passes 3 at q = 0.9.
    """

    reads = ("rollout/correct",)
    threshold, looks = 0.9, 10
    id = "one-sided-rewards"
    source = "2505.02835: at q = 0.9 a failure's normalized advantage is −3"
    remedy = "train(..., keep=lambda batch: learnable_groups(batch.rewards, batch.group_ids))  # or harder prompts"

    def message(self, value: float) -> str:
        return (
            f"{value:.0%} of the completions are right: failures are {np.sqrt(value / max(1 - value, 1e-9)):.1f} deviations "
            "out, and a filter at 3 leaves nothing that pushes back."
        )
