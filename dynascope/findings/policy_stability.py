"""Findings on policy gradients that are about to break: exploding ratios, outlying advantages, rewards of one kind."""

from collections.abc import Iterable, Mapping
from typing import ClassVar

import numpy as np

from dynascope.findings.history import Streak
from dynascope.record import Finding, Piece

STABLE = "objective = objective.having(pre_clip=(1e-3, 1e3), post=(AdvantageFilter(),))  # from dynascope.rl"

NEARER = "loop = replace(loop, num_passes=1)  # from dataclasses; or a smaller learning rate"


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
        name = self.reads[0]
        if name not in new:
            return
        for step, value in zip(new[name].steps.tolist(), new[name].values.tolist(), strict=True):
            since = self._streak.fires(self.is_sick(value), step)
            if since is not None:
                yield Finding(
                    id=self.id,
                    severity="warning",
                    step=since,
                    message=self.message(value),
                    evidence={name.rsplit("/", 1)[-1]: float(value), "seen_at": step},
                    remedy=self.remedy_of(value),
                    source=self.source,
                    series=name,
                )

    def is_sick(self, value: float) -> bool:
        """Whether a look counts."""
        return value > self.threshold

    def remedy_of(self, value: float) -> str:
        """What helps against such a value."""
        return self.remedy

    def message(self, value: float) -> str:
        """What to say of the value that settled it."""
        raise TypeError(f"{type(self).__name__} must define message(value)")


class RatioExplosion(_Above):
    """More than one token in a thousand has become e⁵ times likelier or unlikelier since it was sampled.

    A pre-clip keeps such tokens from breaking the update, and hides nothing of this: the share is taken before it. Where there
    is one already, only smaller steps help.
    """

    reads = ("policy/ratio/exploded", "policy/pre_clipped")
    threshold, looks = 1e-3, 3
    id = "ratio-explosion"
    source = "2505.02835, section 3; e⁵ and one in a thousand are a convention"
    remedy = STABLE

    def __init__(self) -> None:
        super().__init__()
        self._has_pre_clip = False

    def feed(self, new: Mapping[str, Piece]) -> Iterable[Finding]:
        """As ever, and whether there is a pre-clip."""
        self._has_pre_clip |= "policy/pre_clipped" in new
        return super().feed(new)

    def remedy_of(self, value: float) -> str:
        """A pre-clip, or where there is one, smaller steps."""
        return NEARER if self._has_pre_clip else self.remedy

    def message(self, value: float) -> str:
        return (
            f"{value:.2%} of the tokens have become e⁵ times likelier or unlikelier since they were sampled: "
            "the policy is far from the one that the rollout came from."
        )


class PreClipHides(_Above):
    """A pre-clip holds more than one token in a hundred: the run fails, and does not show it."""

    reads = ("policy/pre_clipped",)
    threshold, looks = 0.01, 3
    id = "pre-clip-hides"
    source = "2505.02835, section 3; one in a hundred is a convention"
    remedy = NEARER

    def message(self, value: float) -> str:
        return f"The pre-clip holds {value:.2%} of the tokens, which learn nothing: the policy has left its rollouts far behind."


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
    """More than nine completions in ten are right, or fewer than one: the others lie beyond three sigma, and a filter drops all.

    √(q/(1−q)) passes 3 at q = 0.9, and √((1−q)/q) at q = 0.1.
    """

    reads = ("rollout/correct",)
    threshold, looks = 0.9, 10
    id = "one-sided-rewards"
    source = "2505.02835: at q = 0.9 a failure's normalized advantage is −3, at q = 0.1 a success's is 3"

    def is_sick(self, value: float) -> bool:
        """On either side."""
        return max(value, 1 - value) > self.threshold

    def remedy_of(self, value: float) -> str:
        """A wider filter, which works with one completion a prompt too."""
        which = "harder" if value > 0.5 else "easier"
        return f"objective = objective.having(post=(AdvantageFilter(sigma=10.0),))  # from dynascope.rl; or {which} prompts"

    def message(self, value: float) -> str:
        many, few, back = ("right", "failures", "back") if value > 0.5 else ("wrong", "successes", "forward")
        most = max(value, 1 - value)
        return (
            f"{most:.0%} of the completions are {many}: {few} are {np.sqrt(most / max(1 - most, 1e-9)):.1f} deviations "
            f"out, and a filter at 3 leaves nothing that pushes {back}."
        )
