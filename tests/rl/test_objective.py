"""The row of slots: what each may see, when it is called, and that a part switched off leaves no trace."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from dynascope.rl.advantages import GroupZScore, WhitenedReturns
from dynascope.rl.batch import PolicyBatch
from dynascope.rl.kl import KLTerm
from dynascope.rl.objective import LossView, PolicyObjective
from dynascope.rl.presets import PRESETS, dapo, dr_grpo, grpo, gspo, preset, reinforce_pp


def batch(num: int = 8, width: int = 5, **changes: Any) -> PolicyBatch:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    lengths = torch.randint(1, width + 1, (num,), generator=generator)
    behaviour = -normal(num, width).abs()
    return PolicyBatch(
        **{
            "mask": torch.arange(width) < lengths[:, None],
            "rewards": normal(num),
            "group_ids": torch.arange(num) // 4,
            "behaviour_log_probs": behaviour,
            "log_probs": (behaviour + 0.3 * normal(num, width)).requires_grad_(),
            "ref_log_probs": behaviour + 0.3 * normal(num, width),
            "teacher_log_probs": behaviour + 0.3 * normal(num, width),
            "values": normal(num, width),
            "entropy": normal(num, width).abs(),
            "correct": lengths > 2,
            "hidden": normal(num, width, 4),
            "unembedding": normal(7, 4),
            "tokens": torch.randint(7, (num, width), generator=generator),
            "is_solved": torch.arange(num) < 4,
            "is_demonstration": torch.arange(num) % 4 == 3,
            "max_length": width,
            **changes,
        }
    )


def told(objective: PolicyObjective, seen: PolicyBatch) -> tuple[Tensor, Tensor]:
    """The loss and its gradient at the log-probabilities."""
    log_probs = seen.log_probs.detach().requires_grad_()
    seen = seen.having(log_probs=log_probs, advantage=objective.advantages(seen.having(log_probs=log_probs.detach())))
    loss, _ = objective.loss(seen)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    return loss.detach(), gradient


@pytest.mark.filterwarnings("ignore:only .* bundles lie below")
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_gives_a_finite_loss_and_moves_only_tokens_that_count(name: str) -> None:
    seen = batch()
    loss, gradient = told(preset(name), seen)
    assert loss.isfinite()
    assert gradient[~seen.mask].abs().max() == 0
    assert gradient.abs().max() > 0


ALONE = {"reinforce_pp", "ppo", "stable_reinforce", "riskpo", "riskpo_seeking"}
"""Presets that compare no completion with another of its prompt."""


def nan_at(field: str, place: int) -> PolicyBatch:
    values = getattr(batch(), field).detach().clone()
    values.view(-1)[place] = torch.nan
    return batch(**{field: values})


@pytest.mark.filterwarnings("ignore:only .* bundles lie below")
@pytest.mark.parametrize("name", PRESETS)
def test_odd_batches_give_every_preset_a_finite_loss(name: str) -> None:
    """Uniform rewards, completions and groups without a token, a group of size 1, and whatever stands at padding."""
    mask = batch().mask.clone()
    mask[0] = False
    no_group = mask.clone()
    no_group[:4] = False
    padding = {
        field: getattr(batch(), field).detach().masked_fill(~batch().mask, torch.nan)
        for field in ("behaviour_log_probs", "log_probs", "ref_log_probs", "teacher_log_probs", "entropy", "values")
    }
    odd = {
        "all wrong": batch(rewards=torch.zeros(8), correct=torch.zeros(8).bool(), is_solved=torch.zeros(8).bool()),
        "all right": batch(rewards=torch.ones(8), correct=torch.ones(8).bool(), is_solved=torch.ones(8).bool()),
        "an empty completion": batch(mask=mask),
        "an empty group": batch(mask=no_group),
        "nan at padding": batch(**padding),
    }
    if name != "pass_at_k_mixed":  # which wants four answers of each
        odd["a group of size 1"] = batch(group_ids=torch.tensor([0, 1, 1, 1, 1, 2, 2, 2]))
    for kind, seen in odd.items():
        loss, gradient = told(preset(name), seen)
        assert loss.isfinite(), kind
        assert gradient.isfinite().all(), kind
        assert not gradient[~seen.mask].any(), kind


@pytest.mark.parametrize("name", PRESETS)
def test_bad_batches_are_told_to_every_preset_in_one_line(name: str) -> None:
    bad = {
        "rewards of completions [2] are not finite": nan_at("rewards", 2),
        "no completion has a token": batch(mask=torch.zeros(8, 5).bool()),
    }
    for field in ("behaviour_log_probs", "log_probs", "ref_log_probs", "teacher_log_probs", "entropy", "hidden"):
        bad[f"{field} of completions [0] are not finite"] = nan_at(field, 0)
    if name not in ALONE:
        bad["every group has size 1"] = batch(group_ids=torch.arange(8))
    for message, seen in bad.items():
        with pytest.raises(ValueError, match=re.escape(message)) as raised:
            preset(name).advantages(seen)
        assert "\n" not in str(raised.value)


@pytest.mark.filterwarnings("ignore:only .* bundles lie below")
@pytest.mark.parametrize("name", sorted(ALONE))
def test_what_compares_no_completions_takes_one_a_prompt(name: str) -> None:
    loss, gradient = told(preset(name), batch(group_ids=torch.arange(8)))
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    "off",
    [
        {"kl": (KLTerm("teacher", "k2", 0.0),)},
        {"entropy_bonus": 0.0},
        {"pre_clip": (1e-3, 1e3)},
        {"dual_clip": 1e6},
        {"policy_weight": 1.0},
        {"clip": lambda view: (torch.full_like(view.ratio, 0.2), torch.full_like(view.ratio, 0.28))},
        {"adjust": (lambda advantage, view: advantage * torch.ones_like(view.ratio),)},
        {"post": (lambda advantage, seen: advantage,)},
    ],
)
def test_a_part_switched_off_changes_no_bit(off: dict[str, Any]) -> None:
    seen = batch()
    for found, expected in zip(told(dapo.having(**off), seen), told(dapo, seen), strict=True):
        assert torch.equal(found, expected)


def test_presets_are_their_differences() -> None:
    assert grpo.having(clip=(0.2, 0.28), aggregation="token-mean") == dapo
    assert gspo.having(ratio="token", clip=(0.2, 0.2)) == grpo
    assert dr_grpo.having(advantage=GroupZScore(), aggregation="seq-mean-token-mean") == grpo
    assert reinforce_pp.having(advantage=GroupZScore()) == grpo
    with pytest.raises(ValueError, match="did you mean 'dapo'"):
        preset("dappo")
    with pytest.raises(ValueError, match="there is no slot ratios"):
        grpo.having(ratios="token")


def test_on_policy_the_gradient_is_the_plain_policy_gradient() -> None:
    seen = batch()
    seen = seen.having(behaviour_log_probs=None)
    advantage, lengths = grpo.advantages(seen), seen.mask.sum(1)
    _, gradient = told(grpo, seen)
    expected = -(advantage / lengths)[:, None] * seen.mask / len(seen)
    torch.testing.assert_close(gradient, expected)


def test_at_equal_policies_the_sequence_ratio_gives_the_same_gradient_as_the_tokens() -> None:
    seen = batch().having(behaviour_log_probs=None)
    torch.testing.assert_close(told(gspo, seen)[1], told(grpo, seen)[1])


def test_groups_without_spread_add_exactly_nothing() -> None:
    loss, gradient = told(grpo, batch(rewards=torch.full((8,), 1 / 3)))
    assert loss == 0
    assert gradient.abs().max() == 0


@dataclass(frozen=True)
class Signal:
    """A signal that two slots share, and that counts how often it is worked out."""

    calls: list[int]
    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})

    def __hash__(self) -> int:
        return id(self)

    def __call__(self, view: LossView) -> Tensor:
        self.calls.append(1)
        return view.batch.entropy / view.batch.entropy.amax()


@dataclass(frozen=True)
class WiderWhereUncertain:
    signal: Signal
    needs: ClassVar[frozenset[str]] = Signal.needs

    def __call__(self, view: LossView) -> tuple[Tensor, Tensor]:
        signal = view.once(self.signal)
        return 0.2 * (1 + signal), 0.28 * (1 + signal)


@dataclass(frozen=True)
class AmplifiedWhereMoved:
    signal: Signal
    needs: ClassVar[frozenset[str]] = Signal.needs

    def __call__(self, advantage: Tensor, view: LossView) -> Tensor:
        has_moved = (view.ratio < 1 - view.low / 2) | (view.ratio > 1 + view.high / 2)
        return advantage * torch.where(has_moved, 1 + view.once(self.signal), 1.0)


def test_entropy_aware_bounds_and_advantages_share_one_signal() -> None:
    signal = Signal([])
    objective = dapo.having(clip=WiderWhereUncertain(signal), adjust=(AmplifiedWhereMoved(signal),))
    assert objective.loss_needs == {"entropy"}
    seen = batch(advantage=torch.ones(8))
    loss, _ = objective.loss(seen)
    assert len(signal.calls) == 1
    # The same by hand.
    ratio, h = (seen.log_probs - seen.behaviour_log_probs).exp(), seen.entropy / seen.entropy.amax()
    low, high = 0.2 * (1 + h), 0.28 * (1 + h)
    advantage = torch.where((ratio < 1 - low / 2) | (ratio > 1 + high / 2), 1 + h, torch.ones_like(h))
    by_token = -torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    torch.testing.assert_close(loss, by_token[seen.mask].mean())
    with pytest.raises(ValueError, match="needs entropy"):
        objective.loss(seen.having(entropy=None))


class RunningBaseline:
    """A stateful estimator across rollouts and groups, as a quantile tracker is one."""

    def __init__(self) -> None:
        self.mean = torch.zeros(())

    def __call__(self, seen: PolicyBatch) -> Tensor:
        advantage = seen.rewards - self.mean
        self.mean = 0.5 * self.mean + 0.5 * seen.rewards.mean()
        return advantage

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.mean = state["mean"]


def test_a_stateful_estimator_keeps_its_state_and_gives_it_to_checkpoints() -> None:
    objective = gspo.having(advantage=RunningBaseline())
    seen = batch()
    torch.testing.assert_close(objective.advantages(seen), seen.rewards)
    torch.testing.assert_close(objective.advantages(seen), seen.rewards - seen.rewards.mean() / 2)
    other = gspo.having(advantage=RunningBaseline())
    other.load_state_dict(objective.state_dict())
    assert torch.equal(other.advantages(seen), objective.advantages(seen))
    with pytest.raises(ValueError, match="has a state in none"):
        grpo.load_state_dict(objective.state_dict())


def test_distillation_is_an_advantage_of_the_log_ratio_to_the_teacher() -> None:
    """The gradient of a k2 term is that of adding coefficient · R to every token's advantage, at ratio 1."""
    seen = batch().having(behaviour_log_probs=None)

    def add_teacher(advantage: Tensor, view: LossView) -> Tensor:
        return advantage + 0.05 * (view.batch.teacher_log_probs - view.batch.log_probs.detach())

    joint, shaped = dapo.having(kl=(KLTerm("teacher", "k2", 0.05),)), dapo.having(adjust=(add_teacher,))
    torch.testing.assert_close(told(joint, seen)[1], told(shaped, seen)[1], atol=1e-6, rtol=0)


def test_only_distillation_is_left_where_no_answer_is_right() -> None:
    term = KLTerm("teacher", "k2", 0.05)
    seen = batch(rewards=torch.zeros(8))
    joint, alone = told(dapo.having(kl=(term,)), seen), told(dapo.having(kl=(term,), policy_weight=0.0), seen)
    assert torch.equal(joint[1], alone[1])
    assert joint[1].abs().max() > 0


def test_a_masked_term_is_weaker_or_renormalised() -> None:
    seen = batch(rewards=torch.zeros(8))
    masked = KLTerm("teacher", "k2", 1.0, keep=lambda one: ~one.correct, also_needs=frozenset({"correct"}))
    by_token = 0.5 * (seen.teacher_log_probs - seen.log_probs).square()
    kept = seen.mask & ~seen.correct[:, None]
    for norm, count in (("all", seen.mask.sum()), ("kept", kept.sum())):
        term = KLTerm("teacher", "k2", 1.0, keep=masked.keep, norm=norm, also_needs=masked.also_needs)
        objective = dapo.having(kl=(term,))
        found = objective.loss(seen.having(advantage=torch.zeros(8)))[0]
        torch.testing.assert_close(found, by_token[kept].sum() / count)
        assert objective.loss_needs == {"teacher_log_probs", "correct"}
    none = KLTerm("teacher", "k2", 1.0, keep=lambda one: torch.zeros(8), norm="kept")
    assert dapo.having(kl=(none,)).loss(seen.having(advantage=torch.zeros(8)))[0] == 0


def test_a_schedule_is_asked_for_the_batchs_step() -> None:
    objective = dapo.having(kl=(KLTerm("ref", "k3", coefficient=lambda step: 0.1 * step),))
    seen = batch(advantage=torch.zeros(8))
    losses = [objective.loss(seen.having(step=step))[0] for step in (0, 1, 2)]
    assert losses[0] == 0
    torch.testing.assert_close(losses[2], 2 * losses[1])


def test_metrics_by_hand_and_without_a_gradient() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    seen = PolicyBatch(
        mask=mask,
        rewards=torch.zeros(2),
        group_ids=torch.zeros(2, dtype=torch.long),
        behaviour_log_probs=torch.zeros(2, 2),
        log_probs=torch.tensor([[1.0, 0.0], [-1.0, 7.0]], requires_grad=True),
        advantage=torch.tensor([1.0, -1.0]),
        entropy=torch.tensor([[1.0, 2.0], [3.0, torch.nan]]),
    )
    _, metrics = grpo.having(pre_clip=(0.5, 2.5)).loss(seen)
    expected = {"clip/high": 1 / 3, "clip/low": 1 / 3, "entropy": 2.0, "pre_clipped": 2 / 3, "ratio/mean": 4 / 3}
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value), name
    assert not any(metric.requires_grad for metric in metrics.values())


def test_padding_and_the_order_of_rows_change_nothing() -> None:
    seen = batch()
    seen = seen.having(advantage=dapo.advantages(seen))
    order = torch.randperm(8)
    for objective in (grpo, dapo, gspo, dr_grpo):
        expected = objective.loss(seen)[0]
        torch.testing.assert_close(objective.loss(seen.select(order))[0], expected)
        pads = {
            name: torch.nn.functional.pad(getattr(seen, name), (0, 3))
            for name in ("mask", "behaviour_log_probs", "log_probs", "ref_log_probs", "teacher_log_probs", "entropy")
        }
        torch.testing.assert_close(
            objective.loss(seen.having(values=None, hidden=None, tokens=None, **pads))[0], expected
        )


def test_micro_batches_with_the_steps_counts_add_up() -> None:
    seen = batch()
    seen = seen.having(num_tokens=seen.mask.sum(), num_completions=8)
    for objective in (grpo, dapo, gspo, dr_grpo):
        whole = seen.having(advantage=objective.advantages(seen))
        parts = [objective.loss(whole.select(rows))[0] for rows in whole.split(3)]
        torch.testing.assert_close(sum(parts), objective.loss(whole)[0])


def test_reinforce_pp_needs_a_start_model_only_for_its_penalty() -> None:
    assert reinforce_pp.rollout_needs == {"behaviour_log_probs", "ref_log_probs"}
    with pytest.raises(ValueError, match="needs ref_log_probs"):
        reinforce_pp.advantages(batch(ref_log_probs=None))
    assert reinforce_pp.having(advantage=WhitenedReturns(0.0)).advantages(batch(ref_log_probs=None)).isfinite().all()
