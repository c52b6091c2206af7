"""How a kernel stands to labels, to its own past, and how its spectrum is spread."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Center = Literal["double", "none"]


def centered(kernel: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """J K J with J = I − 11ᵀ/n: the kernel of features whose mean is taken away.

    >>> centered(torch.ones(3, 3))  # zeros
    """
    return kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()


def kernel_alignment(
    kernel: Float[Tensor, "n n"],
    labels: Float[Tensor, "n"] | Float[Tensor, "n outputs"],  # noqa: F821
    *,
    center: Center = "double",
) -> Float[Tensor, ""]:
    """Cosine between a kernel and the labels' own kernel Y Yᵀ: 1 when the labels are its only eigenvectors.

    With `center="double"` both are centred (CKA), which makes it blind to a constant added to the kernel. Source:
    2310.06110, section 3; Cortes et al. (2012).

    >>> kernel_alignment(torch.eye(2), torch.tensor([1.0, -1.0]))
    tensor(1.)
    """
    targets = labels.reshape(len(labels), -1).to(kernel.dtype)
    if center == "double":
        kernel, targets = centered(kernel), targets - targets.mean(0)
    elif center != "none":
        raise ValueError(f'center is "double" or "none", not {center!r}')
    aligned: Tensor = (targets * (kernel @ targets)).sum() / (kernel.norm() * (targets.T @ targets).norm())
    return aligned


def kernel_distance(now: Float[Tensor, "*shape"], start: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """‖K − K₀‖ / ‖K₀‖ in Frobenius norm: 0 for a lazy network, whose features stand still (1806.07572; 2310.06110).

    >>> kernel_distance(2 * torch.eye(3), torch.eye(3))
    tensor(1.)
    """
    distance: Tensor = (now - start).norm() / start.norm()
    return distance


def kernel_velocity(before: Float[Tensor, "*shape"], after: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """1 − cosine between a kernel and itself some time later: 0 stands still or only grows, 1 has turned away.

    >>> kernel_velocity(torch.eye(3), 2 * torch.eye(3))
    tensor(0.)
    """
    cosine: Tensor = (before * after).sum() / (before.norm() * after.norm())
    return 1 - cosine


def effective_rank(eigenvalues: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """exp of the entropy of the spectrum as shares (Roy & Vetterli 2007): n for equal ones, 1 for a single one.

    >>> effective_rank(torch.tensor([1.0, 1.0, 0.0]))
    tensor(2.)
    """
    shares = eigenvalues.clamp_min(0) / eigenvalues.clamp_min(0).sum()
    rank: Tensor = torch.special.entr(shares).sum().exp()
    return rank


def label_power(
    kernel: Float[Tensor, "n n"],
    labels: Float[Tensor, "n"] | Float[Tensor, "n outputs"],  # noqa: F821
) -> Float[Tensor, " n"]:
    """Share of the labels' square in the top k eigenvectors, for k = 1 … n: early growth means an aligned kernel.

    Source: 2310.06110, section 3.

    >>> label_power(torch.diag(torch.tensor([2.0, 1.0])), torch.tensor([1.0, 0.0]))
    tensor([1., 1.])
    """
    targets = labels.reshape(len(labels), -1).to(kernel.dtype)
    vectors = torch.linalg.eigh(kernel).eigenvectors.flip(1)
    power: Tensor = (vectors.T @ targets).square().sum(1).cumsum(0) / targets.square().sum()
    return power
