"""RiskPO's estimator as a slot: what it keeps, what it gives, and what it refuses."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from dynascope.rl.advantages import GroupZScore, center, unit_rms
from dynascope.rl.batch import PolicyBatch
from dynascope.rl.presets import grpo, preset, riskpo
from dynascope.rl.risk.advantage import RiskAdvantage, rows_by_question
from dynascope.rl.risk.measures import mvar_advantage
from dynascope.rl.risk.quantiles import QuantileTracker

pytestmark = pytest.mark.filterwarnings("ignore:only .* bundles lie below")


def rollout(rewards: Tensor, **more: Any) -> PolicyBatch:
    """Rewards of questions and responses (P, G), four tokens each."""
    num, width = rewards.shape
    return PolicyBatch(
        mask=torch.ones(num * width, 4).bool(),
        rewards=rewards.flatten(),
        group_ids=torch.arange(num).repeat_interleave(width),
        **more,
    )


def random_rewards(seed: int, num: int = 10, width: int = 8) -> Tensor:
    return (torch.rand(num, width, generator=torch.Generator().manual_seed(seed)) < 0.5).float()


def test_switched_off_it_is_its_parent() -> None:
    assert riskpo.having(advantage=GroupZScore(), ratio="token") == grpo


def test_advantages_are_of_the_quantiles_known_before_the_rollout() -> None:
    estimator = RiskAdvantage(bundle_size=1, permutes=False, lr=0.3)
    twin = QuantileTracker(estimator.tracker.levels, 0.3)
    for seed in range(4):
        rewards = random_rewards(seed) * (1 + seed)
        if not seed:
            twin.update(rewards)
        expected = mvar_advantage(rewards.flatten(), twin.value(0.2), twin.value(0.8))
        torch.testing.assert_close(estimator(rollout(rewards)), expected)
        if seed:
            twin.update(rewards)


def test_the_tracker_outlives_the_batch() -> None:
    """The released trainer writes tracked quantiles to a batch that nobody sees again; here they are the object's."""
    objective = preset("riskpo")
    objective.advantages(rollout(random_rewards(0)))
    before = objective.advantage.tracker.values.clone()
    objective.advantages(rollout(torch.zeros(10, 8)))
    after = objective.advantage.tracker.values
    torch.testing.assert_close(after, before + 0.1 * (torch.tensor(objective.advantage.tracker.levels) - 1))
    assert preset("riskpo").advantage.tracker.values is None  # every preset has a state of its own
    assert riskpo.advantage.tracker.values is None


def test_a_question_that_nobody_solves_still_pushes_and_a_solved_one_does_not() -> None:
    estimator = RiskAdvantage(bundle_size=1)
    estimator(rollout(random_rewards(0)))
    rewards = torch.stack([torch.zeros(8), torch.ones(8), random_rewards(1)[0]])
    advantage = estimator(rollout(rewards)).view(3, 8)
    assert (advantage[0] < 0).all()
    assert (advantage[1] == 0).all()
    assert grpo.advantages(rollout(rewards)).view(3, 8)[:2].abs().max() == 0


def test_equal_scores_never_blow_up() -> None:
    for measure in ("mvar", "released", "released-plain", "rvar", "cvar", "seeking", "mean"):
        estimator = RiskAdvantage(measure=measure)
        estimator(rollout(random_rewards(0)))
        low, high = (float(estimator.tracker.value(level)) for level in (0.2, 0.8))
        for rewards in (torch.zeros(10, 8), torch.ones(10, 8)):
            advantage = estimator(rollout(rewards))
            assert advantage.isfinite().all()
            if measure == "mvar":
                assert advantage.abs().max() <= 1.5 * low + (high - low) + 1e-5
            assert advantage.abs().max() < 30


def test_one_response_a_question_is_enough() -> None:
    for measure in ("mvar", "released"):
        advantage = RiskAdvantage(measure=measure, credit="std", bundle_size=2)(rollout(random_rewards(0, 40, 1)))
        assert advantage.isfinite().all()
        assert advantage.min() < 0


def test_rows_in_any_order_and_questions_of_unequal_size() -> None:
    group_ids = torch.tensor([5, 2, 5, 2, 5, 2, 2])
    assert rows_by_question(group_ids).tolist() == [[1, 3, 5], [0, 2, 4]]
    rewards = torch.tensor([0.0, 1, 0, 0, 1, 0, 1])
    batch = PolicyBatch(mask=torch.ones(7, 1).bool(), rewards=rewards, group_ids=group_ids)
    estimator = RiskAdvantage(alpha=0.9, beta=0.95, bundle_size=2, permutes=False)
    with pytest.warns(UserWarning, match="lower tail is mostly noise"):
        advantage = estimator(batch)
    assert advantage[6] == 0
    assert estimator.metrics["risk/dropped"] == 1
    assert advantage[0] == advantage[1]
    assert advantage[4] == advantage[5]


def test_a_question_with_one_response_that_costs_all_others_theirs_is_told() -> None:
    group_ids = torch.cat([torch.arange(4).repeat_interleave(8), torch.tensor([4])])
    with pytest.warns(UserWarning, match="28 of 33 responses are in no bundle"):
        assert rows_by_question(group_ids).shape == (5, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows_by_question(torch.arange(4).repeat_interleave(5)[:-1])  # 3 of 19, less than a fifth


@pytest.mark.parametrize("quantiles", ["track", "batch", "mix"])
def test_beta_one_leaves_no_score_out(quantiles: str) -> None:
    """With nothing more on the tail it is the mean objective: A = R − the highest score."""
    estimator = RiskAdvantage(0.2, 1.0, 0.0, bundle_size=2, quantiles=quantiles)
    mean = RiskAdvantage(bundle_size=2, measure="mean")
    for scale in (1.0, 3.0):  # the second rollout lies above all that was tracked
        seen = rollout(scale * torch.rand(10, 8, generator=torch.Generator().manual_seed(1)))
        advantage, centred = estimator(seen), mean(seen)
        assert (advantage <= 0).all()
        if quantiles == "track":
            assert advantage.max() == 0
            torch.testing.assert_close(advantage - advantage.mean(), centred)
        assert estimator.metrics["risk/mvar"].item() == pytest.approx(estimator.metrics["risk/mean"].item())


def test_a_wide_tail_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RiskAdvantage()(rollout(random_rewards(0, 20, 8)))


def test_quantiles_of_the_batch_or_of_both() -> None:
    rewards = random_rewards(0)
    for quantiles, share in (("track", 1.0), ("batch", 0.0), ("mix", 0.5)):
        estimator = RiskAdvantage(quantiles=quantiles, permutes=False)
        estimator(rollout(torch.ones(10, 8)))
        tracked = 5.0
        scores = rewards.view(2, 5, 8).sum(1)
        low, high = (
            share * tracked + (1 - share) * scores.quantile(level, dim=1, keepdim=True) for level in (0.2, 0.8)
        )
        expected = mvar_advantage(scores, low, high).repeat_interleave(5, 0).flatten()
        torch.testing.assert_close(estimator(rollout(rewards)), expected)


def test_the_tracked_baseline_centres_what_the_tracked_distribution_would_give() -> None:
    scores = torch.rand(400, 50, generator=torch.Generator().manual_seed(0))
    estimator = RiskAdvantage(bundle_size=1, uses_tracked_baseline=True)
    plain = RiskAdvantage(bundle_size=1)
    advantage, one_sided = estimator(rollout(scores)), plain(rollout(scores))
    assert one_sided.mean() < -0.2
    assert advantage.mean().abs() < 0.02  # the rule leaves out both outer twentieths
    torch.testing.assert_close(advantage - advantage.mean(), one_sided - one_sided.mean())


def test_state_comes_back_from_a_checkpoint() -> None:
    objective = preset("riskpo")
    objective.advantages(rollout(random_rewards(0)))
    other = preset("riskpo")
    other.load_state_dict(copy.deepcopy(objective.state_dict()))
    for seed in (1, 2):
        seen = rollout(random_rewards(seed))
        assert torch.equal(objective.advantages(seen), other.advantages(seen))
    assert objective.rollout_metrics["risk/cvar"] <= objective.rollout_metrics["risk/mean"]


def test_permutations_change_from_rollout_to_rollout() -> None:
    estimator = RiskAdvantage()
    seen = rollout(random_rewards(0))
    first, second = estimator(seen), estimator(seen)
    assert not torch.equal(first, second)


def test_on_policy_the_gradient_is_the_risk_gradient() -> None:
    log_probs = torch.zeros(80, 4, requires_grad=True)
    seen = rollout(random_rewards(0), log_probs=log_probs)
    advantage = preset("riskpo").advantages(seen)
    preset("riskpo").loss(seen.having(advantage=advantage))[0].backward()
    torch.testing.assert_close(log_probs.grad, -(advantage / 4 / 80)[:, None].expand(80, 4))


def test_centring_and_unit_size() -> None:
    seen = rollout(random_rewards(0))
    one_sided = RiskAdvantage()(seen)
    centred = riskpo.having(advantage=RiskAdvantage(), post=(center,)).advantages(seen)
    torch.testing.assert_close(centred, one_sided - one_sided.mean())
    unit = riskpo.having(advantage=RiskAdvantage(), post=(unit_rms,)).advantages(seen)
    assert unit.square().mean().item() == pytest.approx(1)
    torch.testing.assert_close(unit / unit.min(), one_sided / one_sided.min())
    assert unit_rms(torch.zeros(80), seen).tolist() == [0.0] * 80
    padded = seen.having(mask=torch.arange(4) < torch.tensor([2]).expand(80)[:, None])
    by_token = center(one_sided[:, None].expand(80, 4), padded)
    assert by_token[:, 2:].abs().max() == 0
    assert by_token.sum().abs() < 1e-4


def test_bad_settings_are_told() -> None:
    for settings, message in (
        ({"alpha": 0.8, "beta": 0.2}, "0 < alpha < beta <= 1"),
        ({"beta": 1.1}, "0 < alpha < beta <= 1"),
        ({"beta": 1.0, "measure": "seeking"}, "beta must be below 1"),
        ({"measure": "var"}, "measure is"),
        ({"credit": "all"}, "credit is"),
        ({"quantiles": "none"}, "quantiles is"),
        ({"lr": 0.0}, "above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            RiskAdvantage(**settings)
