"""The top of a symmetric matrix's spectrum from products with it alone."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


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
