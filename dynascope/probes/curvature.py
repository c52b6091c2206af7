"""Curvature: the top eigenvalue of the loss's Hessian (sharpness), beside the edge where gradient descent diverges."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from dynascope.probes.probe import Need, Probe
from dynascope.probes.views import CurvatureView
from dynascope.record import Series


def top_eigenvalue(
    product: Callable[[Float[Tensor, " size"]], Float[Tensor, " size"]],
    start: Float[Tensor, " size"],
    iterations: int = 10,
) -> tuple[Float[Tensor, ""], Float[Tensor, " size"]]:
    """Largest eigenvalue of a symmetric matrix given by its products, with its eigenvector, by Lanczos.

    The basis is kept whole and orthogonalised twice: memory `iterations` × size, and no ghost eigenvalues.
    Fewer steps are taken when the Krylov space is exhausted.

    Raises ValueError for a start vector of zeros.

    >>> A = torch.diag(torch.tensor([1.0, 5.0]))
    >>> top_eigenvalue(lambda v: A @ v, torch.ones(2))[0]
    tensor(5.0000)
    """
    norm = start.norm()
    if not norm > 0:
        raise ValueError("Lanczos needs a start vector that is not zero")
    basis = [start / norm]
    rows: list[Tensor] = []
    for _ in range(min(iterations, start.numel())):
        image = product(basis[-1])
        stack = torch.stack(basis)
        row = stack @ image
        rows.append(row)
        rest = image - stack.T @ row
        rest = rest - stack.T @ (stack @ rest)
        length = rest.norm()
        if length <= 1e-6 * image.norm() or len(rows) == min(iterations, start.numel()):
            break
        basis.append(rest / length)
    size = len(rows)
    projected = start.new_zeros(size, size)
    for column, row in enumerate(rows):
        projected[: len(row), column] = row[:size]
        projected[column, : len(row)] = row[:size]
    values, vectors = torch.linalg.eigh(projected)
    return values[-1], torch.stack(basis[:size]).T @ vectors[:, -1]


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
