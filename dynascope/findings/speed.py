"""Findings on speed."""

from collections.abc import Iterable, Mapping

import numpy as np

from dynascope.findings.history import History, Streak
from dynascope.record import Finding, Piece


class ThroughputLoss:
    """Steps have become lastingly slower than they were."""

    reads = ("time/step",)
    # Half again as long as the best stretch of 50 steps, for 50 steps (convention).
    window, slowdown = 50, 1.5

    def __init__(self) -> None:
        self._history = History(self.window)
        self._streak = Streak(self.window)
        self._best = np.inf

    def feed(self, new: Mapping[str, Piece]) -> Iterable[Finding]:
        """One finding a run."""
        fresh = self._history.extend(new["time/step"])
        usual = self._history.rolling_median(self.window)
        for index in fresh:
            if self._history.count - (len(self._history.values) - 1 - index) <= self.window or np.isnan(usual[index]):
                continue
            self._best = min(self._best, float(usual[index]))
            since = self._streak.fires(bool(usual[index] > self.slowdown * self._best), int(self._history.steps[index]))
            if since is not None:
                now = float(usual[index])
                yield Finding(
                    id="throughput-loss",
                    severity="warning",
                    step=since,
                    message=f"A step takes {now:.3g} s, {now / self._best:.1f} times what it took at best ({self._best:.3g} s).",
                    evidence={"now": now, "best": self._best},
                    remedy="loader = DataLoader(data, num_workers=4, persistent_workers=True, pin_memory=True)",
                    source="convention: 1.5 times the best stretch of 50 steps",
                    series="time/step",
                )
