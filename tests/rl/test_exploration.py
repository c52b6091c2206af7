"""The advantage of Pass@K against an enumeration of all sets, and the tokens that KL-Cov holds."""

from itertools import combinations

import pytest
import torch

from dynascope.rl.advantages import group_z_score
from dynascope.rl.batch import PolicyBatch
from dynascope.rl.exploration import PassAtKMixed, TopCovariance, pass_at_k_advantage
from dynascope.rl.kl import KLTerm
from dynascope.rl.presets import grpo, kl_cov


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("right", [0, 1, 3, 6])
def test_pass_at_k_is_the_mean_over_all_sets_of_k(right: int, k: int) -> None:
    num = 6
    correct = torch.arange(num) < right
    sets = list(combinations(range(num), k))
    rewards = torch.tensor([float(any(correct[one] for one in chosen)) for chosen in sets])
    spread = rewards.std(correction=0)
    z_scores = (rewards - rewards.mean()) / spread if spread > 0 else torch.zeros_like(rewards)
    own = [[place for place, chosen in enumerate(sets) if answer in chosen] for answer in range(num)]
    expected = torch.stack([z_scores[places].mean() for places in own])
    found = pass_at_k_advantage(correct, torch.zeros(num).long(), k)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert float(found.sum()) == pytest.approx(0, abs=1e-5)


def test_at_one_it_is_the_z_score_whatever_the_groups() -> None:
    correct, groups = torch.tensor([1, 0, 0, 1, 1, 0, 0]).bool(), torch.tensor([5, 2, 5, 2, 2, 5, 5])
    found = pass_at_k_advantage(correct, groups, 1)
    torch.testing.assert_close(found, group_z_score(correct.float(), groups, std="population", eps=0.0))
    with pytest.raises(ValueError, match="fewest answers of a prompt, 3"):
        pass_at_k_advantage(correct, groups, 4)


def batch() -> PolicyBatch:
    generator = torch.Generator().manual_seed(0)
    behaviour = -torch.rand(4, 5, generator=generator)
    return PolicyBatch(
        mask=torch.arange(5) < torch.tensor([5, 2, 3, 5])[:, None],
        rewards=torch.tensor([1.0, 0, 0, 0]),
        group_ids=torch.zeros(4).long(),
        behaviour_log_probs=behaviour,
        log_probs=behaviour + 0.3 * torch.randn(4, 5, generator=generator),
        correct=torch.tensor([True, False, False, False]),
    )


def test_mixed_is_between_the_two() -> None:
    seen = batch()
    at_k, plain = pass_at_k_advantage(seen.correct, seen.group_ids, 2), PassAtKMixed().estimator(seen)
    torch.testing.assert_close(PassAtKMixed(2, 1.0)(seen), at_k)
    torch.testing.assert_close(PassAtKMixed(2, 0.0)(seen), plain)
    torch.testing.assert_close(PassAtKMixed(2, 0.25)(seen), 0.25 * at_k + 0.75 * plain)
    by_token = PassAtKMixed(2, 0.5, lambda one: plain[:, None] * one.mask)(seen)
    torch.testing.assert_close(by_token, (0.5 * at_k + 0.5 * plain)[:, None] * seen.mask)


def test_the_largest_covariances_are_held_and_no_others() -> None:
    seen = batch().having(advantage=torch.tensor([1.7, -0.5, -0.5, -0.7]))
    by_token = seen.advantage[:, None].expand(4, 5)
    own, pushed = seen.log_probs[seen.mask], by_token[seen.mask]
    covariance = (own - own.mean()) * (pushed - pushed.mean())
    for share, count in ((1e-3, 1), (0.2, 3), (1.0, 15)):
        held = TopCovariance(share)(seen)
        assert int(held.sum()) == count
        assert torch.equal(covariance.topk(count).values, covariance[held[seen.mask]].sort(descending=True).values)
    with pytest.raises(ValueError, match="share=0"):
        TopCovariance(0.0)


def test_kl_cov_pulls_held_tokens_towards_the_policy_that_sampled() -> None:
    seen = batch()
    advantage = kl_cov.advantages(seen)

    def gradient(objective: object) -> torch.Tensor:
        log_probs = seen.log_probs.clone().requires_grad_()
        loss, metrics = objective.loss(seen.having(advantage=advantage, log_probs=log_probs))
        assert float(metrics["kl/behaviour"]) >= 0  # k3, as for every objective
        return torch.autograd.grad(loss, log_probs)[0]

    free = kl_cov.having(kl=())
    assert free == grpo.having(clip=(None, None), aggregation="token-mean")
    held = TopCovariance()(seen.having(advantage=advantage))
    expected = torch.where(held, (seen.log_probs - seen.behaviour_log_probs).sign(), 0.0) / seen.mask.sum()
    torch.testing.assert_close(gradient(kl_cov) - gradient(free), expected)
    on_policy = seen.having(behaviour_log_probs=None, advantage=advantage)
    assert float(kl_cov.loss(on_policy)[0]) == float(free.loss(on_policy)[0])
    assert KLTerm("behaviour", "abs").needs == {"behaviour_log_probs"}
