"""How much likelier a sampled token, or a whole completion, has become since it was sampled."""

import math
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

Level = Literal["token", "sequence", "sequence-token"]


def log_ratios(
    log_probs: Float[Tensor, "N T"],
    behaviour_log_probs: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    level: str = "token",
    pre_clip: tuple[float, float] | None = None,
) -> Float[Tensor, "N _"]:
    """log π − log π_behaviour, in float32 at least, at every token (N, T); 0, without a gradient, at padding.

    Level "sequence" is the mean over the completion's tokens, one number each (N, 1) (GSPO, 2507.18071, eq. 7);
    "sequence-token" has that value and each token's own gradient (GSPO-token, ibid., eq. 14). `pre_clip=(1e-3, 1e3)`
    holds the ratio between two numbers before it is exponentiated, so that neither it nor its gradient can overflow
    (2505.02835, section 3): clamping after `exp` still gives 0 · inf.

    Raises ValueError for another level, or a `pre_clip` that does not enclose 1.

    >>> log_ratios(new, old, mask, level="sequence").exp()
    """
    if pre_clip is not None and not 0 < pre_clip[0] < 1 < pre_clip[1]:
        raise ValueError(f"pre_clip={pre_clip} must be two positive ratios, one below and one above 1")
    difference = (log_probs.float() if log_probs.element_size() < 4 else log_probs) - behaviour_log_probs
    difference = difference.masked_fill(~mask, 0.0)
    if level == "sequence":
        lengths = mask.sum(1, keepdim=True).clamp(min=1)
        difference = difference.sum(1, keepdim=True) / lengths
    elif level == "sequence-token":
        lengths = mask.sum(1, keepdim=True).clamp(min=1)
        mean = difference.detach().sum(1, keepdim=True) / lengths
        difference = mean + difference - difference.detach()
    elif level != "token":
        raise ValueError(f"ratio is token, sequence or sequence-token, not {level!r}")
    return difference if pre_clip is None else difference.clamp(math.log(pre_clip[0]), math.log(pre_clip[1]))
