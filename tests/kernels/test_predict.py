"""What a constant kernel predicts equals what gradient descent does on the linearized model."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynascope.kernels import (
    KernelTraining,
    kernel_regression,
    linearize,
    max_learning_rate,
    mode_times,
    ntk,
    ntk_solve,
    predict_cross_entropy,
    predict_ensemble,
    predict_ode,
)


@pytest.fixture(name="task")
def a_task() -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """A model, training inputs and targets, other inputs, and the kernel between all of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    x, y, other = torch.randn(6, 3).double(), torch.randn(6, 1).double(), torch.randn(4, 3).double()
    kernel = ntk(model, torch.cat([x, other]), output="trace")
    return model, x, y, other, kernel


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_of_the_linearized_model_are_predicted_exactly(
    task: tuple[nn.Module, Tensor, Tensor, Tensor, Tensor], momentum: float
) -> None:
    model, x, y, other, kernel = task
    tangent = linearize(model)
    lr = 0.5 * max_learning_rate(kernel[:6, :6], scale=1 / 6)
    optimizer = torch.optim.SGD(tangent.parameters(), lr=lr, momentum=momentum)
    start, start_elsewhere = model(x).detach(), model(other).detach()
    training = KernelTraining(kernel[:6, :6], y, start, rate=lr / 6, is_discrete=True, momentum=momentum)
    for step in range(1, 41):
        optimizer.zero_grad()
        (0.5 * (tangent(x) - y).square().mean()).backward()
        optimizer.step()
        if step in (1, 7, 40):
            torch.testing.assert_close(training.at(step), tangent(x).detach(), rtol=1e-10, atol=1e-10)
            predicted = training.elsewhere(kernel[6:, :6], step, start_elsewhere)
            torch.testing.assert_close(predicted, tangent(other).detach(), rtol=1e-10, atol=1e-10)


def test_flow_is_the_limit_of_small_steps_and_solves_its_equation(
    task: tuple[nn.Module, Tensor, Tensor, Tensor, Tensor],
) -> None:
    _, _, y, _, kernel = task
    train = kernel[:6, :6]
    flow = KernelTraining(train, y, rate=1.0)
    tiny = KernelTraining(train, y, rate=1e-5, is_discrete=True)
    torch.testing.assert_close(flow.at(0.1), tiny.at(10_000), rtol=1e-4, atol=1e-6)
    speed = (flow.at(0.1 + 1e-5) - flow.at(0.1 - 1e-5)) / 2e-5
    torch.testing.assert_close(speed, -train @ (flow.at(0.1) - y), rtol=1e-5, atol=1e-7)


def test_start_and_end(task: tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]) -> None:
    model, x, y, other, kernel = task
    start, start_elsewhere = model(x).detach(), model(other).detach()
    training = KernelTraining(kernel[:6, :6], y, start)
    torch.testing.assert_close(training.at(0.0), start)
    torch.testing.assert_close(training.at(math.inf), y)
    torch.testing.assert_close(training.elsewhere(kernel[6:, :6], 0.0, start_elsewhere), start_elsewhere)
    expected = start_elsewhere + kernel[6:, :6] @ torch.linalg.solve(kernel[:6, :6], y - start)
    regression = kernel_regression(kernel[:6, :6], y, kernel[6:, :6], start=start, start_elsewhere=start_elsewhere)
    torch.testing.assert_close(regression, expected, rtol=1e-6, atol=1e-8)
    many = training.at([0.0, 1.0, math.inf])
    torch.testing.assert_close(many[1], training.at(1.0))


def test_each_mode_decays_on_its_own(task: tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]) -> None:
    _, _, y, _, kernel = task
    training = KernelTraining(kernel[:6, :6], y, rate=0.7)
    error = training.at(0.3) - y
    torch.testing.assert_close(training.mode_errors(0.3), training.eigenvectors.T @ error)
    half_lives, eigenvalues, shares = mode_times(kernel[:6, :6], y, rate=0.7)
    top = training.mode_errors([0.0, float(half_lives[0])])[:, -1, 0]
    assert float(top[1] / top[0]) == pytest.approx(0.5)
    assert float(shares.sum()) == pytest.approx(1.0)
    assert torch.equal(eigenvalues, eigenvalues.sort(descending=True).values)


def test_the_largest_stable_rate_is_sharp(task: tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]) -> None:
    _, _, y, _, kernel = task
    train = kernel[:6, :6]
    largest = max_learning_rate(train, scale=1.0)

    def error_after(rate: float) -> float:
        outputs = torch.zeros_like(y)
        for _ in range(4000):
            outputs = outputs - rate * train @ (outputs - y)
        return float((outputs - y).norm())

    assert error_after(0.99 * largest) < float(y.norm())
    assert error_after(1.01 * largest) > 1e3
    with pytest.raises(ValueError, match="diverges: steps are stable below"):
        KernelTraining(train, y, rate=1.01 * largest, is_discrete=True)
    with pytest.raises(ValueError, match="must be above 0"):
        KernelTraining(train, y, rate=0.0)


def test_momentum_ends_where_descent_does_and_allows_larger_steps() -> None:
    kernel, y = torch.diag(torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)), torch.ones(3, 1, dtype=torch.float64)
    assert max_learning_rate(kernel, scale=1.0, momentum=0.9) == pytest.approx(1.9)
    training = KernelTraining(kernel, y, rate=1.89, is_discrete=True, momentum=0.9)
    ends = training.at([0, 20_000, math.inf])[..., 0]
    torch.testing.assert_close(ends, torch.tensor([[0.0, 0, 0], [0, 1, 1], [0, 1, 1]], dtype=torch.float64))
    with pytest.raises(ValueError, match="whole numbers of steps"):
        training.at(0.5)
    with pytest.raises(ValueError, match=r"stable below 1.9 \(3.8 over"):
        KernelTraining(kernel, y, rate=1.91, is_discrete=True, momentum=0.9)
    for momentum, is_discrete in ((1.0, True), (-0.1, True), (0.9, False)):
        with pytest.raises(ValueError, match="must lie between 0 and 1, and above 0 only with is_discrete"):
            KernelTraining(kernel, y, is_discrete=is_discrete, momentum=momentum, rate=0.1)


def test_duplicated_inputs_are_inverted_where_they_can_be() -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    twice = torch.cat([x[:2], x[:1]])
    kernel, cross = twice @ twice.T, x @ twice.T
    y = torch.tensor([[1.0], [2.0], [1.0]], dtype=torch.float64)
    expected = cross @ torch.linalg.pinv(kernel, hermitian=True) @ y
    torch.testing.assert_close(kernel_regression(kernel, y, cross), expected)
    assert torch.isfinite(kernel_regression(kernel, y, cross, ridge=1e-3)).all()


def test_an_ensemble_of_linear_models_has_the_predicted_mean_and_covariance() -> None:
    # f(x) = w·x with w ~ N(0, I): its NNGP kernel and its NTK are both x·x', and training is exact.
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (3, 4))
    y = torch.randn(3, 1, generator=generator, dtype=torch.float64)
    gram, cross, own = x @ x.T, other @ x.T, other @ other.T
    for time in (0.0, 0.4, math.inf):
        mean, covariance = predict_ensemble(gram, gram, cross, cross, own, y, time, rate=0.5)
        weights = torch.randn(200_000, 5, generator=generator, dtype=torch.float64)
        training = KernelTraining(gram, torch.zeros_like(weights @ x.T).T + y, (weights @ x.T).T, rate=0.5)
        ends = training.elsewhere(cross, time, (weights @ other.T).T)
        torch.testing.assert_close(ends.mean(1, keepdim=True), mean, rtol=0.05, atol=0.03)
        torch.testing.assert_close(torch.cov(ends), covariance, rtol=0.05, atol=0.05)


def test_cross_entropy_flow_against_small_steps() -> None:
    torch.manual_seed(0)
    factor = torch.randn(5, 5, dtype=torch.float64)
    kernel, labels = factor @ factor.T / 5, torch.eye(3, dtype=torch.float64)[[0, 1, 2, 1, 0]]
    logits = torch.zeros(5, 3, dtype=torch.float64)
    for _ in range(2000):
        logits = logits - 1e-3 * kernel @ (torch.softmax(logits, 1) - labels)
    found = predict_cross_entropy(kernel, labels, [0.0, 2.0])
    assert torch.equal(found[0], torch.zeros(5, 3, dtype=torch.float64))
    torch.testing.assert_close(found[1], logits, rtol=1e-3, atol=1e-3)


def test_any_loss_flows_as_small_steps_and_squares_as_their_closed_form() -> None:
    torch.manual_seed(0)
    factor, y = torch.randn(5, 5, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    kernel, start = factor @ factor.T / 5, torch.randn(5, 2, dtype=torch.float64)
    times = [0.0, 0.5, 3.0]
    found = predict_ode(kernel, lambda f: 0.5 * (f - y).square().sum(), start, times, rate=0.7, rtol=1e-9)
    expected = KernelTraining(kernel, y, start, rate=0.7).at(times)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)

    outputs = start
    for _ in range(2000):
        outputs = outputs - 1e-3 * kernel @ (outputs - y).clamp(-1, 1)
    huber = predict_ode(kernel, lambda f: F.huber_loss(f, y, reduction="sum"), start, [2.0])
    torch.testing.assert_close(huber[0], outputs, rtol=1e-3, atol=2e-3)


def test_conjugate_gradients_solve_without_the_kernel(task: tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]) -> None:
    model, x, y, _, kernel = task
    expected = torch.linalg.solve(kernel[:6, :6] + 1e-3 * torch.eye(6, dtype=torch.float64), y)
    torch.testing.assert_close(ntk_solve(model, x, y, ridge=1e-3), expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(RuntimeError, match="did not converge in 1"):
        ntk_solve(model, x, y, ridge=1e-6, max_iterations=1)
    assert torch.isfinite(ntk_solve(model, x, y, max_iterations=1, on_fail="best")).all()
