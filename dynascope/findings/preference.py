"""Findings on preference training: both responses going the same way while their margin grows."""

from collections.abc import Iterable, Mapping

import numpy as np

from dynascope.findings.history import Aligned, Streak
from dynascope.record import Finding, Piece

CHOSEN, REJECTED, RATIO = "logps/chosen", "logps/rejected", "entanglement/norm_ratio"

DIRECTIONS = {"fall": -1, "rise": 1}
REMEDY = (
    "from dynascope.watching.remedied_dpo import RemediedDPOTrainer as DPOTrainer"
    "  # TRL's, with gradients of either response equally long"
)


class SynchronizedLogps:
    """Chosen and rejected responses both became likelier, or both less likely, while the margin between them grew.

    Preference losses ask for the margin alone, so the loss looks well either way (2410.13828). Log-probabilities of
    batches are noisy, as batches differ: levels are medians of ten looks, the noise is that within the first ten, and a
    change counts when it is six times as large as the standard error of a difference of two such medians (our
    convention). The margin, in which what both share cancels, has to have grown by three of its own.
    """

    reads = (CHOSEN, REJECTED, RATIO)
    window, looks, deviations, margin_deviations = 10, 5, 6.0, 3.0
    # A median of n normal values has a standard error of 1.2533 σ/√n, and a difference of two √2 times that.
    median_error = 1.2533 * np.sqrt(2)
    scaled_mad = 1.4826

    def __init__(self) -> None:
        self._aligned = Aligned((CHOSEN, REJECTED))
        self._early: list[tuple[float, float]] = []
        self._recent: list[tuple[float, float]] = []
        self._ratio = np.nan
        self._streaks = {direction: Streak(self.looks) for direction in DIRECTIONS}

    def feed(self, new: Mapping[str, Piece]) -> Iterable[Finding]:
        """At most one finding a direction, at the first of the looks that showed it."""
        ratios = dict(zip(new[RATIO].steps, new[RATIO].values, strict=True)) if RATIO in new else {}
        for step, pair in self._aligned.feed(new):
            self._ratio = next((ratios[one] for one in sorted(ratios, reverse=True) if one <= step), self._ratio)
            if np.isfinite(pair).all():
                yield from self._look(step, (float(pair[0]), float(pair[1])))

    def _look(self, step: int, pair: tuple[float, float]) -> Iterable[Finding]:
        if len(self._early) < self.window:
            self._early.append(pair)
            return
        self._recent = [*self._recent, pair][-self.window :]
        if len(self._recent) < self.window:
            return
        early, recent = np.array(self._early), np.array(self._recent)
        change = np.median(recent, 0) - np.median(early, 0)
        margin = np.median(recent[:, 0] - recent[:, 1]) - np.median(early[:, 0] - early[:, 1])
        errors = [self._error(early[:, 0]), self._error(early[:, 1])]
        has_grown = margin > self.margin_deviations * self._error(early[:, 0] - early[:, 1])
        is_far = bool((np.abs(change) > self.deviations * np.array(errors)).all())
        for direction, sign in DIRECTIONS.items():
            is_together = is_far and has_grown and bool((sign * change > 0).all())
            since = self._streaks[direction].fires(is_together, step)
            if since is not None:
                yield self._finding(direction, since, step, change, float(margin))

    def _error(self, values: np.ndarray) -> float:
        spread = self.scaled_mad * float(np.median(np.abs(values - np.median(values))))
        return float(self.median_error * max(spread, 1e-6) / np.sqrt(self.window))

    def _finding(self, direction: str, since: int, step: int, change: np.ndarray, margin: float) -> Finding:
        verb = "fell" if direction == "fall" else "rose"
        measured = np.isfinite(self._ratio)
        why = f" Rejected gradients are {self._ratio:.2g} times as long as chosen ones." if measured else ""
        told = "good answers get rarer" if direction == "fall" else "bad answers get likelier"
        evidence = {"chosen": float(change[0]), "rejected": float(change[1]), "margin": margin, "seen_at": step}
        return Finding(
            id=f"synchronized-{direction}",
            severity="warning",
            step=since,
            message=(
                f"Log-probabilities of chosen and rejected responses both {verb} since the start (by {abs(change[0]):.3g} "
                f"and {abs(change[1]):.3g} nats) while their margin grew by {margin:.3g}: {told}.{why}"
            ),
            evidence=evidence | ({"norm_ratio": float(self._ratio)} if measured else {}),
            remedy=REMEDY,
            source="2410.13828, section 3; six standard errors of a difference of medians (convention)",
            series=CHOSEN,
        )
