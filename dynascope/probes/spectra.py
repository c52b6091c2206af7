"""Eigenvalues of what a training holds, which need not be finite."""

import torch
from jaxtyping import Float
from torch import Tensor


def eigenvalues(matrices: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n"]:
    """Of symmetric matrices, ascending; NaN for a matrix that is not finite, where `eigvalsh` would raise.

    A probe that raises is switched off, and a diverged layer should not end the measuring of the others.

    >>> eigenvalues(torch.diag(torch.tensor([3.0, 1.0])))
    tensor([1., 3.])
    """
    is_finite = matrices.isfinite().all(-1).all(-1)
    values: Tensor = torch.linalg.eigvalsh(matrices.masked_fill(~is_finite[..., None, None], 0.0))
    return values.masked_fill(~is_finite[..., None], torch.nan)
