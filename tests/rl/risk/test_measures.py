"""Risk measures and the advantages that follow from them."""

import math

import pytest
import torch
from torch import Tensor

from dynascope.rl.risk.measures import (
    cvar_advantage,
    mvar_advantage,
    quantile_integral,
    released_mvar_advantage,
    risk_report,
    rvar_advantage,
    seeking_advantage,
    weight_between,
)

SCORES = torch.arange(6.0)


def test_advantages_by_hand() -> None:
    assert weight_between(SCORES, 1, 3).tolist() == [-2, -2, -1, 0, 0, 0]
    assert mvar_advantage(SCORES, 1, 3, 0.5).tolist() == [-3.5, -2, -1, 0, 0, 0]
    assert rvar_advantage(SCORES, 1, 3, alpha=0.25, beta=0.75).tolist() == [-4, -4, -2, 0, 0, 0]
    assert cvar_advantage(SCORES, 2, alpha=0.5).tolist() == [-4, -2, 0, 0, 0, 0]


def test_special_cases_of_the_mixed_measure() -> None:
    assert torch.equal(mvar_advantage(SCORES, 1, 3, -1.0), weight_between(SCORES, 1, 3))
    # From the lowest score on there is no tail: beta times the gradient of CVaR at level beta.
    torch.testing.assert_close(mvar_advantage(SCORES, 0.0, 3.0), 0.8 * cvar_advantage(SCORES, 3.0, alpha=0.8))
    # Around all scores it is the mean objective with another baseline.
    whole = mvar_advantage(SCORES, -1.0, 7.0)
    assert torch.equal(whole, SCORES - 7)
    assert torch.equal(whole - whole.mean(), SCORES - SCORES.mean())


def test_the_mixed_advantage_is_never_positive_concave_and_rises_to_zero_at_the_upper_quantile() -> None:
    scores = torch.linspace(-3, 8, 221, dtype=torch.float64)
    advantage = mvar_advantage(scores, 1.3, 4.2)
    slope = advantage.diff()
    assert advantage.max() <= 0
    assert slope.min() >= -1e-12
    assert slope.diff().max() <= 1e-12
    assert torch.equal(advantage.abs() < 1e-12, scores >= 4.2)


def test_the_released_form_by_hand() -> None:
    expected = [-5.66664, -2.66666, -1.06667, -0.4, 0, 0]
    torch.testing.assert_close(released_mvar_advantage(SCORES, 1.4, 3.6), torch.tensor(expected), atol=1e-5, rtol=0)
    without = released_mvar_advantage(SCORES, 1.4, 3.6, natural_baseline=False)
    expected = [-4.19998, -1.19999, 0.4, 1.06667, 1.46666, 1.46666]
    torch.testing.assert_close(without, torch.tensor(expected), atol=1e-5, rtol=0)


def test_seeking_weighs_the_upper_tail() -> None:
    found = seeking_advantage(SCORES, 1.0, 3.0)
    # (1.5 (z - 3)+ / 0.2 + g / 0.6) / 2.5
    expected = [-2 / 1.5, -2 / 1.5, -1 / 1.5, 0.0, 3.0, 6.0]
    torch.testing.assert_close(found, torch.tensor(expected))


def normal_quantiles() -> tuple[float, float]:
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    low, high = (normal.icdf(torch.tensor(level, dtype=torch.float64)).item() for level in (0.2, 0.8))
    return low, high


def expectation(values: Tensor, at: Tensor) -> float:
    return float(torch.trapezoid(values * torch.exp(-at.square() / 2) / math.sqrt(2 * math.pi), at))


def test_gradients_on_a_normal_reward_are_known() -> None:
    """All quantiles move with the mean, so a measure's gradient is the mass that it weighs, by numerical integration."""
    low, high = normal_quantiles()
    at = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    assert expectation(weight_between(at, low, high) * at, at) / 0.6 == pytest.approx(1, abs=1e-6)
    assert expectation(mvar_advantage(at, low, high) * at, at) == pytest.approx(1.5 * 0.2 + 0.6, abs=1e-6)
    assert expectation(cvar_advantage(at, low) * at, at) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("omega", [0.0, 0.5, 2.0])
def test_the_policy_gradient_is_the_derivative_of_the_measure(omega: float) -> None:
    """Theorem 1 on a softmax over distinct scores, against autograd through the integral of quantiles."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(7, generator=generator, dtype=torch.float64)
    probs = logits.softmax(-1)
    measure = (1 + omega) * quantile_integral(scores, 0, 0.2, weights=probs)
    measure = measure + quantile_integral(scores, 0.2, 0.8, weights=probs)
    (expected,) = torch.autograd.grad(measure, logits)

    order = scores.argsort()
    reached = probs.detach()[order].cumsum(0)
    low, high = (scores[order][(reached < level).sum()] for level in (0.2, 0.8))
    advantage = mvar_advantage(scores, low, high, omega)
    probs = probs.detach()
    torch.testing.assert_close(probs * (advantage - (probs * advantage).sum()), expected)


def test_measures_of_scores() -> None:
    scores = torch.tensor([4.0, 0, 1, 2, 3])
    told = risk_report(scores, alpha=0.2, beta=0.8)
    assert told["mean"].item() == pytest.approx(2)
    assert told["cvar"].item() == pytest.approx(0)
    assert told["rvar"].item() == pytest.approx(2)
    assert told["mvar"].item() == pytest.approx(0.6 * 2)
    assert quantile_integral(scores, 0, 1).item() == pytest.approx(2)
    assert quantile_integral(scores, 0.1, 0.3).item() == pytest.approx(0.1)
    with pytest.raises(ValueError, match="low < high"):
        quantile_integral(scores, 0.5, 0.5)


def test_levels_out_of_order_are_told() -> None:
    with pytest.raises(ValueError, match="below beta"):
        rvar_advantage(SCORES, 1, 3, alpha=0.8, beta=0.8)
    with pytest.raises(ValueError, match="above 0"):
        cvar_advantage(SCORES, 1, alpha=0.0)
    with pytest.raises(ValueError, match="below 1"):
        seeking_advantage(SCORES, 1, 3, beta=1.0)
    with pytest.raises(ValueError, match="no scores"):
        risk_report(torch.zeros(0))
