"""A committee machine whose training can be followed exactly: one hidden layer, readouts all one (2310.06110)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class QuadraticCommittee(nn.Module):
    """f(x) = (α/N) Σ φ(wᵢ·x), φ(h) = h + (ε/2) h²: α is its laziness, ε how much of its first features are quadratic.

    Only `weight` (N, D), standard normal at first, is trained. With `center` the output at the start is subtracted; plain
    gradient descent wants lr N/α² (`lr`). Source: 2310.06110, section 3.

    >>> QuadraticCommittee(40, 200, alpha=1.0, eps=0.25)(torch.randn(8, 40) / 40**0.5).shape
    torch.Size([8])
    """

    start: Tensor | None

    def __init__(
        self,
        dim: int,
        num_neurons: int,
        *,
        alpha: float,
        eps: float,
        center: bool = False,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if alpha <= 0:
            raise ValueError(f"alpha={alpha} must be above 0")
        super().__init__()
        self.alpha, self.eps = alpha, eps
        self.weight = nn.Parameter(torch.randn(num_neurons, dim, generator=generator, dtype=dtype))
        self.register_buffer("start", self.weight.detach().clone() if center else None)

    def forward(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        now = self._outputs(x, self.weight)
        return now if self.start is None else now - self._outputs(x, self.start)

    @property
    def lr(self) -> float:
        """N/α², at which the linearized dynamics are the same for every α and N."""
        return len(self.weight) / self.alpha**2

    @torch.no_grad()
    def descend(self, x: Float[Tensor, "batch dim"], residual: Float[Tensor, " batch"], lr: float) -> None:
        """One step of gradient descent on the mean of squared residuals f − y, without a graph."""
        slopes = (1 + self.eps * (x @ self.weight.T)) * residual[:, None]
        self.weight.sub_(slopes.T @ x, alpha=2 * lr * self.alpha / (len(x) * len(self.weight)))

    def _outputs(self, x: Tensor, weight: Tensor) -> Tensor:
        hidden = x @ weight.T
        outputs: Tensor = self.alpha * (hidden + 0.5 * self.eps * hidden.square()).mean(1)
        return outputs
