"""Findings on scan and snap: when attention stopped moving, and whether it was frozen early (2305.16380)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from dynascope.findings.history import Streak, log_slope
from dynascope.record import Finding, Piece

if TYPE_CHECKING:
    import xarray

Points = Float[np.ndarray, " points"]

# Width of a piece of log step; places where a fit may bend; what is too small to be news, as a share of the whole range.
WIDTH, PLACES, NEGLIGIBLE = 0.05, 16, 1e-3
# Frozen: at least three times slower than scanning (2305.16380 gives log log t after the snap against log t before; the
# factor is ours), over at least as many steps as there were before. The movement before made half of the whole way, stands
# out of the scatter four times, and no shorter curve than twelve points is judged (all ours).
SLOWER, SINCE, SHARE, CONFIDENT, CLEAR, FEWEST = 3.0, 2.0, 0.5, 0.5, 4.0, 12


@dataclass(frozen=True)
class SnapReport:
    """Where a curve over log step broke, and how fast it moved before and after."""

    step: int
    confidence: float
    """Share of the misfit of the same curve without this break that the break explains: 1 is perfect."""
    scanning_rate: float
    """Change of the series per unit of ln(step) before the break."""
    frozen_rate: float
    """The same after it."""


class LogBins:
    """A series as means over equal pieces of ln(1 + step): a few hundred numbers however long the run is.

    >>> bins = LogBins()
    >>> bins.add(100, 0.5)
    """

    def __init__(self) -> None:
        self._bins: dict[int, tuple[int, float, float]] = {}

    def add(self, step: int, value: float) -> None:
        """Take in one measurement; what is not finite is left out."""
        if not np.isfinite(value):
            return
        place = self.place(step)
        count, total_x, total = self._bins.get(place, (0, 0.0, 0.0))
        self._bins[place] = count + 1, total_x + float(np.log1p(step)), total + value

    def place(self, step: int) -> int:
        """The number of the piece that a step lies in."""
        return int(np.log1p(step) / WIDTH)

    def points(self, before: int | None = None) -> tuple[Points, Points]:
        """Mean ln(1 + step) and mean value of every piece, or of those before the one with this number."""
        kept = [one for place, one in sorted(self._bins.items()) if before is None or place < before]
        table = np.array(kept, dtype=np.float64).reshape(-1, 3)
        return table[:, 1] / table[:, 0], table[:, 2] / table[:, 0]


def detect_snap(series: "xarray.DataArray") -> SnapReport | None:
    """Where a scalar series over `step` stopped moving in log step: the end of scanning. None if it did not.

    Fits two or three straight pieces that meet, in ln(1 + step): perhaps a wait, then the scan, then what comes after.
    Reported is the end of the scan where the curve afterwards is three times slower, for as many steps again as it took
    to get there. Constant, still moving and accelerating series give None.

    Raises ValueError for a series with more axes than its steps.

    >>> detect_snap(dynascope.open("runs/mine")["attention/entropy_normalized"].mean(("layer", "head")))
    """
    _refuse_axes("detect_snap", series)
    bins = LogBins()
    for step, value in zip(series["step"].values, series.values, strict=True):
        bins.add(int(step), float(value))
    return _break_of(*bins.points())


def log_step_rate(series: "xarray.DataArray", width: float = 0.9) -> "xarray.DataArray":
    """How fast a scalar series moves per unit of ln(step), d series / d ln(step), step by step: is attention scanning still?

    Each rate is the slope of a straight line over the last `width` of ln(step), of three points at least; steps before which
    there is less are left out. Source: 2305.16380 (attention moves as log t before the snap and as log log t after it).

    Raises ValueError for a series with more axes than its steps, and a width that is not above 0.

    >>> log_step_rate(dynascope.open("runs/mine")["scan/entropy"].mean(("layer", "head")))
    """
    _refuse_axes("log_step_rate", series)
    if width <= 0:
        raise ValueError(f"width={width} must be above 0")
    series = series[series.step > 0]
    steps, values = series["step"].values, series.values
    since = steps * np.exp(-width)
    firsts = np.searchsorted(steps, since)
    places = [i for i, first in enumerate(firsts) if since[i] >= steps[0] and i - first > 1]
    rates = [log_slope(steps[firsts[i] : i + 1], values[firsts[i] : i + 1], float(since[i])) for i in places]
    return series.isel(step=places).copy(data=rates)


class AttentionSnap:
    """Attention stopped scanning, and perhaps too early: dense still, while the loss goes on falling.

    Reads the series of the probe `ScanSnap`. "Early" is that more than four fifths of the starting entropy are left and
    the loss fell by another twentieth since (ours; 2305.16380 has it that a faster decoder freezes denser attention).
    """

    reads = ("scan/entropy", "loss")
    # Judged whenever the steps have grown by a fifth; twice in a row is enough.
    dense, falling, apart, looks = 0.8, 0.05, 4, 2

    def __init__(self) -> None:
        self._judged: dict[int, int] = {}
        self._entropy: dict[int, LogBins] = {}
        self._streaks: dict[int, Streak] = {}
        self._loss = LogBins()

    def feed(self, new: Mapping[str, Piece]) -> Iterable[Finding]:
        """One finding a layer."""
        if "loss" in new:
            for step, value in zip(new["loss"].steps, new["loss"].values, strict=True):
                self._loss.add(int(step), float(value))
        entropy = new.get("scan/entropy")
        if entropy is None:
            return
        is_alone = entropy.values[0].size == 1
        for step, now in zip(entropy.steps, entropy.values, strict=True):
            for layer, name in enumerate(entropy.coords["layer"]):
                bins = self._entropy.setdefault(layer, LogBins())
                known = now[layer][np.isfinite(now[layer])]
                place = bins.place(int(step))
                if known.size:
                    bins.add(int(step), float(known.mean()))
                if place < self._judged.get(layer, 0) + self.apart:
                    continue
                # Only whole pieces are judged, so that it makes no difference how the record is cut.
                self._judged[layer] = place
                report = _break_of(*bins.points(before=place))
                streak = self._streaks.setdefault(layer, Streak(self.looks))
                if streak.fires(report is not None, int(step)) is not None and report is not None:
                    yield self._finding(report, int(step), bins, str(name), is_alone)

    def _finding(self, report: SnapReport, step: int, bins: LogBins, layer: str, is_alone: bool) -> Finding:
        _, levels = bins.points(before=bins.place(step))
        kept = float(levels[-1] / levels[0])
        at, losses = self._loss.points(before=self._loss.place(step))
        after = np.flatnonzero(at >= np.log1p(report.step))
        fall = float(1 - losses[-1] / losses[after[0]]) if after.size else 0.0
        is_early = kept > self.dense and fall > self.falling
        slower = abs(report.scanning_rate) / max(abs(report.frozen_rate), 1e-9)
        told = (
            f"Attention in {layer} stopped moving at step {report.step}: its entropy is at {kept:.0%} of where it began "
            f"and changes {min(slower, 1000):.0f} times slower than before."
        )
        if is_early:
            told += (
                f" The loss has fallen by another {fall:.0%} since: the decoder outran attention and froze it early."
            )
        if not is_alone:
            told += " (Several heads or layers are outside the assumptions of the theorem.)"
        remedy = (
            "from dynascope.optim import attention_decoder_param_groups; optimizer = "
            "torch.optim.AdamW(attention_decoder_param_groups(model, lr, decoder_multiplier=0.2))  # "
        )
        return Finding(
            id="attention-snap",
            severity="warning" if is_early else "info",
            step=report.step,
            message=told,
            evidence={
                "entropy_kept": kept,
                "scanning_rate": report.scanning_rate,
                "frozen_rate": report.frozen_rate,
                "confidence": report.confidence,
                "loss_fell_since": fall,
            },
            remedy=remedy
            + ("a slower decoder scans for longer" if is_early else "only if attention should be sparser"),
            source="2305.16380: the phase transition comes earlier, and attention stays denser, with a faster decoder",
            series="scan/entropy",
            where=layer,
        )


def _refuse_axes(reader: str, series: "xarray.DataArray") -> None:
    if series.dims != ("step",):
        raise ValueError(f"{reader} reads one number a step, not {series.dims}; average over the other axes first")


def _break_of(x: Points, y: Points) -> SnapReport | None:
    span = float(np.ptp(y)) if len(y) else 0.0
    if len(x) < FEWEST or span <= 1e-9 * max(1.0, float(np.abs(y).max())):
        return None
    floor = len(x) * (NEGLIGIBLE * span) ** 2
    places = x[np.unique(np.linspace(2, len(x) - 3, PLACES).round().astype(int))]
    pairs = np.array([(a, b) for i, a in enumerate(places) for b in places[i + 1 :]])
    line, one, two = (_best(x, y, knots) for knots in (np.empty((1, 0)), places[:, None], pairs))
    best, without = one, line.misfit + floor
    # A second break costs two numbers more (Bayesian information criterion); before it the curve waits, or is slower.
    is_better = len(x) * np.log((two.misfit + floor) / (one.misfit + floor)) < -2 * np.log(len(x))
    if is_better and abs(two.slopes[0]) < abs(two.slopes[1]):
        best, without = two, one.misfit + floor
    if abs(best.slopes[-1]) * SLOWER / 2 > abs(best.slopes[-2]):
        return None  # far from frozen: finer places make no such difference
    for reach in (0.6, 0.3, 0.1):  # from the coarse places to finer ones
        for which in reversed(range(len(best.knots))):
            moved = np.tile(best.knots, (25, 1))
            moved[:, which] += np.linspace(-reach, reach, 25)
            is_inside = (moved[:, 0] > x[0]) & (moved[:, -1] < x[-1]) & (np.diff(moved, axis=1) > WIDTH).all(1)
            if is_inside.any():
                best = min(best, _best(x, y, moved[is_inside]), key=lambda fit: fit.misfit)
    broke, (scanning, frozen) = float(best.knots[-1]), best.slopes[-2:]
    way = abs(float(best.slopes[:-1] @ np.diff([x[0], *best.knots])))
    confidence = 1 - (best.misfit + floor) / without
    is_frozen = abs(frozen) * SLOWER <= abs(scanning) and x[-1] - broke >= np.log(SINCE)
    is_main = way >= max(SHARE * span, CLEAR * np.sqrt(best.misfit / len(x)))
    if not (is_frozen and is_main and confidence >= CONFIDENT):
        return None
    return SnapReport(round(float(np.expm1(broke))), float(confidence), float(scanning), float(frozen))


@dataclass(frozen=True)
class _Fit:
    """A line that bends at `knots`, what it leaves of the sum of squares, and the slopes of its pieces."""

    knots: Float[np.ndarray, " knots"]
    misfit: float
    slopes: Float[np.ndarray, " pieces"]


def _best(x: Points, y: Points, knots: Float[np.ndarray, "fits knots"]) -> _Fit:
    """The best of many fits with given places to bend."""
    plain = np.broadcast_to(np.stack([np.ones_like(x), x], 1), (len(knots), len(x), 2))
    basis = np.concatenate([plain, np.maximum(x[:, None] - knots[:, None, :], 0.0)], axis=2)
    turned = basis.transpose(0, 2, 1)
    solved = np.linalg.solve(turned @ basis, (turned @ y)[..., None])
    misfits = ((y - (basis @ solved)[..., 0]) ** 2).sum(1)
    place = int(misfits.argmin())
    return _Fit(knots[place], float(misfits[place]), solved[place, 1:, 0].cumsum())
