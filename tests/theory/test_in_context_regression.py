"""Heads that regress in context: predictors, risks, the loss of the reduced model and its flow."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dynascope.data.in_context.linear_regression import LinearRegressionICL, Prompts, toeplitz_covariance
from dynascope.theory.in_context_regression import (
    approx_icl_loss,
    bayes_risk_asymptotic,
    best_step,
    debiased_gd_predict,
    debiased_gd_risk,
    gd_predict,
    gd_risk,
    head_limits,
    head_phases,
    icl_loss_gradients,
    optimal_mu,
    preconditioner,
    ridge_predict,
    simulate_head_flow,
    single_head_optimum,
    softmax_heads_predict,
)

SETTING = (5, 40, 0.1)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def prompts_of(count: int, length: int = 40, seed: int = 0) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    return LinearRegressionICL(5, length, 0.1).sample(count, generator, dtype=torch.float64)


def parts(prompts: Prompts) -> tuple[Tensor, Tensor, Tensor]:
    return prompts.x, prompts.y[..., 0], prompts.query_x


def test_two_opposite_heads_are_debiased_gradient_descent_in_the_limit() -> None:
    """At fixed ω μ the difference falls with ω²: a hundredth for a tenth of ω."""
    x, y, query = parts(prompts_of(50))
    limit = debiased_gd_predict(x, y, query, 2 * 0.45)
    errors = []
    for omega in (0.1, 0.01, 0.001):
        predicted = softmax_heads_predict(x, y, query, tensor(omega, -omega), tensor(0.45 / omega, -0.45 / omega))
        errors.append(float((predicted - limit).abs().max()))
    assert errors[1] / errors[0] == pytest.approx(0.01, rel=0.1)
    assert errors[2] / errors[1] == pytest.approx(0.01, rel=0.01)


PREDICTORS: dict[str, Callable[..., Tensor]] = {
    "gd": lambda *told: gd_predict(*told[:3], 0.9, *told[3:]),
    "debiased": lambda *told: debiased_gd_predict(*told[:3], 0.9, *told[3:]),
    "ridge": lambda *told: ridge_predict(*told[:3], 0.1, *told[3:]),
    "least squares": lambda *told: ridge_predict(*told[:3], 0.0, *told[3:]),
    "heads": lambda *told: softmax_heads_predict(*told[:3], tensor(0.3, -40.0), tensor(2.0, -1.0), *told[3:]),
}


@pytest.mark.parametrize("name", PREDICTORS)
def test_answers_by_length_are_those_to_the_beginnings(name: str) -> None:
    """Also of heads so sharp that exp of their logits' differences underflows within a prompt."""
    x, y, query = parts(prompts_of(6, 30))
    lengths, predict = (1, 2, 7, 19, 30), PREDICTORS[name]
    expected = [predict(x[:, :length], y[:, :length] + 100, query) for length in lengths]
    torch.testing.assert_close(predict(x, y + 100, query, lengths), torch.stack(expected), rtol=1e-7, atol=1e-9)
    # Without batch axes, and up to fewer examples than there are.
    alone = predict(x[0], y[0] + 100, query[0], lengths[:3])
    torch.testing.assert_close(alone, torch.stack(expected)[:3, 0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("lengths", [(), (0, 3), (3, 3), (5, 31)])
@pytest.mark.parametrize("name", PREDICTORS)
def test_lengths_that_no_prompt_has_are_told(name: str, lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must rise from 1 or more to at most the prompt's 30"):
        PREDICTORS[name](*parts(prompts_of(2, 30)), lengths)


@pytest.mark.parametrize("length", [1, 2, 10, 40])
def test_risks_are_exact_at_every_length(length: int) -> None:
    prompts = prompts_of(60_000, length)
    for predict, risk in ((gd_predict, gd_risk), (debiased_gd_predict, debiased_gd_risk)):
        errors = (predict(*parts(prompts), 0.897) - prompts.target[:, 0]).square()
        assert abs(float(errors.mean()) - risk(0.897, 5, length, 0.1)) < 3 * float(errors.std()) / math.sqrt(60_000)


def test_risks_by_hand() -> None:
    """The figures that the closed forms were checked with against the authors' Monte Carlo."""
    by_length = {10: (0.6336, 0.6078), 40: (0.24136, 0.24321), 100: (0.16291, 0.16431)}
    for length, (plain, debiased) in by_length.items():
        assert gd_risk(0.897, 5, length, 0.1) == pytest.approx(plain, abs=5e-5)
        assert debiased_gd_risk(0.897, 5, length, 0.1) == pytest.approx(debiased, abs=5e-5)
    assert gd_risk(best_step(*SETTING, debiased=False), *SETTING) == pytest.approx(0.2398, abs=5e-5)


@pytest.mark.parametrize(("dim", "length", "noise"), [(5, 40, 0.1), (3, 2, 0.0), (1, 1, 2.0)])
def test_the_best_steps_are_the_vertices_of_their_risks(dim: int, length: int, noise: float) -> None:
    for risk, is_debiased in ((gd_risk, False), (debiased_gd_risk, True)):
        best = best_step(dim, length, noise, debiased=is_debiased)
        around = [risk(best + move, dim, length, noise) for move in (-1e-3, 0.0, 1e-3)]
        assert min(around) == around[1]
        assert around[0] == pytest.approx(around[2], abs=1e-12)


def test_the_best_debiased_step_and_its_risk_by_hand() -> None:
    assert best_step(*SETTING) == pytest.approx(0.8791208791, abs=1e-10)
    assert debiased_gd_risk(best_step(*SETTING), *SETTING) == pytest.approx(0.2428571, abs=1e-7)


def test_ridge_is_the_mean_of_the_label_given_the_prompt() -> None:
    """No linear rescaling of it does better, and it does better than gradient descent; the limit is near already."""
    prompts = prompts_of(40_000)
    predicted, target = ridge_predict(*parts(prompts), 0.1), prompts.target[:, 0]
    slope = float((predicted * target).mean() / predicted.square().mean())
    assert slope == pytest.approx(1, abs=0.01)
    risk = float((predicted - target).square().mean())
    assert risk == pytest.approx(0.1146, abs=0.002)
    assert bayes_risk_asymptotic(1 / 8, 0.1) == pytest.approx(risk, abs=0.003)


def test_the_limit_of_ridge_is_that_of_large_prompts() -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = LinearRegressionICL(60, 40, 0.2).sample(2000, generator, dtype=torch.float64)
    errors = (ridge_predict(*parts(prompts), 0.2) - prompts.target[:, 0]).square()
    assert abs(float(errors.mean()) - bayes_risk_asymptotic(1.5, 0.2)) < 4 * float(errors.std()) / math.sqrt(2000)


def test_ridge_without_noise_is_least_squares_and_of_least_norm() -> None:
    prompts = LinearRegressionICL(3, 7, 0.0).sample(5, torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(ridge_predict(*parts(prompts), 0.0), prompts.target[:, 0])
    assert float(bayes_risk_asymptotic(0.5, 0.0)) == pytest.approx(0)
    assert float(bayes_risk_asymptotic(2.0, 0.0)) == pytest.approx(0.5)  # half of the directions are never seen


def test_a_constant_in_all_labels_adds_the_sum_of_mu() -> None:
    x, y, query = parts(prompts_of(5))
    omega = tensor(0.2, -0.3, 0.1)
    for mu, added in ((tensor(2.0, -1.0, 0.5), 3 * 1.5), (tensor(2.0, -1.5, -0.5), 0.0)):
        moved = softmax_heads_predict(x, y + 3, query, omega, mu) - softmax_heads_predict(x, y, query, omega, mu)
        torch.testing.assert_close(moved, torch.full_like(moved, added))
    debiased = debiased_gd_predict(x, y + 3, query, 0.9) - debiased_gd_predict(x, y, query, 0.9)
    torch.testing.assert_close(debiased, torch.zeros_like(debiased))
    assert float((gd_predict(x, y + 3, query, 0.9) - gd_predict(x, y, query, 0.9)).abs().min()) > 1e-3


def test_one_example_says_nothing_to_heads_that_cancel() -> None:
    x, y, query = parts(prompts_of(5, length=1))
    zero = torch.zeros(5, dtype=torch.float64)
    torch.testing.assert_close(softmax_heads_predict(x, y, query, tensor(0.2, -0.2), tensor(3.0, -3.0)), zero)
    torch.testing.assert_close(debiased_gd_predict(x, y, query, 0.9), zero)
    torch.testing.assert_close(softmax_heads_predict(x, y, query, tensor(0.2), tensor(3.0)), 3 * y[:, 0])


def test_the_approximate_loss_by_hand() -> None:
    assert float(approx_icl_loss(tensor(0.13, -0.13), tensor(3.45, -3.45), *SETTING)) == pytest.approx(
        0.2213744433, abs=1e-10
    )
    omega, mu, loss = single_head_optimum(*SETTING)
    assert omega == pytest.approx(1 / math.sqrt(5))
    assert loss == pytest.approx(0.3720728007, abs=1e-10)
    assert float(approx_icl_loss(tensor(omega), tensor(mu), *SETTING)) == pytest.approx(loss, abs=1e-12)
    assert head_limits(*SETTING) == pytest.approx((0.8791208791, 0.2208791209), abs=1e-10)
    for move in (tensor(0.01), tensor(-0.01)):
        assert float(approx_icl_loss(tensor(omega) + move, tensor(mu), *SETTING)) > loss
        assert float(approx_icl_loss(tensor(omega), tensor(mu) + move, *SETTING)) > loss


def test_two_opposite_heads_come_near_the_limit_and_never_reach_it() -> None:
    limit = head_limits(*SETTING)[1]
    above = []
    for omega in (0.3, 0.1, 0.03):
        best = omega / (2 * omega**2 + 2 * 1.1 * math.sinh(5 * omega**2) / 40)
        pair = tensor(omega, -omega)
        torch.testing.assert_close(optimal_mu(pair, *SETTING), tensor(best, -best))
        above.append(float(approx_icl_loss(pair, tensor(best, -best), *SETTING)) - limit)
    assert above[0] > above[1] > above[2] > 0
    assert above[2] < 1e-5


def test_gradients_are_those_of_half_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    omega, mu = (torch.randn(3, 4, generator=generator, dtype=torch.float64) * 0.3 for _ in range(2))
    leaves = [part.clone().requires_grad_() for part in (omega, mu)]
    expected = torch.autograd.grad(approx_icl_loss(leaves[0], leaves[1], *SETTING).sum() / 2, leaves)
    torch.testing.assert_close(icl_loss_gradients(omega, mu, *SETTING), expected)


@pytest.mark.parametrize("omega", [(0.4,), (0.2, -0.1, 0.3), (0.2, 0.2, -0.2)])
def test_at_the_best_mu_the_slope_vanishes(omega: tuple[float, ...]) -> None:
    mu = optimal_mu(tensor(*omega), *SETTING)
    slope = icl_loss_gradients(tensor(*omega), mu, *SETTING)[1]
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-10, rtol=0)
    # Heads that are alike share the work: the solution of smallest norm.
    if len(set(omega)) < len(omega):
        assert float(mu[0]) == pytest.approx(float(mu[1]))


def test_the_preconditioner() -> None:
    plain = preconditioner(torch.eye(5, dtype=torch.float64), 40, 0.1)
    torch.testing.assert_close(plain, torch.eye(5, dtype=torch.float64) / ((1 + 1 / 40) + (5 + 5 * 0.1) / 40))
    # A regression of labels on all x_q,i (1/L) Σ y_l x_l,j finds the same matrix.
    covariance = toeplitz_covariance(3, 0.5)
    sampler = LinearRegressionICL(3, 12, 0.1, covariance=covariance)
    prompts = sampler.sample(200_000, torch.Generator().manual_seed(0), dtype=torch.float64)
    features = torch.einsum("bd,be->bde", prompts.query_x, (prompts.x.mT @ prompts.y)[..., 0] / 12).flatten(1)
    fitted = torch.linalg.lstsq(features, prompts.target).solution.view(3, 3)
    torch.testing.assert_close(fitted, preconditioner(covariance, 12, 0.1), atol=0.02, rtol=0)


def test_the_flow_follows_the_slope_and_lowers_the_loss() -> None:
    start = tensor(0.05, -0.02), tensor(0.03, -0.04)
    flow = simulate_head_flow(*start, *SETTING, times=tensor(0.0, 1e-4, 1.0, 10.0, 100.0))
    by_omega, by_mu = icl_loss_gradients(*start, *SETTING)
    torch.testing.assert_close((flow.omega[1] - flow.omega[0]) / 1e-4, -by_omega, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close((flow.mu[1] - flow.mu[0]) / 1e-4, -by_mu, rtol=1e-3, atol=1e-4)
    assert (flow.loss.diff() < 0).all()


def test_the_flow_is_small_steps_of_descent() -> None:
    omega, mu = tensor(0.05, -0.02, 0.01), tensor(0.03, -0.04, 0.02)
    flow = simulate_head_flow(omega, mu, *SETTING, times=tensor(5.0))
    for _ in range(5000):
        by_omega, by_mu = icl_loss_gradients(omega, mu, *SETTING)
        omega, mu = omega - 1e-3 * by_omega, mu - 1e-3 * by_mu
    torch.testing.assert_close(flow.omega[0], omega, rtol=0.01, atol=1e-3)
    torch.testing.assert_close(flow.mu[0], mu, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_heads_grow_then_align_then_creep(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    omega, mu = (0.05 * torch.randn(4, generator=generator, dtype=torch.float64) for _ in range(2))
    flow = simulate_head_flow(omega, mu, *SETTING, times=torch.logspace(-1, 4, 60, dtype=torch.float64))
    phases = head_phases(flow.omega, flow.mu)
    assert list(dict.fromkeys(phases)) == ["growth", "alignment", "manifold"]
    first = phases.index("manifold")
    assert (flow.omega[first:].sign() == flow.mu[first:].sign()).all()
    # Creeping: ω falls and μ grows on and on, at a gain that stands still near the limit.
    assert (flow.omega[first + 5 :].abs().mean(1).diff() < 0).all()
    assert (flow.mu[first + 5 :].abs().mean(1).diff() > 0).all()
    torch.testing.assert_close(
        (flow.omega * flow.mu).sum(1)[-10:], torch.full((10,), head_limits(*SETTING)[0]).double(), rtol=0.01, atol=0
    )


def test_heads_of_one_sign_never_come_to_the_manifold() -> None:
    flow = simulate_head_flow(
        tensor(0.05), tensor(0.05), *SETTING, times=torch.logspace(-1, 3, 40, dtype=torch.float64)
    )
    assert list(dict.fromkeys(head_phases(flow.omega, flow.mu))) == ["growth", "alignment"]
    assert float(flow.loss[-1]) == pytest.approx(single_head_optimum(*SETTING)[2], abs=1e-6)


def test_phases_by_hand() -> None:
    omega = torch.tensor([[0.1, -0.1], [0.2, -0.4], [0.2, -0.2], [0.3, -0.1]])
    mu = torch.tensor([[0.1, -0.1], [2.0, -1.0], [2.0, -2.0], [2.0, -2.0]])
    assert head_phases(omega, mu) == ["growth", "alignment", "manifold", "manifold"]
    # A third head whose μ is hardly there counts for nothing.
    idle = torch.tensor([[5.0], [5.0], [5.0], [5.0]])
    assert head_phases(torch.cat([omega, idle], 1), torch.cat([mu, 1e-4 * idle], 1))[2] == "manifold"
    assert head_phases(torch.zeros(3, 2), torch.zeros(3, 2)) == ["growth"] * 3


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: ridge_predict(torch.eye(2), torch.ones(2), torch.ones(2), -1.0), "negative"),
        (lambda: bayes_risk_asymptotic(0.0, 0.1), "above 0"),
        (lambda: simulate_head_flow(tensor(0.1), tensor(0.1), *SETTING, times=tensor(1.0, 0.5)), "must rise"),
    ],
)
def test_impossible_requests_are_told(call: Callable[[], object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()
