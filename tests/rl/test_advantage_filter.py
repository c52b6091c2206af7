"""StableReinforce's advantage filter: the card's numbers, the closed form, shards, and parity with its parent."""

import math

import pytest
import torch

from dynascope.rl import (
    AdvantageFilter,
    PolicyBatch,
    grpo,
    gspo,
    normalize_advantages,
    preset,
    reinforce_pp,
    stable_reinforce,
)
from dynascope.rl.advantage_filter import (
    across_processes,
    advantage_health,
    combined,
    failure_advantage,
    filter_advantages,
    token_moments,
)
from dynascope.rl.advantages import WhitenedReturns, returns_to_go, token_rewards


def single_tokens(*counts: tuple[float, int]) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.tensor([float(value) for value, times in counts for _ in range(times)])[:, None]
    return values, torch.ones_like(values).bool()


def batch_of(mask: torch.Tensor, **more: torch.Tensor) -> PolicyBatch:
    num = len(mask)
    return PolicyBatch(mask=mask, rewards=torch.zeros(num), group_ids=torch.arange(num) // 2, **more)


def test_31_ones_and_a_zero() -> None:
    z = normalize_advantages(*single_tokens((1, 31), (0, 1)))[:, 0]
    torch.testing.assert_close(z[0].item(), 0.179605, atol=1e-6, rtol=0)
    torch.testing.assert_close(z[-1].item(), -5.567764, atol=1e-5, rtol=0)
    filtered, is_kept = filter_advantages(z)
    assert filtered[-1] == 0
    assert is_kept.tolist() == [True] * 31 + [False]


@pytest.mark.parametrize(("right", "wrong"), [(27, 3), (9, 1)])
def test_three_sigma_exactly_is_kept(right: int, wrong: int) -> None:
    z = normalize_advantages(*single_tokens((1, right), (0, wrong)))
    assert z[-1].item() == pytest.approx(-3, abs=1e-5)
    assert bool(filter_advantages(z)[1].all())
    assert not bool(filter_advantages(z, sigma=2.999)[1].all())


@pytest.mark.parametrize(("q", "expected"), [(0.5, -1), (0.9, -3), (0.95, -4.3589), (0.99, -9.9499)])
def test_closed_form_of_a_failure(q: float, expected: float) -> None:
    assert failure_advantage(q) == pytest.approx(expected, abs=1e-4)
    z = normalize_advantages(*single_tokens((1, round(100 * q)), (0, round(100 * (1 - q)))))
    assert z[-1].item() == pytest.approx(expected, abs=1e-3)


def test_whitening_has_mean_0_and_variance_1_on_one_process_and_on_two_shards() -> None:
    values, mask = torch.randn(8, 5) + 300, torch.rand(8, 5) < 0.7
    whole = normalize_advantages(values, mask)
    known, known_raw = whole[mask].double(), values[mask].double()
    assert abs(float(known.mean())) < 1e-6
    assert float(known.var(correction=0)) == pytest.approx(1, abs=1e-5)
    assert bool((whole[~mask] == 0).all())
    shards = [(values[:3], mask[:3]), (values[3:], mask[3:])]
    moments = combined(token_moments(*one) for one in shards)
    torch.testing.assert_close(torch.cat([normalize_advantages(*one, moments) for one in shards]), whole)
    torch.testing.assert_close(whole[mask].double(), (known_raw - known_raw.mean()) / known_raw.std(correction=0))


def test_equal_values_give_0_and_what_is_not_finite_is_left_out() -> None:
    assert normalize_advantages(*single_tokens((2.5, 6))).count_nonzero() == 0
    assert normalize_advantages(*single_tokens((0.1, 7))).count_nonzero() == 0
    filtered, is_kept = filter_advantages(torch.tensor([math.nan, math.inf, -math.inf, 1.0]))
    assert filtered.tolist() == [0, 0, 0, 1]
    assert is_kept.tolist() == [False, False, False, True]
    assert filter_advantages(torch.tensor([-2.5, 3.5]), center=0.9)[1].tolist() == [False, True]
    with pytest.raises(ValueError, match="must be positive"):
        filter_advantages(torch.zeros(1), sigma=0.0)


def test_dropping_is_leaving_tokens_out_of_the_mask() -> None:
    mask = torch.tensor([[True, True, True], [True, True, False]])
    advantage = torch.tensor([[0.5, -6.0, 1.0], [-0.2, -0.4, 0.0]])
    ratio = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)) * 0.1
    batch = batch_of(mask, log_probs=ratio, behaviour_log_probs=torch.zeros(2, 3))
    dropped = reinforce_pp.loss(batch.having(advantage=AdvantageFilter(mode="drop")(advantage, batch)))[0]
    left = mask & (advantage > -3)
    cut = batch_of(left, log_probs=ratio, behaviour_log_probs=torch.zeros(2, 3))
    torch.testing.assert_close(dropped, reinforce_pp.loss(cut.having(advantage=advantage))[0])
    zeroed = AdvantageFilter()(advantage, batch)
    assert zeroed.tolist()[0] == pytest.approx([0.5, 0, 1.0])


def test_what_cannot_be_left_out_exactly_is_told() -> None:
    for aggregation in ("token-mean", "max-length", "seq-mean-token-sum"):
        with pytest.raises(ValueError, match=f"exact with aggregation seq-mean-token-mean alone, not {aggregation}"):
            reinforce_pp.having(post=(AdvantageFilter(mode="drop"),), aggregation=aggregation)
        assert reinforce_pp.having(post=(AdvantageFilter(),), aggregation=aggregation).post
    mask = torch.ones(4, 2).bool()
    with pytest.raises(ValueError, match="one advantage a completion"):
        AdvantageFilter(mode="drop")(torch.zeros(4), batch_of(mask))


def test_the_authors_center_is_the_mean_of_the_raw_returns() -> None:
    """31 returns of 1 and one of 0: z of the others is 0.18, the failure's −5.57; about 31/32 all keep but that."""
    mask = torch.ones(32, 1).bool()
    rewards = torch.cat([torch.zeros(1), torch.ones(31)]) - 4.0
    batch = PolicyBatch(mask=mask, rewards=rewards, group_ids=torch.arange(32))
    estimator = WhitenedReturns(0.0)
    assert float(estimator.raw_mean(batch)) == pytest.approx(31 / 32 - 4)
    z = estimator(batch)
    found = AdvantageFilter(center=estimator.raw_mean)(z, batch)
    kept = (z - (31 / 32 - 4)).abs() <= 3
    torch.testing.assert_close(found, z * kept)
    assert kept.tolist() == [[True]] + [[False]] * 31  # about −3.03 the outlier alone is near
    assert AdvantageFilter(center=WhitenedReturns().raw_mean).needs == {"behaviour_log_probs", "ref_log_probs"}


def test_return_to_go_with_kl_in_the_reward() -> None:
    mask = torch.ones(1, 3).bool()
    rewards = token_rewards(torch.tensor([1.0]), mask, 0.1 * torch.tensor([[0.1, 0.2, 0.3]]))
    torch.testing.assert_close(returns_to_go(rewards, mask), torch.tensor([[0.94, 0.95, 0.97]]))


@pytest.mark.parametrize("parent", [reinforce_pp.having(advantage=WhitenedReturns(0.0)), grpo, gspo])
def test_with_its_parts_switched_off_or_idle_it_is_its_parent_bit_for_bit(parent) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(8, 6, generator=generator) < 0.8
    mask[:, 0] = True
    batch = PolicyBatch(
        mask=mask,
        rewards=(torch.rand(8, generator=generator) < 0.5).float(),
        group_ids=torch.arange(8) // 4,
        behaviour_log_probs=-torch.rand(8, 6, generator=generator),
        log_probs=(-torch.rand(8, 6, generator=generator)).requires_grad_(),
    )
    stable = parent.having(pre_clip=(1e-3, 1e3), post=(AdvantageFilter(),))
    found = []
    for objective in (parent, stable, stable.having(pre_clip=None, post=())):
        loss, _ = objective.loss(batch.having(advantage=objective.advantages(batch)))
        assert batch.log_probs is not None
        found.append((loss, torch.autograd.grad(loss, batch.log_probs)[0]))
    for loss, gradient in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(gradient, found[0][1])


def test_the_preset_and_what_it_tells() -> None:
    assert preset("stable_reinforce").having(pre_clip=None, post=()) == reinforce_pp
    objective = stable_reinforce.having(advantage=WhitenedReturns(0.0))
    mask = torch.ones(32, 2).bool()
    rewards = torch.ones(32)
    rewards[0] = 0
    batch = PolicyBatch(mask=mask, rewards=rewards, group_ids=torch.arange(32))
    advantage = objective.advantages(batch)
    told = objective.rollout_metrics
    assert float(told["advantage/max_abs"]) == pytest.approx(5.567764, abs=1e-4)
    assert float(told["advantage/filtered"]) == pytest.approx(1 / 32)
    assert float(told["advantage/sign_balance"]) == 0
    assert bool((advantage[1:] > 0).all())
    drift = torch.zeros(32, 2)
    drift[0, 0] = 120
    loss, metrics = objective.loss(
        batch.having(advantage=advantage, log_probs=drift, behaviour_log_probs=torch.zeros(32, 2))
    )
    assert float(metrics["ratio/max_log"]) == 120
    assert float(metrics["ratio/exploded"]) == pytest.approx(1 / 64)
    assert float(metrics["pre_clipped"]) == pytest.approx(1 / 64)
    assert bool(loss.isfinite())


def test_health_counts_completions_by_their_tokens() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    told = advantage_health(torch.tensor([1.0, -4.0]), batch_of(mask))
    assert float(told["advantage/filtered"]) == pytest.approx(1 / 3)
    assert float(told["advantage/max_abs"]) == 4


def test_two_processes_normalize_as_one(of_two_processes: list[dict[str, torch.Tensor]]) -> None:
    values = torch.arange(10.0)[None]
    alone = normalize_advantages(values, torch.ones(1, 10).bool())
    torch.testing.assert_close(torch.cat([one["normal"] for one in of_two_processes], 1), alone)
    own = token_moments(values, torch.ones(1, 10).bool())
    assert across_processes(own) is own
