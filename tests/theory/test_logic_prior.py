"""The Logic Prior: exact advantages against enumeration, estimates from judged chains, and the two-armed policy."""

import itertools
import math

import pytest
import torch

from dynascope.theory.logic_prior import (
    advantage_gap,
    estimate_logic_prior,
    grpo_advantage_theory,
    simulate_policy,
)


def test_large_groups() -> None:
    theory = grpo_advantage_theory(0.2, 0.9, 0.3)
    assert float(theory.mean) == pytest.approx(0.42)
    assert float(theory.std) == pytest.approx(0.493559, abs=1e-6)
    assert float(theory.given_right) == pytest.approx(0.972529, abs=1e-6)
    assert float(theory.given_wrong) == pytest.approx(-0.243132, abs=1e-6)
    theory = grpo_advantage_theory(0.3, 0.4, 0.7)
    assert float(theory.given_right) == pytest.approx(-0.430548, abs=1e-6)
    assert float(theory.given_wrong) == pytest.approx(0.184521, abs=1e-6)
    ideal = grpo_advantage_theory(0.2, 1.0, 0.0)
    assert float(ideal.given_right) == pytest.approx(2.0)
    assert float(ideal.given_wrong) == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("size", "std", "right"),
    [
        (2, "population", 0.48),
        (4, "population", 0.777118),
        (8, "population", 0.898706),
        (16, "population", 0.939486),
        (64, "population", 0.964631),
        (8, "sample", 0.840663),
    ],
)
def test_small_groups(size: int, std: str, right: float) -> None:
    theory = grpo_advantage_theory(0.2, 0.9, 0.3, size, std=std)  # type: ignore[arg-type]
    assert float(theory.given_right) == pytest.approx(right, abs=1e-6)
    assert float(theory.given_wrong) == pytest.approx(-right / 4, abs=1e-6)


@pytest.mark.parametrize("std", ["population", "sample", "none"])
@pytest.mark.parametrize("baseline", ["mean", "loo"])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_group_listed(std: str, baseline: str, size: int) -> None:
    p_c, alpha, beta = 0.35, 0.8, 0.15
    chance = {(1, 1): p_c * alpha, (1, 0): p_c * (1 - alpha), (0, 1): (1 - p_c) * beta, (0, 0): (1 - p_c) * (1 - beta)}
    expected = {0: 0.0, 1: 0.0}
    for group in itertools.product(chance, repeat=size):
        rewards = torch.tensor([float(answer) for _, answer in group], dtype=torch.float64)
        spread = float(rewards.std(correction=int(std == "sample"))) if std != "none" else 1.0
        others = (rewards.sum() - rewards[0]) / (size - 1) if baseline == "loo" else rewards.mean()
        advantage = float(rewards[0] - others) / spread if spread > 0 else 0.0
        chain = group[0][0]
        expected[chain] += math.prod(chance[one] for one in group) * advantage / (p_c if chain else 1 - p_c)
    theory = grpo_advantage_theory(p_c, alpha, beta, size, std=std, baseline=baseline)  # type: ignore[arg-type]
    assert float(theory.given_right) == pytest.approx(expected[1], abs=1e-12)
    assert float(theory.given_wrong) == pytest.approx(expected[0], abs=1e-12)


def test_without_division_the_gap_is_simple() -> None:
    mean = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(advantage_gap(mean, 8, std="none"), torch.full_like(mean, 7 / 8))
    torch.testing.assert_close(advantage_gap(mean, 8, std="none", baseline="loo"), torch.ones_like(mean))


@pytest.mark.parametrize("size", [2, 8, 64, None])
def test_signs_and_zero_sum(size: int | None) -> None:
    p_c, alpha, beta = torch.rand(3, 200, dtype=torch.float64)
    theory = grpo_advantage_theory(p_c, alpha, beta, size)
    assert torch.equal(theory.given_right > 0, alpha > beta)
    assert torch.equal(theory.given_wrong < 0, alpha > beta)
    assert float((p_c * theory.given_right + (1 - p_c) * theory.given_wrong).abs().max()) < 1e-14
    split = (alpha - beta).square() * p_c * (1 - p_c) + p_c * alpha * (1 - alpha) + (1 - p_c) * beta * (1 - beta)
    torch.testing.assert_close(theory.std.square(), split)
    same = grpo_advantage_theory(p_c, alpha, alpha, size)
    assert float(same.given_right.abs().max()) == float(same.given_wrong.abs().max()) == 0.0


def test_convergence_and_unlearnable_groups() -> None:
    near = grpo_advantage_theory(torch.tensor([0.9, 0.99, 0.999]), 1.0, 0.0).given_right
    torch.testing.assert_close(near, torch.tensor([1 / 3, 99**-0.5, 999**-0.5]).double(), rtol=1e-5, atol=0)
    solved = grpo_advantage_theory(0.7, 1.0, 1.0)
    assert float(solved.given_right) == float(solved.given_wrong) == float(solved.kappa) == 0.0


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="alpha is a chance"):
        grpo_advantage_theory(0.2, 1.2, 0.3)
    with pytest.raises(ValueError, match="at least 2"):
        grpo_advantage_theory(0.2, 0.9, 0.3, 1)
    with pytest.raises(ValueError, match="mean is a chance"):
        advantage_gap(math.nan, 4)
    with pytest.raises(ValueError, match="cannot learn"):
        simulate_policy(0.0, 0.9, 0.3)


def test_policy_rises_drifts_or_falls_with_the_sign_of_the_prior() -> None:
    generator = torch.Generator().manual_seed(0)
    final = [
        simulate_policy(0.2, alpha, beta, runs=5, generator=generator)[:, -1]
        for alpha, beta in ((0.9, 0.3), (0.6, 0.6), (0.4, 0.7))
    ]
    assert bool((final[0] > 0.95).all())
    assert bool(((final[1] - 0.2).abs() <= 0.15).all())
    assert bool((final[2] < 0.1).all())


def test_one_step_of_the_policy_is_what_the_theory_expects() -> None:
    generator = torch.Generator().manual_seed(0)
    path = simulate_policy(0.2, 0.9, 0.3, group_size=4, steps=1, runs=20_000, groups=4, generator=generator)
    moved = path[:, 1].logit() - path[:, 0].logit()
    theory = grpo_advantage_theory(0.2, 0.9, 0.3, 4)
    # The score of right reasoning is 1 − p_c and of wrong −p_c.
    expected = 0.3 * float(0.2 * 0.8 * theory.given_right - 0.8 * 0.2 * theory.given_wrong)
    assert float(moved.mean()) == pytest.approx(expected, abs=4 * float(moved.std()) / 20_000**0.5)


def drawn(
    p_c: torch.Tensor, alpha: float, beta: torch.Tensor | float, answers: int
) -> tuple[torch.Tensor, torch.Tensor]:
    chain = torch.rand(len(p_c), answers) < p_c[:, None]
    wrong = torch.as_tensor(beta).expand(len(p_c))[:, None]
    return chain, torch.rand(len(p_c), answers) < torch.where(chain, alpha, wrong)


def test_worked_counts_and_wilson() -> None:
    chain = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]]).bool()
    answer = torch.tensor([[1, 1, 0, 1, 0, 0, 0, 0]]).bool()
    found = estimate_logic_prior(chain, answer)
    assert [float(one.value) for one in (found.p_c, found.alpha, found.beta)] == pytest.approx([3 / 8, 2 / 3, 1 / 5])
    # Wilson's interval of 2 out of 3 at 95 %.
    assert float(found.alpha.low) == pytest.approx(0.2077, abs=1e-4)
    assert float(found.alpha.high) == pytest.approx(0.9385, abs=1e-4)
    # Fisher: P(X >= 2) with 8 answers, 3 right chains and 3 right answers: (C(3,2)·5 + 1) / C(8,3).
    assert float(found.prompt_p_value) == pytest.approx(16 / 56)
    assert math.isnan(float(found.difference.low))


def test_intervals_cover_and_the_test_tells() -> None:
    truth = {"p_c": 0.3, "alpha": 0.8, "beta": 0.4, "difference": 0.4}
    covered = dict.fromkeys(truth, 0)
    for _ in range(60):
        found = estimate_logic_prior(*drawn(torch.full((50,), 0.3), 0.8, 0.4, 16), resamples=200)
        for name, value in truth.items():
            estimate = getattr(found, name)
            covered[name] += float(estimate.low) < value < float(estimate.high)
        assert found.p_value < 1e-6
    # 95 % of 60 is 57; fewer than 51 would come about once in 2000 sets.
    assert min(covered.values()) >= 51, covered
    assert estimate_logic_prior(*drawn(torch.full((100,), 0.3), 0.4, 0.6, 32)).p_value > 0.999


def test_prompts_of_different_difficulty_do_not_pass_for_a_prior() -> None:
    # In each prompt answers are right by the same chance after right and wrong chains; easy prompts have more of both.
    easy = torch.arange(200) < 100
    p_c, chance = torch.where(easy, 0.8, 0.1), torch.where(easy, 0.9, 0.2)
    chain = torch.rand(200, 32) < p_c[:, None]
    answer = torch.rand(200, 32) < chance[:, None]
    found = estimate_logic_prior(chain, answer)
    assert float(found.difference.value) > 0.3
    assert found.p_value > 0.01


def test_a_sample_of_the_wrong_answers_is_enough() -> None:
    chain, answer = drawn(torch.full((400,), 0.5), 0.9, 0.5, 32)
    judged = answer | (torch.rand(answer.shape) < 0.3)
    found = estimate_logic_prior(chain, answer, judged)
    whole = estimate_logic_prior(chain, answer)
    for name in ("p_c", "alpha", "beta"):
        assert float(getattr(found, name).value) == pytest.approx(float(getattr(whole, name).value), abs=0.02)
    unweighted = float((chain & judged).sum() / judged.sum())
    assert abs(unweighted - 0.5) > 0.05
    with pytest.raises(ValueError, match="wrong answer"):
        estimate_logic_prior(chain, answer, answer)


def test_a_prompt_without_right_chains_has_no_alpha() -> None:
    chain = torch.tensor([[0, 0, 0], [1, 0, 1]]).bool()
    answer = torch.tensor([[1, 0, 0], [1, 0, 0]]).bool()
    found = estimate_logic_prior(chain, answer)
    assert math.isnan(float(found.prompt_alpha.value[0]))
    assert float(found.prompt_alpha.value[1]) == 0.5
    assert float(found.prompt_p_value[0]) == 1.0
