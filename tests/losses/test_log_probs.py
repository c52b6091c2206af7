"""Log-probabilities of response tokens against PyTorch's own, values and gradients."""

import torch
import torch.nn.functional as F

from dynascope.losses import token_log_probs


def by_torch(logits: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    each = -F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    return each * mask[:, 1:]


def test_values_and_gradients_are_those_of_cross_entropy() -> None:
    logits = torch.randn(3, 7, 11, requires_grad=True)
    tokens, mask = torch.randint(11, (3, 7)), torch.rand(3, 7) < 0.6
    weights = torch.randn(3, 6)
    found, expected = token_log_probs(logits, tokens, mask), by_torch(logits, tokens, mask)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((weights * one).sum(), logits)[0] for one in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


def test_low_precision_logits_are_summed_in_single_precision() -> None:
    logits = torch.randn(2, 5, 1000).bfloat16()
    tokens, mask = torch.randint(1000, (2, 5)), torch.ones(2, 5)
    torch.testing.assert_close(token_log_probs(logits, tokens, mask), by_torch(logits.float(), tokens, mask))


def test_tokens_off_the_response_count_nothing_even_where_logits_are_no_numbers() -> None:
    logits = torch.randn(1, 4, 5)
    logits[0, 2] = torch.nan
    log_probs = token_log_probs(logits, torch.ones(1, 4, dtype=torch.long), torch.tensor([[0, 1, 1, 0]]))
    assert log_probs[0, 2] == 0
    assert torch.isfinite(log_probs).all()
