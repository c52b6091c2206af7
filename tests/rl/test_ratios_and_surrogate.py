"""Ratios, their pre-clip, and the surrogate, by hand."""

import pytest
import torch

from dynascope.rl.ratios import log_ratios
from dynascope.rl.surrogate import clipped_surrogate

MASK = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])


def test_the_sequence_ratio_is_the_mean_over_tokens_and_gives_each_its_share_of_the_gradient() -> None:
    new, old = torch.randn(3, 3, requires_grad=True), torch.randn(3, 3)
    found = log_ratios(new, old, MASK, level="sequence")
    torch.testing.assert_close(found[0, 0], (new - old)[0].mean())
    torch.testing.assert_close(found[1, 0], (new - old)[1, 0])
    assert found[2].tolist() == [0]
    found[0, 0].backward()
    torch.testing.assert_close(new.grad, torch.tensor([[1 / 3] * 3, [0] * 3, [0] * 3]))


def test_sequence_token_has_the_sequences_value_and_the_tokens_gradient() -> None:
    new, old = torch.randn(3, 3, requires_grad=True), torch.randn(3, 3)
    found = log_ratios(new, old, MASK, level="sequence-token")
    torch.testing.assert_close(found[MASK], log_ratios(new, old, MASK, level="sequence").expand(3, 3)[MASK])
    found[0, 1].backward()
    assert new.grad is not None
    assert new.grad.nonzero().tolist() == [[0, 1]]


def test_nan_at_padding_reaches_neither_value_nor_gradient() -> None:
    new = torch.zeros(3, 3).masked_fill(~MASK, torch.nan).requires_grad_()
    log_ratios(new, torch.zeros(3, 3), MASK).exp().sum().backward()
    assert new.grad is not None
    assert new.grad.isfinite().all()


def test_an_unknown_level_and_an_impossible_pre_clip() -> None:
    with pytest.raises(ValueError, match="token, sequence"):
        log_ratios(torch.zeros(3, 3), torch.zeros(3, 3), MASK, level="word")
    with pytest.raises(ValueError, match="one below and one above 1"):
        log_ratios(torch.zeros(3, 3), torch.zeros(3, 3), MASK, pre_clip=(1.5, 3.0))


def test_pre_clip_by_hand() -> None:
    drift = torch.tensor([[10.0, 0.1, -10.0, 0.5]], requires_grad=True)
    advantage = torch.tensor([[-1.0, 1, 1, 1]])
    log_ratio = log_ratios(drift, torch.zeros(1, 4), torch.ones(1, 4).bool(), pre_clip=(1e-3, 1e3))
    loss = clipped_surrogate(log_ratio.exp(), advantage).loss
    torch.testing.assert_close(loss, torch.tensor([[1000.0, -1.105171, -0.001, -1.2]]), atol=1e-3, rtol=1e-5)
    loss.sum().backward()
    torch.testing.assert_close(drift.grad, torch.tensor([[0.0, -1.105171, 0, 0]]))


def test_pre_clip_survives_what_overflows_without_it_or_with_a_clamp_after_exp() -> None:
    def gradient(loss_of: object, drift: float) -> torch.Tensor:
        new = torch.tensor([[drift]], requires_grad=True)
        loss_of(new).sum().backward()  # type: ignore[operator]
        assert new.grad is not None
        return new.grad

    one, mask = torch.ones(1, 1), torch.ones(1, 1).bool()

    def plain(new: torch.Tensor) -> torch.Tensor:
        return clipped_surrogate(log_ratios(new, one * 0, mask).exp(), one).loss

    def after(new: torch.Tensor) -> torch.Tensor:
        return clipped_surrogate(log_ratios(new, one * 0, mask).exp().clamp(max=1e3), -one).loss

    def before(new: torch.Tensor) -> torch.Tensor:
        return clipped_surrogate(log_ratios(new, one * 0, mask, pre_clip=(1e-3, 1e3)).exp(), -one).loss

    assert gradient(plain, 200.0).isnan().all()
    assert gradient(after, 200.0).isnan().all()
    assert gradient(before, 200.0).item() == 0
    assert gradient(before, -200.0).item() == 0


def test_inside_its_bounds_pre_clip_changes_no_bit() -> None:
    new, old, mask = torch.randn(5, 7), torch.randn(5, 7), torch.ones(5, 7).bool()
    assert torch.equal(log_ratios(new, old, mask), log_ratios(new, old, mask, pre_clip=(1e-4, 1e4)))


def test_bounds_may_differ_by_token() -> None:
    ratio, advantage = torch.tensor([[1.5, 1.5, 0.5, 0.5]]), torch.tensor([[1.0, 1, -1, -1]])
    low, high = torch.tensor([[0.2, 0.2, 0.4, 0.6]]), torch.tensor([[0.2, 0.6, 0.2, 0.2]])
    found = clipped_surrogate(ratio, advantage, low, high)
    torch.testing.assert_close(found.loss, torch.tensor([[-1.2, -1.5, 0.6, 0.5]]))
    assert found.is_clipped_high.tolist() == [[True, False, False, False]]
    assert found.is_clipped_low.tolist() == [[False, False, True, False]]
    same = clipped_surrogate(ratio, advantage, torch.full((1, 4), 0.2), torch.full((1, 4), 0.28)).loss
    assert torch.equal(same, clipped_surrogate(ratio, advantage, 0.2, 0.28).loss)


def test_the_side_that_the_advantage_does_not_push_to_is_not_clipped() -> None:
    ratio, advantage = torch.tensor([[0.5, 1.5]]), torch.tensor([[1.0, -1.0]])
    found = clipped_surrogate(ratio, advantage)
    assert found.loss.tolist() == [[-0.5, 1.5]]
    assert not (found.is_clipped_low | found.is_clipped_high).any()


def test_no_bounds_is_the_plain_policy_gradient() -> None:
    ratio, advantage = torch.rand(3, 3) * 9, torch.randn(3, 3)
    assert torch.equal(clipped_surrogate(ratio, advantage, None, None).loss, -ratio * advantage)


def test_dual_clip_caps_a_negative_advantage_only() -> None:
    ratio, advantage = torch.tensor([[50.0, 50.0]], requires_grad=True), torch.tensor([[-2.0, 2.0]])
    loss = clipped_surrogate(ratio, advantage, dual_clip=3.0).loss
    torch.testing.assert_close(loss, torch.tensor([[6.0, -2.4]]))
    loss.sum().backward()
    assert ratio.grad is not None
    assert ratio.grad.tolist() == [[0, 0]]
    with pytest.raises(ValueError, match="above 1"):
        clipped_surrogate(ratio, advantage, dual_clip=1.0)
