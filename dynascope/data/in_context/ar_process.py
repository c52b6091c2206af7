"""Noiseless autoregressive processes x(t+1) = W x(t) with a rotation W of its own for every sequence (2405.16845)."""

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from jaxtyping import Complex, Float
from torch import Tensor

Law: TypeAlias = Literal["gaussian", "sparse", "ones"] | Callable[[int, torch.Generator], Tensor]
"""The law of the first token, by name or as (count, generator) -> (count, dim) real numbers."""


class ARProcess:
    """Sequences x(t) = λ^(t-1) x(1), with λ_j = exp(iθ_j) and θ_j uniform, drawn in closed form.

    Laws of x(1): "gaussian", N(0, scale² I); "sparse", one random coordinate ±scale and zeros; "ones", all scale; or a
    function. Source: 2405.16845, section 3 (W diagonal without loss of generality).

    Raises ValueError for sequences of fewer than three tokens, no dimension, or a scale that is not above 0.

    >>> ARProcess(3, 20, "sparse").sample(4000, torch.Generator().manual_seed(0)).shape
    torch.Size([4000, 20, 3])
    """

    def __init__(self, dim: int, length: int, law: Law = "gaussian", scale: float = 1.0) -> None:
        if dim < 1 or length < 3:
            raise ValueError(f"dim={dim} must be at least 1 and length={length} at least 3")
        if scale <= 0:
            raise ValueError(f"scale={scale} must be above 0")
        if not callable(law) and law not in ("gaussian", "sparse", "ones"):
            raise ValueError(f"law is gaussian, sparse, ones or a function, not {law!r}")
        self.dim, self.length, self.law, self.scale = dim, length, law, scale

    def first(self, count: int, generator: torch.Generator) -> Float[Tensor, "count dim"]:
        """First tokens, real and in double precision."""
        if callable(self.law):
            return self.law(count, generator).double()
        if self.law == "gaussian":
            return self.scale * torch.randn(count, self.dim, generator=generator, dtype=torch.float64)
        if self.law == "ones":
            return torch.full((count, self.dim), self.scale, dtype=torch.float64)
        place = torch.randint(self.dim, (count, 1), generator=generator)
        sign = 2.0 * torch.randint(2, (count, 1), generator=generator).double() - 1
        return torch.zeros(count, self.dim, dtype=torch.float64).scatter_(1, place, self.scale * sign)

    def sample(
        self, count: int, generator: torch.Generator, dtype: torch.dtype = torch.complex128
    ) -> Complex[Tensor, "count length dim"]:
        """So many sequences."""
        angles = 2 * math.pi * torch.rand(count, 1, self.dim, generator=generator, dtype=torch.float64)
        turned = torch.polar(torch.ones_like(angles), angles * torch.arange(self.length)[:, None])
        return (turned * self.first(count, generator)[:, None]).to(dtype)

    def sample_real(self, count: int, generator: torch.Generator) -> Float[Tensor, "count length features"]:
        """The same with every complex coordinate as a pair of real ones, turned by a 2 × 2 rotation: (…, 2 · dim)."""
        return torch.view_as_real(self.sample(count, generator)).flatten(2).float()
