"""Findings on fine-tuning between steps of RL: when it takes over."""

from collections.abc import Iterable, Mapping

import numpy as np

from dynascope.findings.history import History
from dynascope.record import Finding, Piece

STEP = "demonstrations/step"


class ConstantFineTuning:
    """A step of fine-tuning follows nearly every step of RL, and goes on to.

    Interleaving pays because it becomes rare by itself as questions are solved; fine-tuning after each RL step lost half
    of the accuracy in the paper's ablation (2506.07527, as reported of its second version). Early on many steps are
    usual, so it speaks when 9 of 10 steps had one over a second window of 50 in a row (our convention).
    """

    reads = (STEP,)
    window, share = 50, 0.9

    def __init__(self) -> None:
        self._history = History(2 * self.window)
        self._has_told = False

    def feed(self, new: Mapping[str, Piece]) -> Iterable[Finding]:
        """At most one finding a run, at the first step of the second window."""
        for place in self._history.extend(new[STEP]):
            last = self._history.values[max(0, place + 1 - 2 * self.window) : place + 1]
            if self._has_told or len(last) < 2 * self.window:
                continue
            first, second = np.nanmean(last[: self.window]), np.nanmean(last[self.window :])
            if min(first, second) >= self.share:
                self._has_told = True
                since = int(self._history.steps[place + 1 - self.window])
                yield Finding(
                    id="constant-fine-tuning",
                    severity="warning",
                    step=since,
                    message=(
                        f"Fine-tuning follows {second:.0%} of the steps of RL and does not become rarer: it may undo what "
                        "RL learns. A larger batch of demonstrations makes it rarer, a smaller rate gentler."
                    ),
                    evidence={"share": float(second), "share_before": float(first)},
                    remedy="interleave = Interleaver(model, task, source, batch_size=4 * 128, schedule='relift')",
                    source="2506.07527, ablation of the interval; 9 of 10 steps over 100 (convention)",
                    series=STEP,
                )
