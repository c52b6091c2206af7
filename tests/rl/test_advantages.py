"""Estimators against hand-worked numbers and plain loops."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dynascope.rl.advantage_filter import normalize_advantages
from dynascope.rl.advantages import (
    GAE,
    WhitenedReturns,
    generalized_advantages,
    group_z_score,
    leave_one_out,
    returns_to_go,
    token_rewards,
)
from dynascope.rl.batch import PolicyBatch

ONE_GROUP = torch.zeros(4, dtype=torch.long)
MASK = torch.tensor([[True, True, True], [True, False, False]])


@pytest.mark.parametrize(
    ("std", "expected"),
    [
        ("sample", [1.5, -0.5, -0.5, -0.5]),  # deviation 0.5
        ("population", [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)]),
        ("none", [0.75, -0.25, -0.25, -0.25]),
    ],
)
def test_one_right_of_four(std: str, expected: list[float]) -> None:
    found = group_z_score(torch.tensor([1.0, 0, 0, 0]), ONE_GROUP, std=std, eps=0.0)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_groups_in_any_order_and_of_any_size() -> None:
    rewards, ids = torch.rand(9), torch.tensor([5, -2, 5, 7, -2, 5, 7, 7, 7])
    found = group_z_score(rewards, ids, std="sample", eps=0.1)
    for name in (5, -2, 7):
        group = rewards[ids == name]
        torch.testing.assert_close(found[ids == name], (group - group.mean()) / (group.std() + 0.1))


@pytest.mark.parametrize("estimator", [group_z_score, leave_one_out])
def test_all_equal_rewards_give_exactly_zero(estimator: Callable[..., Tensor]) -> None:
    # A third, three times: the mean is not the number itself in float32.
    found = estimator(torch.full((7,), 1 / 3), torch.tensor([0, 0, 0, 1, 1, 1, 1]))
    assert found.tolist() == [0] * 7


@pytest.mark.parametrize("estimator", [group_z_score, leave_one_out])
def test_a_completion_alone_gets_zero_and_only_such_are_an_error(estimator: Callable[..., Tensor]) -> None:
    assert estimator(torch.tensor([1.0, 0.0, 5.0]), torch.tensor([0, 0, 1]))[2] == 0
    with pytest.raises(ValueError, match="every group has size 1"):
        estimator(torch.tensor([1.0, 0.0]), torch.tensor([0, 1]))


def test_an_affine_reward_changes_no_z_score() -> None:
    rewards = torch.rand(4)
    torch.testing.assert_close(
        group_z_score(3 * rewards + 2, ONE_GROUP, eps=0.0), group_z_score(rewards, ONE_GROUP, eps=0.0)
    )


def test_leave_one_out_by_hand() -> None:
    torch.testing.assert_close(
        leave_one_out(torch.tensor([1.0, 0, 0, 0]), ONE_GROUP), torch.tensor([1, -1 / 3, -1 / 3, -1 / 3])
    )


def test_the_reward_lies_on_the_last_token_and_nowhere_without_tokens() -> None:
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert token_rewards(torch.tensor([2.0, 3.0]), mask).tolist() == [[0, 2, 0], [0, 0, 0]]


def test_returns_with_a_kl_penalty_by_hand() -> None:
    rewards = token_rewards(torch.tensor([1.0]), MASK[:1], 0.1 * torch.tensor([[0.1, 0.2, 0.3]]))
    torch.testing.assert_close(returns_to_go(rewards, MASK[:1]), torch.tensor([[0.94, 0.95, 0.97]]))


def test_discounted_returns() -> None:
    found = returns_to_go(torch.tensor([[1.0, 0, 2], [3, 9, 9]]), MASK, gamma=0.5)
    torch.testing.assert_close(found, torch.tensor([[1.5, 1, 2], [3, 0, 0]]))


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_gae_is_the_double_loop(lam: float) -> None:
    rewards, values = torch.randn(2, 3) * MASK, torch.randn(2, 3)
    found = generalized_advantages(rewards, values, MASK, gamma=0.9, lam=lam)
    for row, length in enumerate((3, 1)):
        v = [*values[row, :length].tolist(), 0.0]
        errors = [float(rewards[row, t]) + 0.9 * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((0.9 * lam) ** (s - t) * errors[s] for s in range(t, length))
            assert float(found[row, t]) == pytest.approx(expected, abs=1e-6)
    assert found[1, 1:].tolist() == [0, 0]


def test_whitening_counts_tokens_and_leaves_padding_alone() -> None:
    values = torch.tensor([[1.0, 2, 3], [6, 99, 99]])
    found = normalize_advantages(values, MASK)
    tokens = found[MASK]
    assert float(tokens.mean()) == pytest.approx(0, abs=1e-6)
    assert float(tokens.square().mean()) == pytest.approx(1, abs=1e-6)
    assert found[1, 1:].tolist() == [0, 0]
    assert normalize_advantages(torch.full((2, 3), 0.1), MASK).abs().sum() == 0
    # 31 successes and a failure: the failure lies -sqrt(31) deviations away.
    outlier = normalize_advantages(torch.tensor([[1.0] * 31 + [0.0]]), torch.ones(1, 32).bool())
    assert float(outlier[0, -1]) == pytest.approx(-5.567764, abs=1e-5)


def test_reinforce_pp_and_ppo_agree_where_they_should() -> None:
    batch = PolicyBatch(
        mask=MASK,
        rewards=torch.tensor([1.0, 0.0]),
        group_ids=torch.arange(2),
        behaviour_log_probs=torch.randn(2, 3),
        ref_log_probs=torch.randn(2, 3),
        values=torch.zeros(2, 3),
    )
    # Without a critic's opinion and with λ = 1, GAE is the return.
    torch.testing.assert_close(GAE(0.1, lam=1.0)(batch), WhitenedReturns(0.1)(batch))
    assert WhitenedReturns(0.0).needs == frozenset()
    assert GAE(0.0).needs == {"values"}
