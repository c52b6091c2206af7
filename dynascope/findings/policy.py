"""Findings on policy optimization: an objective that only ever pushes one way, parts of it that never act."""

from collections.abc import Iterable, Mapping

import numpy as np

from dynascope.findings.history import Aligned, Streak
from dynascope.record import Finding, Piece

UP, DOWN = "advantage/pushed_up", "advantage/pushed_down"
MOVED = "policy/redistribution/moved"


class OneSidedAdvantages:
    """All advantages have one sign: rollout after rollout, sampled tokens are only pushed down, or only up.

    Its gradient is right on average, but it is noisier than with a baseline, and pushing down moves the probability
    to tokens that nobody has sampled: entropy may rise without anything being learnt, or the policy break down
    (2510.00911 has advantages that are never positive). Less than one token in a hundred one way and more than one in ten
    the other, ten rollouts in a row, is told (our convention); rollouts that push nothing count for nothing.
    """

    reads = (UP, DOWN)
    rare, common, looks = 0.01, 0.1, 10

    def __init__(self) -> None:
        self._aligned = Aligned(self.reads)
        self._streaks = {direction: Streak(self.looks) for direction in ("down", "up")}

    def feed(self, new: Mapping[str, Piece]) -> Iterable[Finding]:
        """At most one finding a direction, at the first of the rollouts."""
        for step, (up, down) in self._aligned.feed(new):
            if not np.isfinite([up, down]).all() or up + down == 0:
                continue
            for direction, most, least in (("down", down, up), ("up", up, down)):
                since = self._streaks[direction].fires(most > self.common and least < self.rare, step)
                if since is not None:
                    yield self._finding(direction, since, float(most), float(least))

    def _finding(self, direction: str, since: int, most: float, least: float) -> Finding:
        return Finding(
            id=f"one-sided-advantages-{direction}",
            severity="warning",
            step=since,
            message=(
                f"From step {since} on {most:.0%} of sampled tokens are pushed {direction} and {least:.1%} the other way: "
                "advantages have one sign, so watch pass@1 beside the entropy."
            ),
            evidence={"most": most, "least": least},
            remedy="from dynascope.rl import center; objective = objective.having(post=(*objective.post, center))",
            source="2510.00911, theorem 1 (advantages that are never positive); 1 % against 10 % at ten rollouts (convention)",
            series=UP,
        )


class NeutralRatios:
    """Ratios never leave the neutral zone, so an entropy-aware objective has two parts that do nothing.

    With one optimizer step a rollout every ratio is 1: redistribution only damps certain tokens, and adaptive bounds hold
    nobody (2509.16591, section 3.3). Fewer than one token in a thousand outside, ten rollouts in a row, is told (our convention).
    """

    reads = (MOVED,)
    rare, looks = 1e-3, 10

    def __init__(self) -> None:
        self._streak = Streak(self.looks)

    def feed(self, new: Mapping[str, Piece]) -> Iterable[Finding]:
        """At most one finding, at the first of the rollouts."""
        for step, value in zip(new[MOVED].steps.tolist(), new[MOVED].values.tolist(), strict=True):
            since = self._streak.fires(value < self.rare, step)
            if since is not None:
                yield Finding(
                    id="neutral-ratios",
                    severity="warning",
                    step=since,
                    message=(
                        f"From step {since} on {value:.2%} of tokens leave the neutral zone of the clip: redistribution "
                        "only damps certain tokens, and adaptive bounds never hold."
                    ),
                    evidence={"moved": value},
                    remedy="config = dataclasses.replace(config, num_passes=2)  # TRL: GRPOConfig(num_iterations=2)",
                    source="2509.16591, section 3.3; 0.1 % at ten rollouts (convention)",
                    series=MOVED,
                )
