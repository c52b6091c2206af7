"""Slots that steer by hidden rewards: what they measure, and what they leave alone."""

import pytest
import torch
from hidden_world import World

from dynascope.rl.hidden_reward_steering import (
    HiddenRewardSteering,
    HoldEntropy,
    RandomTokens,
    SharedTokenRelief,
    positive_only,
)
from dynascope.rl.presets import grpo, gspo, thr, thr_gspo


def test_uniform_groups_keep_their_advantage() -> None:
    world = World()
    own = torch.randn(9)
    for slot in (HiddenRewardSteering(p=0.5, mask_small=True), SharedTokenRelief()):
        found = slot(own, world.batch())
        uniform = world.group_ids == 9
        assert torch.equal(found[uniform], own[uniform, None].expand(2, 5))
        all_right = world.batch(correct=torch.ones(9).bool())
        assert torch.equal(slot(own, all_right), own[:, None].expand(9, 5))


def test_slot_measures_as_the_function_does_and_signs_stay() -> None:
    world = World()
    advantage = grpo.advantages(world.batch())
    found = HiddenRewardSteering(p=-0.3)(advantage, world.batch())
    told = world.measure(advantage=advantage)
    torch.testing.assert_close(found, advantage[:, None] * (1 - 0.3 * told.thr.sign()).float(), atol=1e-6, rtol=0)
    assert torch.equal(found.sign(), advantage[:, None].expand_as(found).sign())
    by_reward = HiddenRewardSteering(p=-0.3, threshold=0.5)
    assert "correct" not in by_reward.needs
    torch.testing.assert_close(by_reward(advantage, world.batch(correct=None)), found)


def test_switched_off_it_is_grpo_to_the_bit_and_needs_nothing() -> None:
    off, world = HiddenRewardSteering(p=0.0), World()
    assert grpo.having(post=(off,)).rollout_needs == frozenset()
    assert torch.equal(grpo.having(post=(off,)).advantages(world.batch()), grpo.advantages(world.batch()))
    assert thr.having(post=()) == grpo
    assert thr_gspo.having(post=(), ratio="sequence") == gspo
    assert thr.rollout_needs == {"hidden", "unembedding", "tokens", "correct"}
    with pytest.raises(ValueError, match="needs correct"):
        thr.advantages(world.batch(correct=None))


def test_p_may_follow_a_schedule() -> None:
    world = World()
    slot = HiddenRewardSteering(p=lambda step: 0.1 * step)
    own = world.advantage
    assert torch.equal(slot(own, world.batch(step=0)), own)
    assert torch.equal(slot(own, world.batch(step=3)), HiddenRewardSteering(p=0.1 * 3)(own, world.batch()))


def test_p_may_hold_the_entropy() -> None:
    world = World()
    own = grpo.advantages(world.batch())
    for surprise, expected in ((0.5, 0.3), (0.31, 0.05), (0.1, -0.3)):
        held = HoldEntropy(target=0.3, gain=5.0, most=0.3)
        objective = grpo.having(post=(HiddenRewardSteering(p=held),))
        seen = world.batch(behaviour_log_probs=torch.where(world.mask, -surprise, 99.0))
        found = objective.advantages(seen)
        torch.testing.assert_close(found, HiddenRewardSteering(p=expected)(own, seen), atol=1e-6, rtol=1e-5)
        assert float(objective.rollout_metrics["thr/p"]) == pytest.approx(expected, abs=1e-6)
    assert "behaviour_log_probs" in objective.rollout_needs
    assert HiddenRewardSteering(p=0.2).metrics == {}
    for settings in ({"gain": 0.0}, {"most": 1.0}):
        with pytest.raises(ValueError, match="must be above 0"):
            HoldEntropy(0.3, **settings)


def test_on_gspo_each_token_has_its_own_advantage_at_the_sequences_ratio() -> None:
    world = World()
    behaviour = -torch.rand(9, 5)
    log_probs = (behaviour + 1e-5 * torch.randn(9, 5)).requires_grad_()
    seen = world.batch(behaviour_log_probs=behaviour, log_probs=log_probs)
    advantage = thr_gspo.advantages(seen)
    loss, _ = thr_gspo.loss(seen.having(advantage=advantage))
    (gradient,) = torch.autograd.grad(loss, log_probs)
    lengths = world.mask.sum(1, keepdim=True)
    ratio = (((log_probs - behaviour) * world.mask).sum(1, keepdim=True) / lengths).exp()
    expected = -(advantage * ratio * world.mask / lengths / 9).detach()
    torch.testing.assert_close(gradient, expected.float(), atol=1e-6, rtol=1e-4)


def test_baselines() -> None:
    world = World()
    assert positive_only(torch.tensor([-1.0, 2.0]), world.batch()).tolist() == [0, 2]


def test_rewards_that_are_not_binary_anchor_by_their_positive_advantages() -> None:
    world = World()
    rewards = torch.tensor([0.9, 0.1, 0.7, 0.4, 0.2, 0.5, 0.0, 0.3, 0.5])
    seen = world.batch(rewards=rewards, correct=None)
    advantage = grpo.advantages(seen)
    slot = HiddenRewardSteering(p=-0.3, anchors="advantage")
    assert "correct" not in slot.needs
    world.correct = advantage.clamp(min=0)
    told = world.measure(advantage=advantage)
    expected = advantage[:, None] * (1 - 0.3 * told.thr.sign()).float()
    torch.testing.assert_close(slot(advantage, seen), expected, atol=1e-6, rtol=0)
    by_token = advantage[:, None].expand(9, 5)
    torch.testing.assert_close(slot(by_token, seen), expected, atol=1e-6, rtol=0)
    relieved = SharedTokenRelief(anchors="advantage")(advantage, seen)
    assert torch.equal(relieved[advantage > 0], by_token[advantage > 0])
    assert bool((relieved != by_token).any())
    with pytest.raises(ValueError, match="not by both"):
        HiddenRewardSteering(anchors="advantage", threshold=0.5)


@pytest.mark.parametrize("weighting", ["sign", "advantage"])
def test_a_scale_of_the_advantages_changes_no_mask(weighting: str) -> None:
    world = World()
    slot = HiddenRewardSteering(p=0.0, mask_small=True, weighting=weighting)
    found = [slot(scale * world.advantage, world.batch()) / scale for scale in (1.0, 10.0)]
    torch.testing.assert_close(found[1], found[0])
    assert bool((found[0][world.mask] == 0).any())


def test_tokens_are_dropped_at_random_and_anew_in_every_rollout() -> None:
    seen = World().batch(mask=torch.ones(9, 5).bool())
    whole = torch.arange(1.0, 10.0)
    kept = [RandomTokens(0.4, seed)(whole, seen.having(step=step)) for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])
    assert not torch.equal(kept[0], kept[3])
    dropped = torch.stack(kept) == 0
    assert 0.25 < float(dropped.float().mean()) < 0.55
    assert torch.equal(torch.stack(kept)[~dropped], whole[:, None].expand(4, 9, 5)[~dropped])
    with pytest.raises(ValueError, match=r"share=1\.0"):
        RandomTokens(1.0)
