"""The flow of a dormant head against finite differences, Runge-Kutta, and its closed forms."""

import numpy as np
import pytest

from dynascope.theory.mutual_reinforcement import (
    DormantHead,
    mutual_reinforcement_flow,
    sink_logit,
    stationary_value,
)


def head(num_tokens: int = 6, context: float = 4.0, seed: int = 0) -> DormantHead:
    random = np.random.default_rng(seed)
    transitions = random.dirichlet(np.ones(num_tokens), num_tokens) * 0.9 + 0.1 / num_tokens
    weights = random.dirichlet(np.ones(num_tokens))
    weights[0] = 0.0  # a trigger, whose attention is elsewhere
    return DormantHead(transitions, weights, random.normal(size=num_tokens), context)


def test_closed_form_equals_runge_kutta() -> None:
    alpha, growth, step = 0.3, 2.0, 0.01

    def velocity(alpha: float) -> float:
        return growth * float(np.exp(-2 * alpha))

    for turn in range(1, 1001):
        k1 = velocity(alpha)
        k2 = velocity(alpha + step / 2 * k1)
        k3 = velocity(alpha + step / 2 * k2)
        k4 = velocity(alpha + step * k3)
        alpha += step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        if turn % 200 == 0:
            assert alpha == pytest.approx(float(sink_logit(turn * step, 0.3, growth)), abs=1e-8)


def test_late_sink_logit_grows_by_half_the_log_of_time() -> None:
    assert float(sink_logit(1e8, 0.0, 1.0) - sink_logit(1e4, 0.0, 1.0)) == pytest.approx(0.5 * np.log(1e4), abs=1e-4)


def test_gradients_equal_finite_differences() -> None:
    one = head()
    random = np.random.default_rng(1)
    alpha, beta, tiny = random.normal(size=6), random.normal(size=6), 1e-6
    to_alpha, to_beta = one.gradients(alpha, beta)
    for place in range(6):
        push = tiny * np.eye(6)[place]
        by_alpha = (one.loss(alpha + push, beta) - one.loss(alpha - push, beta)) / (2 * tiny)
        by_beta = (one.loss(alpha, beta + push) - one.loss(alpha, beta - push)) / (2 * tiny)
        assert to_alpha[place] == pytest.approx(by_alpha, abs=1e-8)
        assert to_beta[place] == pytest.approx(by_beta, abs=1e-8)


def test_loss_by_hand() -> None:
    # Uniform law of two tokens, half of the attention on a sink of value 0, leak (0, 2 log 3): o = (0, log 3), so the
    # prediction is (1/4, 3/4) and the divergence ½ log(½ / ¼) + ½ log(½ / ¾).
    one = DormantHead(np.full((2, 2), 0.5), np.array([1.0, 0.0]), np.array([0.0, 2 * np.log(3)]), 1.0)
    expected = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    assert one.loss(np.zeros(2), np.zeros(2)) == pytest.approx(expected)


def test_with_an_empty_sink_the_flow_comes_to_the_closed_form() -> None:
    one = head()
    times = np.logspace(0, 8, 30)
    flow = mutual_reinforcement_flow(one, 3.0, 0.0, times, trains_beta=False)
    expected = sink_logit(times[:, None], 3.0, one.growth())
    np.testing.assert_allclose(flow.alpha[-1, 1:], expected[-1, 1:], atol=0.01)
    slope = np.polyfit(np.log(times[-6:]), flow.alpha[-6:, 1:], 1)[0]
    np.testing.assert_allclose(slope, 0.5, atol=0.01)
    assert (flow.alpha[:, 0] == 3.0).all()  # a trigger's logit is not moved by this loss


def test_with_logits_fixed_the_value_comes_to_what_cancels_the_leak_exponentially_fast() -> None:
    one = head()
    # It cannot leave the plane of constant mean: errors of predictions sum to zero.
    times = np.array([1.0, 20.0, 40.0, 2000.0])
    flow = mutual_reinforcement_flow(one, 3.0, 0.5, times, trains_alpha=False)
    expected = stationary_value(one, 3.0)
    expected = expected - expected.mean() + 0.5
    np.testing.assert_allclose(flow.beta[-1], expected, atol=1e-5)
    left = np.linalg.norm(flow.beta[:3] - expected, axis=1)
    assert left[1] / left[0] < 0.5
    assert left[2] / left[1] == pytest.approx((left[1] / left[0]) ** (20 / 19), rel=0.5)


def test_stationary_points_have_no_gradient_and_no_loss() -> None:
    one = head()
    alpha, beta = np.full(6, 2.5), stationary_value(one, 2.5, constant=0.7)
    for gradient in one.gradients(alpha, beta):
        np.testing.assert_allclose(gradient, 0, atol=1e-12)
    assert one.loss(alpha, beta) == pytest.approx(0, abs=1e-12)
    alpha[2] += 0.5  # unequal logits are not stationary
    assert max(np.abs(gradient).max() for gradient in one.gradients(alpha, beta)) > 1e-5


def test_together_they_end_where_logits_are_equal_and_the_value_cancels_the_leak() -> None:
    one = head(context=8.0)
    beta0 = np.random.default_rng(3).normal(size=6)
    flow = mutual_reinforcement_flow(one, np.linspace(2.5, 3.0, 6), beta0, np.logspace(0, 6, 30))
    assert (np.diff(flow.loss) <= 1e-12).all()
    assert flow.loss[-1] < 1e-10
    assert np.std(flow.alpha[-1, 1:]) < 1e-4 < 0.1 < np.std(flow.alpha[0, 1:])
    expected = stationary_value(one, float(flow.alpha[-1, 1]))
    np.testing.assert_allclose(flow.beta[-1] - flow.beta[-1].mean(), expected - expected.mean(), atol=1e-3)
    assert flow.value_norm()[-1] < 0.6 * flow.value_norm()[0]  # about context e^-alpha times the leak


def test_impossible_settings_are_told() -> None:
    with pytest.raises(ValueError, match="positive probabilities"):
        DormantHead(np.eye(2), np.ones(2), np.ones(2), 1.0)
    with pytest.raises(ValueError, match="context"):
        DormantHead(np.full((2, 2), 0.5), np.ones(2), np.ones(2), 0.0)
