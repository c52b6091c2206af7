"""A committee machine whose training can be followed exactly: one hidden layer, readouts all one (2310.06110)."""

from collections.abc import Callable, Collection, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


class QuadraticCommittee(nn.Module):
    """f(x) = (α/N) Σ φ(wᵢ·x), φ(h) = h + (ε/2) h²: α is its laziness, ε how much of its first features are quadratic.

    Only `weight` (N, D), standard normal at first, is trained. With `center` the output at the start is subtracted; plain
    gradient descent wants lr N/α² (`lr`). With `alpha` and `eps` (committees,) there are so many committees side by side,
    each with its own inputs, or all with the same; `generator` may then be one each.

    Raises ValueError for an alpha that is not above 0, and for generators that are not one a committee.
    Source: 2310.06110, section 3.

    >>> QuadraticCommittee(40, 200, alpha=1.0, eps=0.25)(torch.randn(8, 40) / 40**0.5).shape
    torch.Size([8])
    """

    alpha: float | Tensor
    eps: float | Tensor
    start: Tensor | None

    def __init__(
        self,
        dim: int,
        num_neurons: int,
        *,
        alpha: float | Float[Tensor, " committees"],
        eps: float | Float[Tensor, " committees"],
        center: bool = False,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not bool(torch.as_tensor(alpha).gt(0).all()):
            raise ValueError(f"alpha={alpha} must be above 0")
        super().__init__()
        stack = torch.broadcast_shapes(*(torch.as_tensor(dial).shape for dial in (alpha, eps)))
        if isinstance(generator, Sequence):
            if stack != (len(generator),):
                raise ValueError(f"{len(generator)} generators do not go with alpha and eps of shape {tuple(stack)}")
            drawn = torch.stack([torch.randn(num_neurons, dim, generator=one, dtype=dtype) for one in generator])
        else:
            drawn = torch.randn(*stack, num_neurons, dim, generator=generator, dtype=dtype)
        for name, dial in (("alpha", alpha), ("eps", eps)):
            if isinstance(dial, Tensor):
                self.register_buffer(name, dial.to(drawn))
            else:
                setattr(self, name, dial)
        self.weight = nn.Parameter(drawn)
        self.register_buffer("start", drawn.clone() if center else None)

    def forward(self, x: Float[Tensor, "*committees batch dim"]) -> Float[Tensor, "*committees batch"]:
        now = self._outputs(x @ self.weight.mT)
        return now if self.start is None else now - self._outputs(x @ self.start.mT)

    @property
    def lr(self) -> float | Float[Tensor, " committees"]:
        """N/α², at which the linearized dynamics are the same for every α and N."""
        return self.weight.shape[-2] / self.alpha**2

    @torch.no_grad()
    def descend(
        self,
        x: Float[Tensor, "*committees batch dim"],
        y: Float[Tensor, "*committees batch"],
        num_steps: int = 1,
        *,
        lr: float | Float[Tensor, " committees"] | None = None,
        looks: Collection[int] = (),
        look: Callable[[int, Tensor], None] = lambda step, residual: None,
    ) -> None:
        """Steps of gradient descent on the mean of squared residuals f − y, without a graph, at `lr` (default: the own).

        Before the step of each number in `looks`, and of the end, `look` is told the residuals. Two products a step.

        >>> model.descend(x, y, 1000)
        """
        lr = self.lr if lr is None else lr
        rate = _over(2 * lr * self.alpha / (y.shape[-1] * self.weight.shape[-2]), 1)
        at_start = 0.0 if self.start is None else self._outputs(x @ self.start.mT)
        looks = frozenset(looks)
        for step in range(num_steps):
            hidden = x @ self.weight.mT
            residual = self._outputs(hidden) - at_start - y
            if step in looks:
                look(step, residual)
            pull = x * (rate * residual)[..., None]
            self.weight.sub_(pull.sum(-2, keepdim=True) + _over(self.eps, 2) * (hidden.mT @ pull))
        if num_steps in looks:
            look(num_steps, self(x) - y)

    def _outputs(self, hidden: Tensor) -> Tensor:
        outputs: Tensor = hidden.mean(-1) + 0.5 * _over(self.eps, 1) * hidden.square().mean(-1)
        return _over(self.alpha, 1) * outputs


def _over(value: float | Tensor, num_axes: int) -> float | Tensor:
    """One value for all, or one a committee, against tensors of so many axes behind that of committees."""
    return value[(..., *(None,) * num_axes)] if isinstance(value, Tensor) else value
