"""Findings on gradients, updates and Adam's second moment."""

from collections.abc import Iterable, Mapping

import numpy as np

from dynascope.findings.history import History, Streak
from dynascope.record import Finding, Piece


class ExplodingGradients:
    """The gradient's norm has grown far above its recent size, or overflowed."""

    reads = ("gradients/total_norm_unclipped", "gradients/total_norm")
    # Ten times the median of the last 100 looks, for 3 looks in a row (convention).
    window, growth, looks = 100, 10.0, 3

    def __init__(self) -> None:
        self._history = History(self.window + self.looks)
        self._streak = Streak(self.looks)
        self._has_told_nan = False
        self._source: str | None = None

    def feed(self, new: Mapping[str, Piece]) -> Iterable[Finding]:
        """Growth or overflow among the new norms; norms before clipping are preferred, as clipping hides growth."""
        self._source = self._source or next(name for name in self.reads if name in new)
        if self._source not in new:
            return
        fresh = self._history.extend(new[self._source])
        usual = self._history.rolling_median(self.window, lag=self.looks)
        for index in fresh:
            step, norm = int(self._history.steps[index]), float(self._history.values[index])
            if not np.isfinite(norm) and not self._has_told_nan:
                self._has_told_nan = True
                yield self._finding("critical", step, f"The gradient's norm is {norm}.", {"norm": str(norm)})
            since = self._streak.fires(norm > self.growth * usual[index], step)
            if since is not None:
                times = norm / usual[index]
                message = f"The gradient's norm is {norm:.3g}, {times:.0f} times what was usual ({usual[index]:.3g})."
                yield self._finding("warning", since, message, {"norm": norm, "usual": float(usual[index])})

    def _finding(self, severity: str, step: int, message: str, evidence: Mapping[str, object]) -> Finding:
        return Finding(
            id="exploding-gradients",
            severity="critical" if severity == "critical" else "warning",
            step=step,
            message=message,
            evidence=evidence,
            remedy="torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # between backward() and step()",
            source="convention: 10 times the median of the last 100 looks; clipping: 1211.5063",
            series=self._source or self.reads[0],
        )


class VanishingGradients:
    """Almost no gradient reaches the early parameters, or any."""

    reads = ("gradients/norm", "gradients/total_norm")
    # The early third of the parameters gets a 100 000th of what the late third gets, for 3 looks (convention).
    ratio, smallest, looks = 1e-5, 1e-9, 3

    def __init__(self) -> None:
        self._by_depth, self._at_all = Streak(self.looks), Streak(self.looks)

    def feed(self, new: Mapping[str, Piece]) -> Iterable[Finding]:
        """Vanishing with depth, and altogether."""
        norms = new.get("gradients/norm")
        if norms is not None and norms.values.shape[1] >= 6:
            third = norms.values.shape[1] // 3
            early = np.nanmedian(_quiet(norms.values[:, :third]), axis=1)
            late = np.nanmedian(_quiet(norms.values[:, -third:]), axis=1)
            for step, first, last in zip(norms.steps, early, late, strict=True):
                since = self._by_depth.fires(bool(first < self.ratio * last), int(step))
                if since is not None:
                    message = f"Early parameters get gradients of {first:.2g}, late ones of {last:.2g}."
                    yield self._finding(since, message, {"early": float(first), "late": float(last)}, "gradients/norm")
        total = new.get("gradients/total_norm")
        if total is not None:
            for step, norm in zip(total.steps, total.values, strict=True):
                since = self._at_all.fires(bool(norm < self.smallest), int(step))
                if since is not None:
                    message = f"The whole gradient has a norm of {norm:.2g}: nothing is learnt."
                    yield self._finding(since, message, {"norm": float(norm)}, "gradients/total_norm")

    def _finding(self, step: int, message: str, evidence: Mapping[str, object], series: str) -> Finding:
        return Finding(
            id="vanishing-gradients",
            severity="warning",
            step=step,
            message=message,
            evidence=evidence,
            remedy="x = x + block(norm(x))  # residual connections with pre-normalisation carry gradients to early layers",
            source="convention: ratio of early to late below 1e-5; the effect: Glorot and Bengio (2010)",
            series=series,
        )


class UpdateRatio:
    """Steps that are far too large or too small for the weights they change."""

    reads = ("updates/ratio", "learning_rate")
    # About 1e-3 is healthy (convention); two decades above, or three below, for 3 looks.
    largest, smallest, looks = 0.1, 1e-6, 3

    def __init__(self) -> None:
        self._large, self._small = Streak(self.looks), Streak(self.looks)
        self._highest_lr = self._lr = 0.0

    def feed(self, new: Mapping[str, Piece]) -> Iterable[Finding]:
        """Ratios out of range, judged by the median over parameters; small ones only while the lr is near its peak."""
        rates = new.get("learning_rate")
        by_step = {}
        if rates is not None:
            highest = np.nanmax(_quiet(rates.values), axis=1) if rates.values.shape[1] else np.zeros(len(rates))
            by_step = dict(zip(rates.steps.tolist(), highest.tolist(), strict=True))
        ratios = new.get("updates/ratio")
        if ratios is None:
            self._note_rates(by_step.values())
            return
        for step, row in zip(ratios.steps, ratios.values, strict=True):
            self._note_rates([rate for at, rate in by_step.items() if at <= step])
            by_step = {at: rate for at, rate in by_step.items() if at > step}
            row = row[np.isfinite(row)]
            if not row.size:
                continue
            middle = float(np.median(row))
            if (since := self._large.fires(middle > self.largest, int(step))) is not None:
                yield self._finding(since, middle, "large: weights are overwritten, not adjusted", 0.1)
            is_full_speed = self._lr >= 0.1 * self._highest_lr > 0
            if (since := self._small.fires(middle < self.smallest and is_full_speed, int(step))) is not None:
                yield self._finding(since, middle, "small: the weights hardly move", 10.0)
        self._note_rates(by_step.values())

    def _note_rates(self, rates: Iterable[float]) -> None:
        for rate in rates:
            if np.isfinite(rate):
                self._lr, self._highest_lr = rate, max(self._highest_lr, rate)

    def _finding(self, step: int, ratio: float, what: str, factor: float) -> Finding:
        return Finding(
            id="update-ratio",
            severity="warning",
            step=step,
            message=f"A step changes the typical parameter by {ratio:.1g} of its size, which is too {what}.",
            evidence={"median_ratio": ratio, "healthy": 1e-3},
            remedy=f"for group in optimizer.param_groups: group['lr'] *= {factor:g}",
            source="convention: about 1e-3 is healthy",
            series="updates/ratio",
        )


class DivergencePrecursor:
    """Adam's second moment is out of date while gradients grow: spikes tend to follow within a few steps."""

    reads = ("adam/update_rms", "gradients/total_norm_unclipped", "gradients/total_norm")
    # 2304.13013, section 3.4: update RMS above 2.3 precedes loss spikes. That gradients grow as well is our condition.
    limit, growth, window, looks = 2.3, 3.0, 20, 2

    def __init__(self) -> None:
        self._norms = History(2 * self.window)
        self._streak = Streak(self.looks)
        self._source: str | None = None

    def feed(self, new: Mapping[str, Piece]) -> Iterable[Finding]:
        """The joint condition, at each look at the second moment."""
        self._source = self._source or next((name for name in self.reads[1:] if name in new), None)
        if self._source is not None and self._source in new:
            self._norms.extend(new[self._source])
        stale = new.get("adam/update_rms")
        if stale is None or not len(self._norms.values):
            return
        usual = self._norms.rolling_median(self.window, lag=1)
        for step, row in zip(stale.steps, stale.values, strict=True):
            before = np.flatnonzero(self._norms.steps <= step)
            if not before.size or np.isnan(row).all():
                continue
            at = before[-1]
            has_grown = bool(self._norms.values[at] > self.growth * usual[at])
            place = int(np.nanargmax(row))
            since = self._streak.fires(has_grown and bool(row[place] > self.limit), int(step))
            if since is not None:
                where = str(stale.coords["parameter"][place])
                yield Finding(
                    id="divergence-precursor",
                    severity="warning",
                    step=since,
                    message=(
                        f"Adam's second moment lags behind growing gradients (update RMS {row[place]:.2g} in {where}): "
                        "a loss spike is likely within a few steps."
                    ),
                    evidence={
                        "update_rms": float(row[place]),
                        "gradient_growth": float(self._norms.values[at] / usual[at]),
                    },
                    remedy="optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))  # a shorter memory",
                    source="2304.13013, section 3.4: RMS above 2.3",
                    series="adam/update_rms",
                    where=where,
                )


def _quiet(values: np.ndarray) -> np.ndarray:
    """Rows of only NaN give NaN without a warning when a zero-width fallback stands in."""
    return np.where(np.isnan(values).all(axis=1, keepdims=True), 0.0, values)
