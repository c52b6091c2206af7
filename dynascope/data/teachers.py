"""Tasks made by teachers, for theory that knows the answer."""

import torch
from jaxtyping import Float
from torch import Tensor


def quadratic_teacher(
    dim: int,
    num_examples: int,
    *,
    generator: torch.Generator | None = None,
    beta: Float[Tensor, " dim"] | None = None,
    normalize: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "examples dim"], Float[Tensor, " examples"], Float[Tensor, " dim"]]:
    """Inputs x ~ N(0, I/dim), targets y = (β·x)²/2, and the teacher β ~ N(0, I) (2310.06110, section 3).

    With `normalize`, |β|² is exactly `dim`, so that β·x is standard normal: E y = Var y = 1/2.

    >>> x, y, beta = quadratic_teacher(40, 200)
    """
    if dim < 1 or num_examples < 1:
        raise ValueError(f"dim={dim} and num_examples={num_examples} must be at least 1")
    if beta is None:
        beta = torch.randn(dim, generator=generator, dtype=dtype)
        beta = beta * (dim**0.5 / beta.norm()) if normalize else beta
    x = torch.randn(num_examples, dim, generator=generator, dtype=dtype) / dim**0.5
    return x, (x @ beta).square() / 2, beta
