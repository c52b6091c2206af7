"""Which way an objective moves the entropy of a softmax policy (2510.00911, section 4)."""

from jaxtyping import Float
from torch import Tensor


def entropy_rate(logits: Float[Tensor, "*batch A"], advantage: Float[Tensor, "*batch A"]) -> Float[Tensor, "*batch"]:
    """dH/dη = −Cov_{y∼π}(log π(y), A(y)) where a step of natural gradient moves the logits by η A; in nats.

    Actions along the last axis. A baseline of A makes no difference. Proposition 1.

    >>> entropy_rate(torch.tensor([1.0, 0, -1]), torch.tensor([1.0, 0, -1]))
    tensor(-0.4244)
    """
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    away = log_probs - (probs * log_probs).sum(-1, keepdim=True)
    return -(probs * away * advantage).sum(-1)


def discrete_quantile(scores: Float[Tensor, " A"], probs: Float[Tensor, " A"], level: float) -> Float[Tensor, ""]:
    """F⁻¹(level) of scores with these probabilities: the lowest score at which the distribution function reaches the level.

    Raises ValueError unless 0 < level <= 1.

    >>> discrete_quantile(torch.tensor([0.0, 1.0]), torch.tensor([0.3, 0.7]), 0.5)
    tensor(1.)
    """
    if not 0 < level <= 1:
        raise ValueError(f"level={level} must be above 0 and at most 1")
    order = scores.argsort()
    reached = (probs[order].cumsum(0) < level - 1e-7 * probs.sum()).sum().clamp(max=len(scores) - 1)
    return scores[order][reached]
