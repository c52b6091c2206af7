"""Fine-tuning on demonstrations between steps of RL: their likelihood, and a little entropy (arXiv 2506.07527).

L = −mean_t log π(s_t) − α mean_t H(π(· | s_<t)); the entropy keeps fine-tuning from taking exploration away.
"""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Reduction = Literal["token", "sequence"]


class DemonstrationLoss(NamedTuple):
    """`loss` = `nll` − coefficient · `entropy`; the last two, in nats, carry no gradient."""

    loss: Float[Tensor, ""]
    nll: Float[Tensor, ""]
    entropy: Float[Tensor, ""]


def interleaved_sft_loss(
    logits: Float[Tensor, "N T vocabulary"],
    labels: Int[Tensor, "N T"],
    mask: Shaped[Tensor, "N T"],
    *,
    entropy_coef: float = 1e-4,
    reduction: str = "token",
    num_tokens: int | Tensor | None = None,
    num_sequences: int | None = None,
) -> DemonstrationLoss:
    """The fine-tuning loss of ReLIFT; `logits` at a place predict the label of that place.

    `mask` is 1 at the demonstration's tokens, its end included; labels elsewhere play no part and may be anything, −100 too.
    "token" averages over all tokens (the authors' program), "sequence" over each demonstration first (their formula).
    `num_tokens` or `num_sequences` of the whole step let micro-batches add up to it. The paper's best coefficient is 1e-4;
    the scripts that were released have 1e-3.

    Raises ValueError for another reduction, or when the mask leaves nothing.

    >>> loss, nll, entropy = interleaved_sft_loss(model(ids).logits[:, :-1], ids[:, 1:], is_demonstration[:, 1:])
    """
    nll, entropy = token_nll_and_entropy(logits, labels.masked_fill(mask == 0, 0))
    return _reduced(nll, entropy, mask, entropy_coef, reduction, num_tokens, num_sequences)


def sft_loss_from_hidden(
    hidden: Float[Tensor, "N T width"],
    unembedding: Float[Tensor, "vocabulary width"],
    labels: Int[Tensor, "N T"],
    mask: Shaped[Tensor, "N T"],
    *,
    chunk: int = 1024,
    entropy_coef: float = 1e-4,
    reduction: str = "token",
    num_tokens: int | Tensor | None = None,
    num_sequences: int | None = None,
) -> DemonstrationLoss:
    """The same loss from the inputs of the unembedding; logits of `chunk` tokens exist at a time, forward and backward.

    They are worked out twice for it. Raises as `interleaved_sft_loss`.

    >>> loss, *_ = sft_loss_from_hidden(model.model(ids).last_hidden_state[:, :-1], model.lm_head.weight, ids[:, 1:], mask)
    """
    flat, wanted = hidden.flatten(0, 1), labels.masked_fill(mask == 0, 0).flatten()

    def of_chunk(part: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return token_nll_and_entropy(part @ weight.T, targets)

    parts = [
        checkpoint(of_chunk, part, unembedding, targets, use_reentrant=False)
        for part, targets in zip(flat.split(chunk), wanted.split(chunk), strict=True)
    ]
    nll, entropy = (torch.cat(both).view(mask.shape) for both in zip(*parts, strict=True))
    return _reduced(nll, entropy, mask, entropy_coef, reduction, num_tokens, num_sequences)


def token_nll_and_entropy(
    logits: Float[Tensor, "*N vocabulary"], labels: Int[Tensor, "*N"]
) -> tuple[Float[Tensor, "*N"], Float[Tensor, "*N"]]:
    """−log π of each label and the entropy of its distribution, in nats, float32 at least.

    Both gradients share one buffer of the logits' size: of the first p − onehot, of the second −p (log p + H).

    >>> token_nll_and_entropy(torch.zeros(1, 4), torch.tensor([2]))
    (tensor([1.3863]), tensor([1.3863]))
    """
    nll, entropy = _NllAndEntropy.apply(logits.flatten(0, -2), labels.flatten())
    return nll.view(labels.shape), entropy.view(labels.shape)


def _reduced(
    nll: Tensor,
    entropy: Tensor,
    mask: Tensor,
    coefficient: float,
    reduction: str,
    num_tokens: int | Tensor | None,
    num_sequences: int | None,
) -> DemonstrationLoss:
    if reduction not in ("token", "sequence"):
        raise ValueError(f"reduction is token or sequence, not {reduction!r}")
    if num_tokens is None and num_sequences is None and not bool((mask != 0).any()):
        raise ValueError("mask is 0 everywhere: no demonstration has a token, so there is nothing to learn from")
    is_told = mask != 0
    if reduction == "token":
        weights = is_told / (is_told.sum() if num_tokens is None else num_tokens)
    else:
        lengths = is_told.sum(1, keepdim=True)
        total = (lengths > 0).sum() if num_sequences is None else num_sequences
        weights = is_told / lengths.clamp(min=1) / total
    mean_nll, mean_entropy = (nll * weights).sum(), (entropy * weights).sum()
    loss = mean_nll - coefficient * mean_entropy if coefficient else mean_nll
    return DemonstrationLoss(loss, mean_nll.detach(), mean_entropy.detach())


class _NllAndEntropy(torch.autograd.Function):
    """Autograd's own way keeps log-probabilities and probabilities beside the logits, and makes a gradient for each."""

    @staticmethod
    def forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(logits.dtype, torch.float32)
        nll, entropy = (torch.empty(len(logits), dtype=wide, device=logits.device) for _ in range(2))
        size = _rows_at_once(logits)
        for first in range(0, len(logits), size):
            here = slice(first, first + size)
            log_probs = logits[here].to(wide).log_softmax(-1)
            nll[here] = -log_probs.gather(-1, labels[here, None])[:, 0]
            # A token that is ruled out (−inf) adds nothing to an entropy.
            entropy[here] = torch.special.entr(log_probs.exp()).sum(-1)
        return nll, entropy

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        context.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(context: Any, of_nll: Tensor, of_entropy: Tensor) -> tuple[Tensor, None]:
        logits, labels, entropy = context.saved_tensors
        buffer = torch.empty_like(logits)
        size = _rows_at_once(logits)
        for first in range(0, len(logits), size):
            here = slice(first, first + size)
            log_probs = logits[here].to(entropy.dtype).log_softmax(-1)
            probs = log_probs.exp()
            surprise = torch.where(probs > 0, log_probs + entropy[here, None], 0.0)
            gradient = probs * (of_nll[here, None] - of_entropy[here, None] * surprise)
            buffer[here] = gradient.scatter_add_(-1, labels[here, None], -of_nll[here, None])
        return buffer, None


def _rows_at_once(logits: Tensor) -> int:
    """Few enough that what is worked out of them stays in a processor's cache, or fills an accelerator once."""
    return max(1, 2 ** (20 if logits.device.type == "cpu" else 25) // logits.shape[-1])
