"""Curvature: the top eigenvalue of the loss's Hessian (sharpness), beside the edge where gradient descent diverges."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dynascope.kernels.lanczos import top_eigenvalue
from dynascope.probes.probe import Need, Probe
from dynascope.probes.views import CurvatureView
from dynascope.record import Series


class Curvature(Probe):
    """Sharpness, the top eigenvalue of the Hessian of the step's loss (of its first micro-batch), and the edge 2/lr.

    Above the edge plain gradient descent diverges along the sharpest direction; full-batch training hovers there
    (2103.00065). For Adam the edge belongs to the preconditioned Hessian and is drawn for orientation only.

    Each look costs about 20 training steps in time and the graphs of two forward passes in memory, so this probe is
    not among the default ones. Looks after the first start from the last eigenvector and need half as many products.
    """

    name = "curvature"
    needs = frozenset({Need.CURVATURE})
    default = False
    series = (
        Series("curvature/sharpness", description="Top eigenvalue of the Hessian of the step's loss."),
        Series("curvature/edge", description="2 / learning rate: gradient descent is stable below it."),
    )
    first_iterations, iterations = 12, 6

    def __init__(self) -> None:
        self._direction: Tensor | None = None

    def measure(self, view: CurvatureView) -> Mapping[str, Tensor]:
        """Sharpness by Lanczos, warm-started, and the edge."""
        is_warm = self._direction is not None and self._direction.numel() == view.size
        if is_warm and self._direction is not None:
            start = self._direction
        else:
            generator = torch.Generator(device=view.device).manual_seed(0)
            start = torch.randn(view.size, generator=generator, device=view.device)
        count = self.iterations if is_warm else self.first_iterations
        value, direction = top_eigenvalue(view.hessian_product, start, count)
        if bool(torch.isfinite(value)):
            self._direction = direction
        return {"curvature/sharpness": value, "curvature/edge": torch.tensor(2.0 / view.lr)}
