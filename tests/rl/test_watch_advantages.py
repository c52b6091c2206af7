"""Which way an objective pushes, by hand."""

import pytest
import torch

from dynascope.rl.monitors import watch_advantages
from dynascope.rl.rollout import Rollout


def rollout(log_probs: torch.Tensor, mask: torch.Tensor) -> Rollout:
    num = len(mask)
    return Rollout(
        prompts=torch.zeros(num, 1, dtype=torch.long),
        prompt_mask=torch.ones(num, 1).bool(),
        tokens=torch.zeros_like(mask, dtype=torch.long),
        mask=mask,
        behaviour_log_probs=log_probs,
        sampling_log_probs=log_probs,
        is_truncated=torch.zeros(num).bool(),
        group_ids=torch.zeros(num, dtype=torch.long),
        max_length=mask.shape[1],
        temperature=1.0,
        weights_version=0,
    )


def test_shares_size_and_covariance_are_of_tokens() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    seen = rollout(torch.tensor([[-1.0, -1.0, -1.0], [-3.0, 0.0, 0.0], [-2.0, -2.0, 0.0]]), mask)
    told = watch_advantages(seen, torch.tensor([1.0, -2.0, 0.0]))
    assert told["advantage/pushed_up"].item() == pytest.approx(3 / 6)
    assert told["advantage/pushed_down"].item() == pytest.approx(1 / 6)
    assert told["advantage/rms"].item() == pytest.approx((7 / 6) ** 0.5)
    # Log-probabilities have the mean -10/6; Σ (log π + 10/6) A = 3 · 4/6 + 2 · 8/6.
    assert told["advantage/entropy_covariance"].item() == pytest.approx((3 * 4 + 2 * 8) / 36)


def test_advantages_of_tokens_count_where_there_are_tokens() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    told = watch_advantages(rollout(-torch.ones(2, 2), mask), torch.tensor([[1.0, 5.0], [-1.0, 0.0]]))
    assert told["advantage/pushed_up"].item() == pytest.approx(1 / 3)
    assert told["advantage/pushed_down"].item() == pytest.approx(1 / 3)
    assert told["advantage/entropy_covariance"] == 0
