"""The committee's closed forms, by hand, against autograd, sampling and simulation."""

import pytest
import torch

from dynascope.data import quadratic_teacher
from dynascope.kernels import ntk
from dynascope.nn import QuadraticCommittee
from dynascope.theory.committee import (
    committee_dmft,
    committee_ntk,
    committee_sweep,
    committee_test_loss,
    summary_statistics,
)


def committee(center: bool = False) -> QuadraticCommittee:
    generator = torch.Generator().manual_seed(0)
    return QuadraticCommittee(6, 5, alpha=1.3, eps=0.4, center=center, generator=generator, dtype=torch.float64)


def test_outputs_follow_from_the_statistics() -> None:
    model, x = committee(), torch.randn(9, 6, dtype=torch.float64)
    statistics = summary_statistics(model.weight)
    expected = 1.3 * x @ statistics.mean + 1.3 * 0.4 / 2 * ((x @ statistics.second) * x).sum(1)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_the_test_loss_by_hand() -> None:
    parts = committee_test_loss(summary_statistics(torch.eye(2)), torch.ones(2), alpha=1.0, eps=1.0)
    assert [float(part) for part in (parts.scale, parts.misalignment, parts.linear)] == [0.0625, 0.3125, 0.25]
    assert float(parts.total) == 0.625


@pytest.mark.parametrize("center", [False, True])
def test_the_test_loss_is_what_sampling_finds(center: bool) -> None:
    model = committee(center)
    start = summary_statistics(model.weight.detach())
    generator = torch.Generator().manual_seed(1)
    x, y, beta = quadratic_teacher(6, 30, generator=generator, dtype=torch.float64)
    model.descend(x, y, 20, lr=0.1 * model.lr)
    statistics = summary_statistics(model.weight.detach())
    statistics = statistics.since(start) if center else statistics
    exact = committee_test_loss(statistics, beta, alpha=1.3, eps=0.4).total
    fresh, target, _ = quadratic_teacher(6, 400_000, generator=generator, beta=beta, dtype=torch.float64)
    losses = (model(fresh) - target).square().detach()
    assert abs(float(losses.mean() - exact)) < 3 * float(losses.std()) / 400_000**0.5


def test_the_kernel_is_the_product_of_jacobians_at_any_time() -> None:
    model, x, other = committee(), torch.randn(5, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    for _ in range(2):
        found = committee_ntk(summary_statistics(model.weight), x, other, alpha=1.3, eps=0.4, num_neurons=5)
        torch.testing.assert_close(found, ntk(model, x, other, output="trace"), rtol=1e-10, atol=1e-10)
        model.descend(x, torch.zeros(5, dtype=torch.float64), lr=1.0)


def test_a_step_by_hand_and_by_autograd() -> None:
    model = QuadraticCommittee(2, 2, alpha=1.0, eps=1.0, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    x, y = torch.ones(1, 2, dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    residuals = list[list[float]]()
    model.descend(x, y, looks=[0], look=lambda step, residual: residuals.append(residual.tolist()))
    assert residuals == [[-0.5]]
    assert model.weight.tolist() == [[3.0, 2.0], [2.0, 3.0]]

    other = committee(center=True)
    x, y = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    loss = (other(x) - y).square().mean()
    (slope,) = torch.autograd.grad(loss, [other.weight])
    before = other.weight.detach().clone()
    other.descend(x, y, lr=0.3)
    torch.testing.assert_close(other.weight.detach(), before - 0.3 * slope)


def test_without_quadratic_features_the_network_is_linear_and_its_kernel_stands_still() -> None:
    model = QuadraticCommittee(4, 3, alpha=2.0, eps=0.0, dtype=torch.float64)
    x, y, _ = quadratic_teacher(4, 10, dtype=torch.float64)
    before = ntk(model, x)
    model.descend(x, y, 5)
    torch.testing.assert_close(ntk(model, x), before)


def test_lazier_networks_move_their_kernel_less_in_inverse_proportion() -> None:
    moved = {}
    for alpha in (10.0, 100.0):
        generator = torch.Generator().manual_seed(0)
        model = QuadraticCommittee(5, 20, alpha=alpha, eps=0.5, center=True, generator=generator, dtype=torch.float64)
        x, y, _ = quadratic_teacher(5, 8, generator=generator, dtype=torch.float64)
        before = ntk(model, x)
        model.descend(x, y, 50, lr=0.1 * model.lr)
        moved[alpha] = float((ntk(model, x) - before).norm() / before.norm())
    assert moved[10.0] / moved[100.0] == pytest.approx(10.0, rel=0.1)


def test_mean_field_theory_starts_at_its_closed_form_and_follows_simulation() -> None:
    field = committee_dmft(3, 5.0, alpha=1.0, eps=0.5, eta0=0.05, num_steps=12, num_samples=3000)
    assert float(field.test[0]) == pytest.approx(0.9375)
    torch.testing.assert_close(field.gram[0], torch.eye(3, dtype=torch.float64))
    arms = [(1.0, 0.5, seed) for seed in range(4)]
    sizes = {"dim": 400, "num_neurons": 3, "num_examples": 2000, "num_steps": 11}
    simulated = committee_sweep(arms, **sizes, looks=range(12), center=False, pace=0.05 * 400, dtype=torch.float64)
    torch.testing.assert_close(field.test, simulated.test.total.mean(1), rtol=0.03, atol=0.0)
    torch.testing.assert_close(field.train, simulated.train.mean(1), rtol=0.12, atol=0.0)


SIZES = {"dim": 6, "num_neurons": 5, "num_examples": 9, "num_steps": 30}


@pytest.mark.parametrize("center", [False, True])
def test_a_sweep_is_every_committee_trained_alone(center: bool) -> None:
    arms, looks = [(0.5, 0.4, 0), (2.0, 0.1, 1), (2.0, 0.4, 0)], [0, 7, 30]
    swept = committee_sweep(arms, **SIZES, looks=looks, center=center, pace=0.3, dtype=torch.float64)
    assert swept.steps == looks
    for place, (alpha, eps, seed) in enumerate(arms):
        generator, told = torch.Generator().manual_seed(seed), []
        x, y, beta = quadratic_teacher(6, 9, generator=generator, dtype=torch.float64)
        model = QuadraticCommittee(6, 5, alpha=alpha, eps=eps, center=center, generator=generator, dtype=torch.float64)
        start = summary_statistics(model.weight.detach().clone())
        for step in range(31):
            loss = (model(x) - y).square().mean()
            if step in looks:
                now = summary_statistics(model.weight.detach())
                parts = committee_test_loss(now.since(start) if center else now, beta, alpha=alpha, eps=eps)
                told.append([float(one) for one in (loss.detach(), parts.scale, parts.misalignment, parts.linear)])
            (slope,) = torch.autograd.grad(loss, [model.weight])
            with torch.no_grad():
                model.weight.sub_(0.3 * 5 / alpha**2 * slope)
        found = torch.stack([swept.train, swept.test.scale, swept.test.misalignment, swept.test.linear])[:, :, place]
        torch.testing.assert_close(found.T, torch.tensor(told, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_what_is_no_sweep_is_told() -> None:
    for arms, looks in (([], [0]), ([(1.0, 0.1, 0)], []), ([(1.0, 0.1, 0)], [31]), ([(1.0, 0.1, 0)], [-1])):
        with pytest.raises(ValueError, match="one or more arms, and looks at steps from 0 to 30"):
            committee_sweep(arms, **SIZES, looks=looks)
    with pytest.raises(ValueError, match=r"alpha=.* must be above 0"):
        committee_sweep([(1.0, 0.1, 0), (0.0, 0.1, 0)], **SIZES, looks=[0])
    with pytest.raises(ValueError, match=r"1 generators do not go with alpha and eps of shape \(2,\)"):
        QuadraticCommittee(3, 4, alpha=torch.ones(2), eps=0.1, generator=[torch.Generator()])


def test_the_teacher_is_normalized_as_said() -> None:
    x, y, beta = quadratic_teacher(50, 4000, generator=torch.Generator().manual_seed(0))
    assert float(beta.square().sum()) == pytest.approx(50, rel=1e-5)
    assert float(y.mean()) == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(y, (x @ beta).square() / 2)
    _, _, raw = quadratic_teacher(50, 10, normalize=False, generator=torch.Generator().manual_seed(0))
    assert float(raw.square().sum()) != pytest.approx(50, rel=1e-5)


def test_impossible_sizes_are_told() -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        quadratic_teacher(0, 10)
    with pytest.raises(ValueError, match="delta above 0"):
        committee_dmft(3, 0.0, alpha=1.0, eps=0.5, eta0=0.05, num_steps=3)
    with pytest.raises(ValueError, match="above 0"):
        QuadraticCommittee(3, 3, alpha=0.0, eps=0.1)
