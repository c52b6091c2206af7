"""Log-probabilities of tokens and of whole responses, with one buffer of the logits' size in the backward pass."""

from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


class _LogProbs(torch.autograd.Function):
    """log softmax at the targets. Autograd's own way keeps or makes several tensors as large as the logits."""

    @staticmethod
    def forward(logits: Tensor, targets: Tensor) -> Tensor:
        # Row by row: a low-precision row is widened alone, never the whole batch.
        wide = torch.promote_types(logits.dtype, torch.float32)
        normalizer = torch.stack([row.to(wide).logsumexp(-1) for row in logits])
        at_target: Tensor = logits.gather(-1, targets[..., None])[..., 0]
        return at_target - normalizer

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        context.save_for_backward(*inputs, output)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets, output = context.saved_tensors
        normalizer = logits.gather(-1, targets[..., None])[..., 0] - output
        buffer = torch.empty_like(logits)
        for row, out, normal, outer in zip(logits, buffer, normalizer, gradient, strict=True):
            out.copy_((row - normal[:, None]).exp_().mul_(-outer[:, None]))
        return buffer.scatter_add_(-1, targets[..., None], gradient[..., None].to(logits.dtype)), None


def token_log_probs(
    logits: Float[Tensor, "sequences positions vocabulary"],
    tokens: Int[Tensor, "sequences positions"],
    mask: Shaped[Tensor, "sequences positions"],
) -> Float[Tensor, "sequences positions-1"]:
    """log π of each token given those before it, from the logits at the position before; 0 where `mask` is 0 (prompt, padding).

    `mask` marks the tokens of the response. Sum over positions for the log-probability of a response.

    >>> token_log_probs(model(tokens).logits, tokens, mask).sum(1)
    """
    log_probs: Tensor = _LogProbs.apply(logits[:, :-1], tokens[:, 1:])
    return log_probs.masked_fill(mask[:, 1:] == 0, 0.0)
