"""Weights: the spectral norm and stable rank of every matrix, followed by a subspace iteration that remembers."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dynascope.probes.probe import Need, Probe
from dynascope.probes.spectra import eigenvalues
from dynascope.probes.views import StepView
from dynascope.record import Series


def spectral_norms(
    matrices: Float[Tensor, "count rows columns"],
    start: Float[Tensor, "count columns block"],
    iterations: int,
) -> tuple[Float[Tensor, " count"], Float[Tensor, "count columns block"]]:
    """Largest singular value of each matrix by subspace iteration on WᵀW, and the right vectors to start from next time.

    A product with a block of vectors takes hardly longer than one with a single vector, and the error falls with σ_{k+1}
    over σ₁ for a block of k. From below: the value reached never exceeds the true one. A zero matrix gives 0, and one that
    is not finite NaN.

    >>> spectral_norms(torch.diag(torch.tensor([3.0, 1.0]))[None], torch.ones(1, 2, 1), iterations=20)[0]
    tensor([3.0000])
    """
    right = torch.linalg.qr(start).Q
    for _ in range(iterations):
        right = torch.linalg.qr(matrices.transpose(1, 2) @ (matrices @ right)).Q
    left = matrices @ right
    top: Tensor = eigenvalues(left.transpose(1, 2) @ left)[:, -1]
    return top.clamp(min=0).sqrt(), right


def stable_rank(
    frobenius_norm: Float[Tensor, " count"], spectral_norm: Float[Tensor, " count"]
) -> Float[Tensor, " count"]:
    """‖W‖_F² / σ(W)², between 1 and the rank; NaN for a zero matrix.

    >>> stable_rank(torch.tensor([2.0]), torch.tensor([1.0]))
    tensor([4.])
    """
    return (frobenius_norm / spectral_norm).square()


class Weights(Probe):
    """Spectral norm and stable rank of every weight matrix (a convolution as out × everything else).

    Matrices of one shape are iterated together, with blocks of 16 vectors. The first look takes 12 products with each
    matrix, later ones 2, as they go on from the last vectors. Memory: those vectors and one stack of equal matrices.
    """

    name = "weights"
    needs = frozenset({Need.PARAMETERS})
    series = (
        Series("weights/spectral_norm", ("matrix",), description="Largest singular value of each weight matrix."),
        Series("weights/stable_rank", ("matrix",), description="Squared Frobenius over squared spectral norm."),
    )
    block, first_iterations, iterations = 16, 6, 1

    def __init__(self) -> None:
        self._right: dict[tuple[int, int], Tensor] = {}

    def coords(self, view: StepView) -> Mapping[str, Sequence[str]]:
        """The names of the parameters that are matrices."""
        return {"matrix": [name for name, shape in view.shapes.items() if _is_matrix(shape)]}

    def measure(self, view: StepView) -> Mapping[str, Tensor]:
        """Both quantities, in the order of `coords`."""
        by_shape: dict[tuple[int, int], list[str]] = defaultdict(list)
        names = self.coords(view)["matrix"]
        for name in names:
            shape = view.shapes[name]
            by_shape[shape[0], shape.numel() // shape[0]].append(name)
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for (rows, columns), alike in by_shape.items():
            stack = torch.stack([view.whole(name).float().reshape(rows, columns) for name in alike])
            known = self._right.get((rows, columns))
            if known is None:
                generator = torch.Generator(device=stack.device).manual_seed(0)
                known = torch.randn(
                    len(alike), columns, min(self.block, rows, columns), generator=generator, device=stack.device
                )
                iterations = self.first_iterations
            else:
                iterations = self.iterations
            norms, self._right[rows, columns] = spectral_norms(stack, known, iterations)
            ranks = stable_rank(stack.flatten(1).norm(dim=1), norms)
            found |= {name: (norms[index], ranks[index]) for index, name in enumerate(alike)}
        if not names:
            return {}
        return {
            "weights/spectral_norm": torch.stack([found[name][0] for name in names]),
            "weights/stable_rank": torch.stack([found[name][1] for name in names]),
        }


def _is_matrix(shape: torch.Size) -> bool:
    return len(shape) >= 2 and min(shape[0], shape.numel() // max(shape[0], 1)) > 1
