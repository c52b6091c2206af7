"""Prompts of labelled examples from a regression drawn anew for each prompt (2503.12734)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Prompts:
    """Tokens (x, y_1 … y_N) of a prompt's examples, its query (x, 0 … 0), the labels asked for, and who made them."""

    context: Float[Tensor, "prompts length width"]
    query: Float[Tensor, "prompts width"]
    target: Float[Tensor, "prompts outputs"]
    beta: Float[Tensor, "prompts outputs dim"]

    @property
    def x(self) -> Float[Tensor, "prompts length dim"]:
        """Inputs of the examples."""
        return self.context[..., : self.beta.shape[-1]]

    @property
    def y(self) -> Float[Tensor, "prompts length outputs"]:
        """Labels of the examples."""
        return self.context[..., self.beta.shape[-1] :]

    @property
    def query_x(self) -> Float[Tensor, "prompts dim"]:
        """Inputs of the query."""
        return self.query[..., : self.beta.shape[-1]]


class LinearRegressionICL:
    """Inputs x ~ N(0, Σ), labels y = β·x + noise, with β ~ N(0, I/d) of its own for every prompt.

    Args:
        dim: Number of inputs d.
        length: Examples a prompt.
        noise_variance: Of every label; a noiseless prompt has 0.
        covariance: Σ (default: I).
        tasks: Coordinates that each of several labels depends on; d in the law of its β is then their number. (The
            authors' script for several tasks scales labels and noise by the root of it.)
        query_noise: Whether the label asked for has noise, too.

    Raises ValueError for impossible sizes, a negative variance, a covariance that is not symmetric and positive definite,
    and coordinates out of range. Source: 2503.12734, sections 2 and 5.

    >>> LinearRegressionICL(5, 40, 0.1).sample(256, torch.Generator().manual_seed(0)).context.shape
    torch.Size([256, 40, 6])
    """

    def __init__(
        self,
        dim: int,
        length: int,
        noise_variance: float,
        *,
        covariance: Tensor | None = None,
        tasks: Sequence[Sequence[int]] | None = None,
        query_noise: bool = True,
    ) -> None:
        if dim < 1 or length < 1:
            raise ValueError(f"dim={dim} and length={length} must be at least 1")
        if noise_variance < 0:
            raise ValueError(f"noise_variance={noise_variance} must not be negative")
        tasks = [range(dim)] if tasks is None else tasks
        if not tasks or not all(task and min(task) >= 0 and max(task) < dim for task in tasks):
            raise ValueError(f"each of one or more tasks must name coordinates from 0 to {dim - 1}")
        self.dim, self.length, self.noise_variance, self.query_noise = dim, length, noise_variance, query_noise
        self.num_tasks = len(tasks)
        self._root = None if covariance is None else _root(covariance, dim)
        # (task, coordinate): standard deviation of β, 0 where the task does not look.
        uses = torch.stack([torch.zeros(dim).index_fill_(0, torch.tensor(list(task)), 1.0) for task in tasks])
        self._beta_std = uses / uses.sum(1, keepdim=True).sqrt()

    def sample(
        self,
        num_prompts: int,
        generator: torch.Generator | None = None,
        *,
        length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Prompts:
        """Fresh prompts, drawn on `device` in one call; `length` examples each (default: the sampler's own).

        >>> LinearRegressionICL(5, 40, 0.1).sample(8, length=100).y.shape
        torch.Size([8, 100, 1])
        """
        dim, count, length = self.dim, self.num_tasks, self.length if length is None else length
        if num_prompts < 1 or length < 1:
            raise ValueError(f"num_prompts={num_prompts} and length={length} must be at least 1")
        parts = [length * dim, length * count, dim, count * dim, count]
        normal = torch.randn(num_prompts, sum(parts), generator=generator, device=device, dtype=dtype)
        x, noise, query, beta, query_noise = normal.split(parts, dim=1)
        x, noise, beta = (
            x.unflatten(1, (length, dim)),
            noise.unflatten(1, (length, count)),
            beta.unflatten(1, (count, dim)),
        )
        noise_std = self.noise_variance**0.5
        beta = beta * self._beta_std.to(normal)
        if self._root is not None:
            root = self._root.to(normal)
            x, query = x @ root, query @ root
        y = x @ beta.mT + noise_std * noise
        target = (beta @ query[..., None])[..., 0]
        if self.query_noise:
            target = target + noise_std * query_noise
        return Prompts(torch.cat([x, y], dim=2), torch.nn.functional.pad(query, (0, count)), target, beta)


def toeplitz_covariance(dim: int, rho: float) -> Float[Tensor, "dim dim"]:
    """Σ_ij = ρ^|i−j|, in double precision. Raises ValueError unless |ρ| < 1.

    >>> toeplitz_covariance(2, 0.5)[0]
    tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    if not -1 < rho < 1:
        raise ValueError(f"rho={rho} must lie between -1 and 1")
    place = torch.arange(dim)
    return torch.pow(torch.tensor(rho, dtype=torch.float64), (place[:, None] - place).abs())


def _root(covariance: Tensor, dim: int) -> Tensor:
    """R with RᵀR = Σ, in double precision."""
    if covariance.shape != (dim, dim) or not torch.allclose(covariance, covariance.T):
        raise ValueError(
            f"the covariance must be a symmetric {dim} × {dim} matrix, not of shape {tuple(covariance.shape)}"
        )
    found = torch.linalg.cholesky_ex(covariance.double())
    if found.info:
        raise ValueError("the covariance is not positive definite")
    root: Tensor = found.L.T
    return root
