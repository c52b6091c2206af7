"""Findings on policy optimization: an objective that only ever pushes one way."""

from collections.abc import Iterable, Mapping

import numpy as np
import xarray as xr

from dynascope.findings.history import Streak
from dynascope.record import Finding

UP, DOWN = "advantage/pushed_up", "advantage/pushed_down"


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
        self._pending: dict[str, dict[int, float]] = {UP: {}, DOWN: {}}
        self._streaks = {direction: Streak(self.looks) for direction in ("down", "up")}

    def feed(self, new: Mapping[str, xr.DataArray]) -> Iterable[Finding]:
        """At most one finding a direction, at the first of the rollouts."""
        for name, waiting in self._pending.items():
            if name in new:
                waiting.update(zip(new[name]["step"].values.tolist(), new[name].values.tolist(), strict=True))
        for step in sorted(self._pending[UP].keys() & self._pending[DOWN].keys()):
            up, down = self._pending[UP].pop(step), self._pending[DOWN].pop(step)
            if not np.isfinite([up, down]).all() or up + down == 0:
                continue
            for direction, most, least in (("down", down, up), ("up", up, down)):
                since = self._streaks[direction].fires(most > self.common and least < self.rare, step)
                if since is not None:
                    yield self._finding(direction, since, most, least)

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
