"""Findings on curvature."""

from collections.abc import Iterable, Mapping

import numpy as np

from dynascope.findings.history import Streak
from dynascope.record import Finding, Piece


class EdgeOfStability:
    """Sharpness has reached 2/lr: gradient descent no longer follows the gradient flow (2103.00065).

    Silent for Adam, whose edge belongs to the preconditioned Hessian.
    """

    reads = ("curvature/sharpness", "curvature/edge", "adam/update_rms")
    near, looks = 0.9, 3

    def __init__(self) -> None:
        self._streak = Streak(self.looks)
        self._is_adam = False

    def feed(self, new: Mapping[str, Piece]) -> Iterable[Finding]:
        """One finding a run, at the first of three looks near or above the edge."""
        self._is_adam = self._is_adam or "adam/update_rms" in new
        if self._is_adam or "curvature/sharpness" not in new or "curvature/edge" not in new:
            return
        sharpness = new["curvature/sharpness"]
        edges = dict(zip(new["curvature/edge"].steps, new["curvature/edge"].values, strict=True))
        for step, value in zip(sharpness.steps, sharpness.values, strict=True):
            limit = edges.get(step, np.nan)
            since = self._streak.fires(bool(value >= self.near * limit), int(step))
            if since is not None:
                yield Finding(
                    id="edge-of-stability",
                    severity="info",
                    step=since,
                    message=f"Sharpness ({value:.4g}) has reached the edge of stability, 2/lr = {limit:.4g}.",
                    evidence={"sharpness": float(value), "edge": float(limit)},
                    remedy="for group in optimizer.param_groups: group['lr'] *= 0.5  # if the loss should fall smoothly",
                    source="2103.00065: gradient descent hovers at 2/lr",
                    series="curvature/sharpness",
                )
