"""Findings on scan and snap: when attention stopped moving, and whether it was frozen early (2305.16380)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Float

from dynascope.findings.history import Streak
from dynascope.record import Finding

Points = Float[np.ndarray, " points"]

# Points of log step that are fitted, the coarse ones among them where pieces may meet, and what is too small to be news.
WIDTH, PLACES, NEGLIGIBLE = 0.05, 40, 1e-3
# Frozen: at least three times slower than scanning (2305.16380 gives log log t after the snap against log t before; the
# factor is ours), over at least as many steps as there were before; the piece before made half of the whole way.
SLOWER, SINCE, SHARE, CONFIDENT = 3.0, 2.0, 0.5, 0.5


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

    def add(self, step: int, value: float) -> bool:
        """Take in one measurement, and tell whether it opens a new piece; what is not finite is left out."""
        if not np.isfinite(value):
            return False
        place = self.place(step)
        is_new = place not in self._bins
        count, total_x, total = self._bins.get(place, (0, 0.0, 0.0))
        self._bins[place] = count + 1, total_x + float(np.log1p(step)), total + value
        return is_new

    def place(self, step: int) -> int:
        """The number of the piece that a step lies in."""
        return int(np.log1p(step) / WIDTH)

    def points(self, before: int | None = None) -> tuple[Points, Points]:
        """Mean ln(1 + step) and mean value of every piece, or of those before the one with this number."""
        kept = [one for place, one in sorted(self._bins.items()) if before is None or place < before]
        table = np.array(kept, dtype=np.float64).reshape(-1, 3)
        return table[:, 1] / table[:, 0], table[:, 2] / table[:, 0]


def detect_snap(series: xr.DataArray) -> SnapReport | None:
    """Where a scalar series over `step` stopped moving in log step: the end of scanning. None if it did not.

    Fits two or three straight pieces that meet, in ln(1 + step): perhaps a wait, then the scan, then what comes after.
    Reported is the end of the scan where the curve afterwards is three times slower, for as many steps again as it took
    to get there. Constant, still moving and accelerating series give None.

    Raises ValueError for a series with more axes than its steps.

    >>> detect_snap(dynascope.open("runs/mine")["attention/entropy_normalized"].mean(("layer", "head")))
    """
    if series.dims != ("step",):
        raise ValueError(f"detect_snap reads one number a step, not {series.dims}; average over the other axes first")
    bins = LogBins()
    for step, value in zip(series["step"].values, series.values, strict=True):
        bins.add(int(step), float(value))
    return _break_of(*bins.points())


class AttentionSnap:
    """Attention stopped scanning, and perhaps too early: dense still, while the loss goes on falling.

    Reads the series of the probe `ScanSnap`. "Early" is that more than four fifths of the starting entropy are left and
    the loss fell by another twentieth since (ours; 2305.16380 has it that a faster decoder freezes denser attention).
    """

    reads = ("scan/entropy", "loss")
    dense, falling, looks = 0.8, 0.05, 3

    def __init__(self) -> None:
        self._entropy: dict[int, LogBins] = {}
        self._streaks: dict[int, Streak] = {}
        self._loss = LogBins()

    def feed(self, new: Mapping[str, xr.DataArray]) -> Iterable[Finding]:
        """One finding a layer."""
        if "loss" in new:
            for step, value in zip(new["loss"]["step"].values, new["loss"].values, strict=True):
                self._loss.add(int(step), float(value))
        entropy = new.get("scan/entropy")
        if entropy is None:
            return
        is_alone = entropy.sizes["layer"] == entropy.sizes["head"] == 1
        for step, now in zip(entropy["step"].values, entropy.values, strict=True):
            for layer, name in enumerate(entropy["layer"].values):
                bins = self._entropy.setdefault(layer, LogBins())
                known = now[layer][np.isfinite(now[layer])]
                if not known.size or not bins.add(int(step), float(known.mean())):
                    continue
                # A piece is judged once the next one opens, so that it makes no difference how the record is cut.
                report = _break_of(*bins.points(before=bins.place(int(step))))
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
            told += f" The loss has fallen by another {fall:.0%} since: the decoder outran attention and froze it early."
        if not is_alone:
            told += " (Several heads or layers are outside the assumptions of the theorem.)"
        remedy = "optimizer = torch.optim.AdamW(dynascope.optim.attention_decoder_param_groups(model, lr, {}))"
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
            remedy=remedy.format("decoder_multiplier=0.2")
            + ("  # a slower decoder scans for longer" if is_early else "  # only if attention should become sparser"),
            source="2305.16380: the phase transition comes earlier, and attention stays denser, with a faster decoder",
            series="scan/entropy",
            where=layer,
        )


def _break_of(x: Points, y: Points) -> SnapReport | None:
    if len(x) < 8 or np.ptp(y) <= 1e-9 * max(1.0, float(np.abs(y).max())):
        return None
    floor = len(x) * (NEGLIGIBLE * np.ptp(y)) ** 2
    places = x[np.unique(np.linspace(2, len(x) - 3, min(PLACES, len(x) - 4)).round().astype(int))]
    line = _fit(x, y, places[:0][None])[0][0] + floor
    two, two_slopes = _fit(x, y, places[:, None])
    pairs = np.array([(a, b) for i, a in enumerate(places) for b in places[i + 2 :]])
    best = int(two.argmin())
    knots, slopes, misfit, without = places[best : best + 1], two_slopes[best], two[best] + floor, line
    if len(pairs):
        three, three_slopes = _fit(x, y, pairs)
        place = int(three.argmin())
        # A second break costs two numbers more (Bayesian information criterion); before it the curve waits, or is slower.
        is_better = len(x) * np.log((three[place] + floor) / misfit) < -2 * np.log(len(x))
        if is_better and abs(three_slopes[place][0]) < abs(three_slopes[place][1]):
            knots, slopes, without, misfit = pairs[place], three_slopes[place], misfit, three[place] + floor
    # The coarse grid of breaks is refined around the last one.
    around = np.linspace(max(knots[-1] - 0.3, x[1]), min(knots[-1] + 0.3, x[-2]), 61)
    around = around[around > knots[-2] + WIDTH] if len(knots) > 1 else around
    finer, finer_slopes = _fit(x, y, np.column_stack([np.tile(knots[:-1], (len(around), 1)), around]))
    place = int(finer.argmin())
    broke, slopes, misfit = around[place], finer_slopes[place], min(misfit, finer[place] + floor)
    scanning, frozen = slopes[-2], slopes[-1]
    lengths = np.diff([x[0], *knots[:-1], broke])
    confidence = 1 - misfit / without
    is_frozen = abs(frozen) * SLOWER <= abs(scanning) and x[-1] - broke >= np.log(SINCE)
    is_main = abs(float(slopes[:-1] @ lengths)) >= SHARE * np.ptp(y)
    if not (is_frozen and is_main and confidence >= CONFIDENT):
        return None
    return SnapReport(round(float(np.expm1(broke))), float(confidence), float(scanning), float(frozen))


def _fit(
    x: Points, y: Points, knots: Float[np.ndarray, "fits knots"]
) -> tuple[Float[np.ndarray, " fits"], Float[np.ndarray, "fits pieces"]]:
    """Sum of squares left by the best line that bends at given places, and its slopes, for many choices of places."""
    plain = np.broadcast_to(np.stack([np.ones_like(x), x], 1), (len(knots), len(x), 2))
    basis = np.concatenate([plain, np.maximum(x[:, None] - knots[:, None, :], 0.0)], axis=2)
    orthogonal, triangle = np.linalg.qr(basis)
    projected = np.einsum("fpk,p->fk", orthogonal, y)
    left = ((y - np.einsum("fpk,fk->fp", orthogonal, projected)) ** 2).sum(1)
    solved = np.linalg.solve(triangle, projected[..., None])[..., 0]
    return left, solved[:, 1:].cumsum(1)
