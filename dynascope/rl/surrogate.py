"""The clipped surrogate of PPO, with bounds that may differ from token to token (1707.06347, eq. 7)."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Surrogate(NamedTuple):
    """A loss at every token, and where the clip took the gradient away."""

    loss: Float[Tensor, "N T"]
    is_clipped_low: Bool[Tensor, "N T"]
    is_clipped_high: Bool[Tensor, "N T"]


def clipped_surrogate(
    ratio: Float[Tensor, "N T"],
    advantage: Float[Tensor, "N T"] | Float[Tensor, "N 1"],
    low: float | Float[Tensor, "..."] | None = 0.2,
    high: float | Float[Tensor, "..."] | None = 0.2,
    *,
    dual_clip: float | None = None,
) -> Surrogate:
    """−min(ratio · A, clip(ratio, 1 − low, 1 + high) · A): negative, so that it is minimised.

    Bounds are numbers or tensors that go with (N, T); None leaves that side unclipped. `dual_clip=c` caps the loss of
    a token with negative advantage at c|A|, so that one token that became much likelier cannot rule the batch
    (1912.09729, eq. 5); its gradient is 0 there.

    Raises ValueError for a `dual_clip` not above 1.

    >>> clipped_surrogate(torch.tensor([[1.5, 0.5]]), torch.tensor([[1.0, -1.0]])).loss
    tensor([[-1.2000,  0.8000]])
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip={dual_clip} must be above 1")
    lowest, highest = None if low is None else 1 - low, None if high is None else 1 + high
    clipped = ratio
    if lowest is not None:
        clipped = clipped.clamp(min=lowest)
    if highest is not None:
        clipped = clipped.clamp(max=highest)
    loss = -torch.min(ratio * advantage, clipped * advantage)
    if dual_clip is not None:
        loss = torch.where(advantage < 0, torch.min(loss, -dual_clip * advantage), loss)
    with torch.no_grad():
        # Of a clipped token only the side that the advantage pushes towards has lost its gradient.
        is_low, is_high = (clipped > ratio) & (advantage < 0), (clipped < ratio) & (advantage > 0)
    return Surrogate(loss, is_low, is_high)
