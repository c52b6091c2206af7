"""Distillation beside rewards: schedules and masks by hand, and three ways that agree."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dynascope.rl.batch import PolicyBatch
from dynascope.rl.distillation import (
    LinearAnneal,
    TeacherAdvantage,
    TeacherReward,
    kd_mask,
    kd_rkl_loss,
    solved,
    teacher_credit,
    unsolved_prompts,
    wrong_answers,
)
from dynascope.rl.kl import KLTerm
from dynascope.rl.objective import LossView, PolicyObjective
from dynascope.rl.presets import grpo, kd_rkl, kdrl, kdrl_masking_response


def batch(num: int = 8, width: int = 5, **changes: Any) -> PolicyBatch:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, width + 1, (num,), generator=generator)
    behaviour = -torch.rand(num, width, generator=generator)
    correct = torch.tensor([True, False, False, True, False, False, False, False])
    groups = torch.arange(num) // 4
    return PolicyBatch(
        **{
            "mask": torch.arange(width) < lengths[:, None],
            "rewards": correct.float(),
            "group_ids": groups,
            "behaviour_log_probs": behaviour,
            "teacher_log_probs": behaviour + torch.randn(num, width, generator=generator),
            "correct": correct,
            "is_solved": solved(correct, groups),
            **changes,
        }
    )


def gradient(objective: PolicyObjective, seen: PolicyBatch) -> Tensor:
    log_probs = seen.behaviour_log_probs.clone().requires_grad_()
    advantage = objective.advantages(seen)
    loss, _ = objective.loss(seen.having(log_probs=log_probs, advantage=advantage))
    return torch.autograd.grad(loss, log_probs)[0]


def test_annealing_by_hand() -> None:
    anneal = LinearAnneal()
    assert [anneal(step) for step in (0, 40, 80, 200)] == pytest.approx([5e-3, 3e-3, 1e-3, 1e-3])
    assert LinearAnneal.over(0.1, 0.01, 40)(40) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="horizon=0 must be at least 1"):
        LinearAnneal.over(0.1, 0.01, 0)
    for settings in ({"rate": -1.0}, {"floor": 1.0}):
        with pytest.raises(ValueError, match="must not be"):
            LinearAnneal(**settings)


def test_masks_by_hand() -> None:
    correct, groups = torch.tensor([1, 0, 0, 0, 0, 0]).bool(), torch.tensor([0, 0, 0, 1, 1, 1])
    assert kd_mask(correct, groups).all()
    assert kd_mask(correct, groups, "response").tolist() == [False, True, True, True, True, True]
    assert kd_mask(correct, groups, "group").tolist() == [False, False, False, True, True, True]
    with pytest.raises(ValueError, match="mode is none"):
        kd_mask(correct, groups, "prompt")


def test_masks_go_by_correctness_and_not_by_reward() -> None:
    seen = batch(rewards=torch.arange(8.0))
    assert torch.equal(wrong_answers(seen), kd_mask(seen.correct, seen.group_ids, "response"))
    assert torch.equal(unsolved_prompts(seen), kd_mask(seen.correct, seen.group_ids, "group"))


def test_a_prompts_mask_survives_the_shuffle_into_minibatches() -> None:
    seen = batch()
    row = torch.tensor([2])  # wrong, of a prompt that another completion solved
    assert unsolved_prompts(seen.select(row)).tolist() == [False]


@pytest.mark.parametrize("mode", ["none", "response", "group"])
@pytest.mark.parametrize("norm", ["all", "kept"])
def test_the_plain_loss_is_the_term_of_the_objective(mode: str, norm: str) -> None:
    seen = batch()
    keep = kd_mask(seen.correct, seen.group_ids, mode)
    term = KLTerm("teacher", "k2", 1.0, keep=lambda one: keep, norm=norm, clamp=0.5)
    log_probs = (seen.behaviour_log_probs + 0.1).requires_grad_()
    expected = kd_rkl_loss(log_probs, seen.teacher_log_probs, seen.mask, keep=keep, mask_norm=norm, clamp=0.5)
    objective = kd_rkl.having(kl=(term,))
    found, _ = objective.loss(seen.having(log_probs=log_probs, advantage=torch.zeros(8)))
    torch.testing.assert_close(found, expected)


def test_nothing_kept_is_zero() -> None:
    seen = batch()
    none = torch.zeros(8).bool()
    for norm in ("all", "kept"):
        loss = kd_rkl_loss(seen.behaviour_log_probs, seen.teacher_log_probs, seen.mask, keep=none, mask_norm=norm)
        assert float(loss) == 0


def test_joint_is_the_advantage_form_at_equal_policies() -> None:
    seen = batch()
    joint = kdrl.having(kl=(KLTerm("teacher", "k2", 0.05, clamp=0.7),))
    shaped = kdrl.having(kl=(), adjust=(TeacherAdvantage(0.05, clamp=0.7),))
    torch.testing.assert_close(gradient(joint, seen), gradient(shaped, seen), atol=1e-6, rtol=0)
    masked = kdrl.having(kl=(KLTerm("teacher", "k2", 0.05, keep=wrong_answers),))
    other = kdrl.having(kl=(), adjust=(TeacherAdvantage(lambda step: 0.05, keep=wrong_answers),))
    torch.testing.assert_close(gradient(masked, seen), gradient(other, seen), atol=1e-6, rtol=0)


def test_switched_off_it_is_grpo_to_the_bit() -> None:
    seen = batch()
    plain = gradient(grpo.having(aggregation="token-mean"), seen)
    assert torch.equal(gradient(kdrl.having(kl=(KLTerm("teacher", "k2", 0.0),)), seen), plain)
    assert torch.equal(gradient(kdrl.having(kl=()), seen), plain)
    assert kdrl.having(kl=(), aggregation="seq-mean-token-mean") == grpo
    off = kdrl.having(kl=(), advantage=TeacherReward(0.0))
    assert torch.equal(gradient(off, seen), plain)


def test_only_the_teacher_is_left_without_a_right_answer() -> None:
    seen = batch(rewards=torch.zeros(8))
    assert gradient(kdrl.having(kl=()), seen).abs().max() == 0
    alone = kdrl.having(policy_weight=0.0)
    assert torch.equal(gradient(kdrl, seen), gradient(alone, seen))
    assert gradient(kdrl, seen).abs().max() > 0


@pytest.mark.parametrize("kind", ["k2", "k3", "full"])
def test_a_teacher_that_is_the_policy_teaches_nothing(kind: str) -> None:
    logits = torch.randn(8, 5, 7)
    tokens = torch.randint(7, (8, 5))
    same = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    moving = logits.clone().requires_grad_()
    log_probs = moving.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    seen = batch(teacher_log_probs=same, teacher_logits=logits, logits=moving, log_probs=log_probs)
    objective = kd_rkl.having(kl=(KLTerm("teacher", kind, 1.0),))
    loss, _ = objective.loss(seen.having(advantage=torch.zeros(8)))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(moving.grad, torch.zeros_like(logits), atol=1e-6, rtol=0)


def test_return_to_go_by_hand() -> None:
    log_probs, teacher = torch.zeros(1, 3), torch.tensor([[1.0, -2.0, 4.0]])
    mask = torch.tensor([[True, True, True]])
    assert teacher_credit(log_probs, teacher, mask).tolist() == [[1, -2, 4]]
    assert teacher_credit(log_probs, teacher, mask, credit="return_to_go").tolist() == [[3, 2, 4]]
    assert teacher_credit(log_probs, teacher, mask, credit="return_to_go", gamma=0.5).tolist() == [[1, 0, 4]]
    moving = log_probs.clone().requires_grad_()
    kd_rkl_loss(moving, teacher, mask, credit="return_to_go", clamp=3.0).backward()
    torch.testing.assert_close(moving.grad, -torch.tensor([[2.0, 1.0, 3.0]]) / 3)


def test_return_to_go_is_the_gradient_of_the_divergence_of_whole_completions() -> None:
    """Two tokens of a binary vocabulary, all four completions enumerated."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, generator=generator), torch.randn(2, 2, generator=generator)
    first_t, second_t = torch.randn(2, generator=generator), torch.randn(2, 2, generator=generator)
    first.requires_grad_()
    second.requires_grad_()
    pairs = torch.cartesian_prod(torch.arange(2), torch.arange(2))

    def log_probs(one: Tensor, two: Tensor) -> Tensor:
        return torch.stack([one.log_softmax(0)[pairs[:, 0]], two.log_softmax(1)[pairs[:, 0], pairs[:, 1]]], 1)

    own, teacher = log_probs(first, second), log_probs(first_t, second_t)
    chance = own.sum(1).exp()
    exact = torch.autograd.grad((chance * (own - teacher).sum(1)).sum(), [first, second], retain_graph=True)
    gaps = teacher_credit(own, teacher, torch.ones(4, 2).bool(), credit="return_to_go")
    found = torch.autograd.grad(-(chance.detach()[:, None] * gaps * own).sum(), [first, second])
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_an_importance_ratio_is_a_constant_weight() -> None:
    seen = batch()
    ratio = torch.rand(8, 5).requires_grad_()
    moving = seen.behaviour_log_probs.clone().requires_grad_()
    kd_rkl_loss(moving, seen.teacher_log_probs, seen.mask, is_ratio=ratio).backward()
    assert ratio.grad is None
    gap = moving.detach() - seen.teacher_log_probs
    torch.testing.assert_close(moving.grad, (ratio.detach() * gap * seen.mask) / seen.mask.sum())


def test_the_reward_form_compares_groups_after_the_teacher_has_spoken() -> None:
    seen = batch(rewards=torch.zeros(8))
    for over in ("sum", "mean"):
        found = TeacherReward(0.1, over)(seen)
        gap = ((seen.teacher_log_probs - seen.behaviour_log_probs) * seen.mask).sum(1)
        gap = gap if over == "sum" else gap / seen.mask.sum(1)
        torch.testing.assert_close(found, grpo.advantage(seen.having(rewards=0.1 * gap)))
    assert TeacherReward().needs == {"behaviour_log_probs", "teacher_log_probs"}


def test_pads_order_and_parts_change_nothing() -> None:
    seen = batch()
    expected = kd_rkl_loss(seen.behaviour_log_probs, seen.teacher_log_probs, seen.mask)
    order = torch.randperm(8)
    pads = [
        torch.nn.functional.pad(one, (0, 2), value=float("nan"))
        for one in (seen.behaviour_log_probs, seen.teacher_log_probs)
    ]
    padded = kd_rkl_loss(*pads, torch.nn.functional.pad(seen.mask, (0, 2)))
    torch.testing.assert_close(padded, expected)
    shuffled = seen.select(order)
    torch.testing.assert_close(
        kd_rkl_loss(shuffled.behaviour_log_probs, shuffled.teacher_log_probs, shuffled.mask), expected
    )
    keep = kd_mask(seen.correct, seen.group_ids, "response")
    for mask_norm, count in (("all", seen.mask.sum()), ("kept", seen.mask[keep].sum())):

        def loss(rows: Any, mask_norm: str = mask_norm, **more: Any) -> Tensor:
            part = seen.select(rows)
            given = (part.behaviour_log_probs, part.teacher_log_probs, part.mask)
            return kd_rkl_loss(*given, keep=keep[rows], mask_norm=mask_norm, **more)

        parts = [loss(rows, num_tokens=count) for rows in seen.split(3)]
        torch.testing.assert_close(sum(parts), loss(torch.arange(8)))


@pytest.mark.parametrize("norm", ["all", "kept"])
def test_micro_batches_of_a_masked_term_add_up(norm: Any) -> None:
    term = KLTerm("teacher", "k2", 1.0, keep=wrong_answers, norm=norm, also_needs=frozenset({"correct"}))
    objective = kd_rkl.having(kl=(term,))
    seen = batch(is_truncated=torch.arange(8) == 1, advantage=torch.zeros(8))
    seen = seen.having(log_probs=seen.behaviour_log_probs + 0.1)
    for one in (objective, objective.having(learns_from_truncated=False)):
        step = seen.having(num_tokens=seen.mask.sum(), num_completions=8, num_kept=one.num_kept(seen))
        parts = [one.loss(step.select(rows))[0] for rows in step.split(3)]
        torch.testing.assert_close(sum(parts), one.loss(step)[0])
        whole = seen.having(num_tokens=seen.mask.sum())
        torch.testing.assert_close(one.loss(step)[0], one.loss(whole)[0])


def test_completions_that_no_term_keeps_are_not_asked_for() -> None:
    seen = batch()
    assert kdrl.kept_by_teacher(seen) is None
    assert torch.equal(kdrl_masking_response.kept_by_teacher(seen), ~seen.correct)
    assert kdrl_masking_response.having(adjust=(TeacherAdvantage(),)).kept_by_teacher(seen) is None
    assert kdrl_masking_response.kept_by_teacher(seen.having(correct=None)) is None


def test_the_advantage_form_keeps_completions_or_tokens() -> None:
    seen = batch()
    moved = seen.having(log_probs=seen.behaviour_log_probs)
    view = LossView(moved, torch.ones(8, 1), torch.zeros(8, 1))
    by_completion = TeacherAdvantage(keep=wrong_answers)(torch.zeros(8, 1), view)
    by_token = TeacherAdvantage(keep=lambda one: ~one.correct[:, None] & one.mask)(torch.zeros(8, 1), view)
    assert torch.equal(by_completion, by_token)
    assert by_token.any()


def test_the_told_divergence_is_of_what_is_kept() -> None:
    seen = batch()
    moved = (seen.behaviour_log_probs + 0.1).requires_grad_()
    _, metrics = kdrl_masking_response.loss(seen.having(log_probs=moved, advantage=torch.zeros(8)))
    gap = (seen.teacher_log_probs - moved.detach())[seen.mask & ~seen.correct[:, None]]
    torch.testing.assert_close(metrics["kl/teacher"], (gap.square() / 2).mean())


def test_what_is_impossible_is_told() -> None:
    seen = batch()
    given = (seen.behaviour_log_probs, seen.teacher_log_probs, seen.mask)
    with pytest.raises(ValueError, match="mask_norm is all"):
        kd_rkl_loss(*given, mask_norm="some")
    for wrong in (
        lambda: kd_rkl_loss(*given, credit="later"),
        lambda: teacher_credit(*given, credit="immediat"),
        lambda: TeacherAdvantage(credit="returns"),
    ):
        with pytest.raises(ValueError, match="credit is immediate"):
            wrong()
    with pytest.raises(ValueError, match="which is k2's"):
        kd_rkl_loss(*given, credit="return_to_go", estimator="k3")
