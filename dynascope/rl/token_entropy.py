"""How much a language model hesitates at each token."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@torch.no_grad()
def token_entropy(
    logits: Float[Tensor, "N T V"], mask: Bool[Tensor, "N T"] | None = None, *, chunk: int = 1024
) -> Float[Tensor, "N T"]:
    """Entropy of the whole next-token distribution, in nats, `chunk` tokens at a time; padding is 0, and not worked out.

    So no second tensor of the size of the logits is ever held. float32 at least, and without a gradient. Raises ValueError
    for a chunk below 1.

    >>> token_entropy(torch.zeros(1, 1, 4))
    tensor([[1.3863]])
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: at least 1 token at a time")
    flat, dtype = logits.flatten(0, 1), torch.promote_types(logits.dtype, torch.float32)
    if mask is None:
        parts = [entropy_of(part.log_softmax(-1, dtype=dtype)) for part in flat.split(chunk)]
        return torch.cat(parts).view(logits.shape[:2])
    entropy = torch.zeros(len(flat), dtype=dtype, device=logits.device)
    for rows in mask.flatten().nonzero()[:, 0].split(chunk):
        entropy[rows] = entropy_of(flat[rows].log_softmax(-1, dtype=dtype))
    return entropy.view(logits.shape[:2])


def entropy_of(log_probs: Float[Tensor, "*tokens V"]) -> Float[Tensor, "*tokens"]:
    """Of distributions, with its gradient; what is ruled out (−inf) adds nothing.

    >>> entropy_of(torch.tensor([0.5, 0.5, 0.0]).log())
    tensor(0.6931)
    """
    # 0 · −inf, and its gradient, would be NaN.
    return -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)
