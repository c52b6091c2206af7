"""The fine-tuning loss: hand-worked means, gradients of autograd's own, and what padding must not do."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dynascope.losses.demonstrations import interleaved_sft_loss, sft_loss_from_hidden, token_nll_and_entropy


def example(vocabulary: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.randn(3, 5, vocabulary, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 1]])
    return logits, torch.randint(vocabulary, (3, 5)), mask


def test_without_entropy_it_is_cross_entropy_with_the_prompt_ignored() -> None:
    logits, labels, mask = example()
    (own,) = torch.autograd.grad(interleaved_sft_loss(logits, labels, mask, entropy_coef=0.0).loss, logits)
    ignored = labels.masked_fill(mask == 0, -100)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ignored.flatten(), ignore_index=-100)
    (other,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(own, other)
    # labels as such a collator gives them
    again = interleaved_sft_loss(logits, ignored, mask, entropy_coef=0.0).loss
    torch.testing.assert_close(again, loss)


def test_uniform_logits() -> None:
    told = interleaved_sft_loss(
        torch.zeros(1, 2, 10), torch.tensor([[3, 4]]), torch.ones(1, 2).bool(), entropy_coef=0.1
    )
    assert [float(one) for one in told] == pytest.approx([0.9 * math.log(10), math.log(10), math.log(10)])


def test_gradients_of_both_by_finite_differences() -> None:
    logits, labels, _ = example()
    assert torch.autograd.gradcheck(lambda one: token_nll_and_entropy(one, labels), logits)
    one = torch.randn(4, dtype=torch.float64, requires_grad=True)
    _, entropy = token_nll_and_entropy(one[None], torch.tensor([0]))
    entropy.sum().backward()
    log_probs = one.detach().log_softmax(-1)
    torch.testing.assert_close(one.grad, -log_probs.exp() * (log_probs + entropy.detach()))


def test_prompts_and_padding_play_no_part() -> None:
    logits, labels, mask = example()
    other = torch.where(mask == 0, (labels + 1) % 7, labels)
    assert torch.equal(interleaved_sft_loss(logits, labels, mask).loss, interleaved_sft_loss(logits, other, mask).loss)
    (gradient,) = torch.autograd.grad(interleaved_sft_loss(logits, labels, mask).loss, logits)
    assert bool((gradient[mask == 0] == 0).all())
    padded = [torch.cat([one, one[:, :2]], 1) for one in (logits, labels)]
    mask = torch.cat([mask, torch.zeros(3, 2, dtype=torch.long)], 1)
    torch.testing.assert_close(
        interleaved_sft_loss(*padded, mask).loss, interleaved_sft_loss(logits, labels, mask[:, :5]).loss
    )


@pytest.mark.parametrize(
    ("sums", "by_token", "by_sequence"), [((6.0, 2.0), 2.0, 2.0), ((6.0, 1.0), 1.75, 1.5)], ids=["even", "uneven"]
)
def test_reductions_by_hand(sums: tuple[float, float], by_token: float, by_sequence: float) -> None:
    # Two tokens to choose from; the logit of the wrong one makes the surprise that is wanted, lengths are 3 and 1.
    surprise = torch.tensor([[sums[0] / 3] * 3, [sums[1], 0.5, 0.5]], dtype=torch.float64)
    logits = torch.stack([torch.zeros_like(surprise), torch.log(torch.expm1(surprise))], -1)
    labels, mask = torch.zeros(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [1, 0, 0]])
    for reduction, expected in (("token", by_token), ("sequence", by_sequence)):
        assert float(interleaved_sft_loss(logits, labels, mask, reduction=reduction).nll) == pytest.approx(expected)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_micro_batches_add_up(reduction: str) -> None:
    logits, labels, mask = example()
    whole = interleaved_sft_loss(logits, labels, mask, reduction=reduction, entropy_coef=0.3).loss
    counts: Any = {"num_tokens": int(mask.sum())} if reduction == "token" else {"num_sequences": 3}
    parts = [
        interleaved_sft_loss(
            logits[rows], labels[rows], mask[rows], reduction=reduction, entropy_coef=0.3, **counts
        ).loss
        for rows in (slice(0, 2), slice(2, 3))
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_from_hidden_states_it_is_the_same(chunk: int) -> None:
    hidden = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    unembedding = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    _, labels, mask = example()
    losses = (
        interleaved_sft_loss(hidden @ unembedding.T, labels, mask, entropy_coef=0.2).loss,
        sft_loss_from_hidden(hidden, unembedding, labels, mask, chunk=chunk, entropy_coef=0.2).loss,
    )
    first, second = (torch.autograd.grad(loss, (hidden, unembedding)) for loss in losses)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other)


def test_a_token_that_is_ruled_out_gives_no_nan() -> None:
    logits = torch.tensor([[[0.0, 1.0, -torch.inf]]], requires_grad=True)
    told = interleaved_sft_loss(logits, torch.tensor([[1]]), torch.ones(1, 1), entropy_coef=0.5)
    told.loss.backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
    assert float(logits.grad[0, 0, 2]) == 0


def test_nothing_to_learn_from_and_other_reductions_are_told() -> None:
    logits, labels, mask = example()
    with pytest.raises(ValueError, match="nothing to learn from"):
        interleaved_sft_loss(logits, labels, 0 * mask)
    with pytest.raises(ValueError, match="token or sequence"):
        interleaved_sft_loss(logits, labels, mask, reduction="mean")
