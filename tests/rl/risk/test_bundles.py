"""Bundling is a permutation, and credit goes back to where it came from."""

import pytest
import torch

from dynascope.rl.risk.bundles import bundle, unbundle

REWARDS = torch.rand(10, 8, generator=torch.Generator().manual_seed(0)).round(decimals=2)


def test_every_response_is_in_exactly_one_bundle() -> None:
    bundles = bundle(REWARDS, 5, generator=torch.Generator().manual_seed(1))
    assert bundles.scores.shape == (2, 8)
    assert torch.equal(bundles.order.sort(1).values, torch.arange(8).repeat(10, 1))
    assert len({tuple(row) for row in bundles.order.tolist()}) > 1
    torch.testing.assert_close(bundles.scores.sum(), REWARDS.sum())
    by_hand = sum(REWARDS[question, bundles.order[question, 3]] for question in range(5, 10))
    torch.testing.assert_close(bundles.scores[1, 3], by_hand)


def test_back_and_forth_is_the_identity() -> None:
    bundles = bundle(REWARDS, 5, generator=torch.Generator().manual_seed(1))
    numbers = torch.arange(16.0).view(2, 8)
    spread = unbundle(numbers, bundles)
    assert torch.equal(bundles.sums(spread), 5 * numbers)
    alone = bundle(REWARDS, 1, generator=torch.Generator().manual_seed(1))
    assert torch.equal(unbundle(alone.scores, alone), REWARDS)


def test_one_seed_bundles_alike_and_another_does_not() -> None:
    first, second, other = (bundle(REWARDS, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.order, second.order)
    assert not torch.equal(first.order, other.order)
    assert torch.equal(bundle(REWARDS, permutes=False).order, torch.arange(8).repeat(10, 1))


def test_a_last_set_that_is_not_full_is_scaled_up_or_dropped() -> None:
    ones = torch.ones(7, 4)
    normalized = bundle(ones, 5)
    assert normalized.scores.tolist() == [[5.0] * 4] * 2
    assert (unbundle(-torch.ones(2, 4), normalized) == -1).all()
    dropped = bundle(ones, 5, remainder="drop")
    assert dropped.scores.shape == (1, 4)
    assert unbundle(-torch.ones(1, 4), dropped).tolist() == [[-1.0] * 4] * 5 + [[0.0] * 4] * 2
    with pytest.raises(ValueError, match="fill no bundle"):
        bundle(ones[:3], 5, remainder="drop")


def test_credit_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    bundles = bundle(rewards, 2, permutes=False)
    advantage = torch.tensor([[-1.0, -2.0]])
    assert unbundle(advantage, bundles, rewards, "score").tolist() == [[-0.5, -3.0], [-0.5, -1.0]]
    deviation = 0.5**0.5
    expected = torch.tensor([[-1 / deviation, -2 / deviation], [-1.0, -2.0]])
    torch.testing.assert_close(unbundle(advantage, bundles, rewards, "std"), expected)
    # Away from their question's mean: (0.5, -0.5) and (0, 0), so the first question's responses carry everything.
    assert unbundle(advantage, bundles, rewards, "sum-mean").tolist() == [[-1.0, -2.0], [0.0, 0.0]]
    assert unbundle(advantage, bundles, torch.ones(2, 2), "sum-mean").tolist() == [[-0.5, -1.0], [-0.5, -1.0]]


def test_shares_of_any_credit_by_deviation_sum_to_the_bundles_advantage() -> None:
    bundles = bundle(REWARDS[:7], 5, generator=torch.Generator().manual_seed(1))
    advantage = -torch.arange(16.0).view(2, 8)
    torch.testing.assert_close(bundles.sums(unbundle(advantage, bundles, REWARDS[:7], "sum-mean")), advantage)


def test_bad_input_is_told() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        bundle(REWARDS, 0)
    with pytest.raises(ValueError, match="remainder is"):
        bundle(REWARDS, remainder="keep")
    with pytest.raises(ValueError, match="credit is"):
        unbundle(torch.zeros(2, 8), bundle(REWARDS), REWARDS, "all")
    with pytest.raises(ValueError, match="needs rewards"):
        unbundle(torch.zeros(2, 8), bundle(REWARDS), credit="std")
