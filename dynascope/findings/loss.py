"""Findings on the loss: spikes, divergence, the end of progress."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from dynascope.findings.history import History, trailing_median
from dynascope.record import Finding, Piece

# A robust z-score: 6 scaled median absolute deviations. Under Gaussian noise one step in 10^9 lies beyond (convention).
SPIKE_DEVIATIONS = 6.0
SCALED_MAD = 1.4826


class LossSpike:
    """A loss far above its recent course, a loss that stays there, or one that is no number any more."""

    reads = ("loss",)
    window, most_told, apart = 48, 5, 50

    def __init__(self) -> None:
        self._history = History(2 * self.window)
        self._last_spike: int | None = None
        self._level_before = np.nan
        self._height = np.nan
        self._told = 0
        self._has_diverged = self._has_told_nan = False

    def feed(self, new: Mapping[str, Piece]) -> Iterable[Finding]:
        """Spikes among the new losses."""
        fresh = self._history.extend(new["loss"])
        values, steps = self._history.values, self._history.steps
        if not self._has_told_nan and len(bad := [i for i in fresh if not np.isfinite(values[i])]):
            self._has_told_nan = True
            yield self._not_a_number(int(steps[bad[0]]), float(values[bad[0]]), self._last_finite(bad[0]))
        usual = self._history.rolling_median(self.window, lag=1)
        spread = trailing_median(np.abs(values - usual), self.window, lag=1)
        limit = usual + np.maximum(SPIKE_DEVIATIONS * SCALED_MAD * spread, 0.1 * np.abs(usual))
        values = np.where(np.isfinite(values), values, np.nan)  # what is no number is told above
        above = values > limit
        # One loud batch is no spike: two losses in a row, or one that stands out twice as far.
        far = values > usual + 2 * (limit - usual)
        is_spike = far | (above & np.concatenate([[False], above[:-1]]))
        for index in fresh:
            if is_spike[index]:
                yield from self._spike(
                    int(steps[index]), float(values[index]), float(usual[index]), float(limit[index])
                )
            yield from self._still_up(int(steps[index]), index)

    def _spike(self, step: int, loss: float, usual: float, limit: float) -> Iterator[Finding]:
        is_new = self._last_spike is None or step - self._last_spike > self.apart
        if is_new:
            self._level_before, self._height, self._onset = usual, limit - usual, step
        self._last_spike = step
        if not is_new or self._told >= self.most_told:
            return
        self._told += 1
        yield Finding(
            id="loss-spike",
            severity="warning",
            step=step,
            message=f"The loss jumped to {loss:.4g}, where about {usual:.4g} was usual.",
            evidence={"loss": loss, "usual": usual, "limit": limit},
            remedy="torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # before optimizer.step(), or a lower lr",
            source="convention: 6 scaled median absolute deviations; spikes as in 2204.02311, section 5.1",
            series="loss",
        )

    def _still_up(self, step: int, index: int) -> Iterator[Finding]:
        """A spike that did not come down within 50 steps is a divergence."""
        if self._last_spike is None or self._has_diverged or step - self._onset != self.apart:
            return
        level = float(np.nanmedian(self._history.values[max(0, index - self.apart // 2) : index + 1]))
        if level > self._level_before + self._height:
            self._has_diverged = True
            yield Finding(
                id="divergence",
                severity="critical",
                step=self._onset,
                message=f"The loss rose from {self._level_before:.4g} to {level:.4g} and has not come back.",
                evidence={"before": self._level_before, "after": level, "steps": self.apart},
                remedy="for group in optimizer.param_groups: group['lr'] *= 0.3  # from the last good checkpoint on",
                source="convention: above the spike limit for 50 steps",
                series="loss",
            )

    def _not_a_number(self, step: int, value: float, last: tuple[int, float] | None) -> Finding:
        before = f"; the last number was {last[1]:.4g} at step {last[0]}" if last else ""
        return Finding(
            id="loss-not-finite",
            severity="critical",
            step=step,
            message=f"The loss is {value}{before}.",
            evidence={"loss": str(value), "last_finite_step": last[0] if last else None},
            remedy="torch.autograd.set_detect_anomaly(True)  # rerun from the last good checkpoint to find the operation",
            source="IEEE 754",
            series="loss",
        )

    def _last_finite(self, index: int) -> tuple[int, float] | None:
        earlier = np.flatnonzero(np.isfinite(self._history.values[:index]))
        return (
            (int(self._history.steps[earlier[-1]]), float(self._history.values[earlier[-1]])) if earlier.size else None
        )


class Plateau:
    """The loss has stopped falling for a good part of the run: converged, or stuck."""

    reads = ("loss",)
    window = 32
    # No progress of 1 % of the whole way down, for 200 steps and for 30 % of the run (convention).
    progress, fewest_steps, share = 0.01, 200, 0.3

    def __init__(self) -> None:
        self._history = History(self.window)
        self._first = self._best = np.nan
        self._best_step = 0
        self._has_told = False

    def feed(self, new: Mapping[str, Piece]) -> Iterable[Finding]:
        """One finding when progress has stopped for long enough."""
        fresh = self._history.extend(new["loss"])
        smooth = self._history.rolling_median(self.window)
        for index in fresh:
            step, level = int(self._history.steps[index]), smooth[index]
            if self._has_told or not np.isfinite(level):
                continue
            if np.isnan(self._first):
                self._first = self._best = level
                self._best_step = step
            if self._best - level > self.progress * abs(self._first - self._best) + 1e-12 * abs(self._first):
                self._best, self._best_step = level, step
            waited = step - self._best_step
            if waited >= max(self.fewest_steps, self.share * step):
                self._has_told = True
                yield Finding(
                    id="plateau",
                    severity="info",
                    step=self._best_step,
                    message=f"The loss has stopped falling: {level:.4g} for {waited} steps (it began at {self._first:.4g}).",
                    evidence={"level": level, "first": self._first, "steps_without_progress": waited},
                    remedy="scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=200)",
                    source="convention: under 1 % of the way down in 30 % of the run",
                    series="loss",
                )
