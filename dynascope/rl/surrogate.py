"""The clipped surrogate of PPO, with bounds that may differ from token to token (1707.06347, eq. 7)."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Surrogate(NamedTuple):
    """A loss at every token, and where the clip took the gradient away."""

    loss: Float[Tensor, "N _"]
    is_clipped_low: Bool[Tensor, "N _"]
    is_clipped_high: Bool[Tensor, "N _"]


def clipped_surrogate(
    ratio: Float[Tensor, "N _"],
    advantage: Float[Tensor, "N _"],
    low: float | Float[Tensor, "..."] | None = 0.2,
    high: float | Float[Tensor, "..."] | None = 0.2,
    *,
    dual_clip: float | None = None,
) -> Surrogate:
    """−min(ratio · A, clip(ratio, 1 − low, 1 + high) · A): negative, so that it is minimised.

    Ratio and advantage are of tokens (N, T) or of completions (N, 1), bounds numbers or tensors that go with them; None
    leaves that side unclipped. `dual_clip=c` caps the loss of
    a token with negative advantage at c|A|, so that one token that became much likelier cannot rule the batch
    (1912.09729, eq. 5); its gradient is 0 there.

    Raises ValueError for a `dual_clip` not above 1.

    >>> clipped_surrogate(torch.tensor([[1.5, 0.5]]), torch.tensor([[1.0, -1.0]])).loss
    tensor([[-1.2000,  0.8000]])
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip={dual_clip} must be above 1")
    lowest, highest = None if low is None else 1 - low, None if high is None else 1 + high
    if isinstance(lowest, float) and isinstance(highest, float):
        clipped = ratio.clamp(lowest, highest)
    else:
        clipped = ratio if lowest is None else ratio.clamp(min=lowest)
        clipped = clipped if highest is None else clipped.clamp(max=highest)
    loss = -torch.min(ratio * advantage, clipped * advantage)
    if dual_clip is not None:
        loss = torch.where(advantage < 0, torch.min(loss, -dual_clip * advantage), loss)
    with torch.no_grad():
        # Of a clipped token only the side that the advantage pushes towards has lost its gradient.
        is_low, is_high = (clipped > ratio) & (advantage < 0), (clipped < ratio) & (advantage > 0)
    return Surrogate(loss, is_low, is_high)
