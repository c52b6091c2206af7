"""The mesa-optimizer in closed form: identities, moments, conditions and the flow."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynascope.data.in_context.ar_process import ARProcess
from dynascope.nn.linear_attention import LinearCausalAttention
from dynascope.theory.mesa import (
    FullBatchLoss,
    GDStepFit,
    Moments,
    ab_star,
    check_condition_1,
    check_condition_2,
    effective_gd_step,
    estimate_moments,
    law_moments,
    mesa_flow,
    mesa_gd_predict,
    off_diagonal_share,
    ols_predict,
    reduced_loss,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_diagonal_model_is_one_step_of_gradient_descent_on_least_squares() -> None:
    x = ARProcess(3, 12).sample(5, generator())
    model = LinearCausalAttention(3, a0=0.7, b0=0.4)
    torch.testing.assert_close(model(x), mesa_gd_predict(x, 0.7 * 0.4), rtol=1e-12, atol=1e-12)
    # By hand at each position: minus the step times the slope of the context's least squares at zero.
    for t in range(2, 12):
        w = torch.zeros(5, 3, 3, dtype=torch.complex128, requires_grad=True)
        errors = x[:, 1:t] - torch.einsum("bij,btj->bti", w, x[:, : t - 1])
        (0.5 * errors.abs().square().sum()).backward()
        assert w.grad is not None
        stepped = -0.28 / (t - 1) * w.grad
        expected = torch.einsum("bij,bj->bi", stepped, x[:, t - 1])
        torch.testing.assert_close(mesa_gd_predict(x, 0.28)[:, t - 2], expected)


def test_sparse_processes_are_predicted_exactly_at_the_optimum() -> None:
    x = ARProcess(4, 15, "sparse", scale=2.0).sample(20, generator())
    model = LinearCausalAttention(4, a0=1.0, b0=0.25)
    assert float(model.loss(x)) == pytest.approx(0.0, abs=1e-24)


def test_phase_and_scale() -> None:
    x = ARProcess(3, 10).sample(4, generator())
    phase = torch.polar(torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64))
    torch.testing.assert_close(mesa_gd_predict(phase * x, 0.3), phase * mesa_gd_predict(x, 0.3))
    torch.testing.assert_close(mesa_gd_predict(2 * x, 0.3), 8 * mesa_gd_predict(x, 0.3))


def test_least_squares_recovers_the_process_once_the_context_spans_it() -> None:
    x = ARProcess(3, 12).sample(6, generator())
    torch.testing.assert_close(ols_predict(x, ridge=1e-12)[:, 6:], x[:, 8:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("moments", "dim", "length", "expected"),
    [
        (law_moments("gaussian", 5), 5, 100, 0.1919050885),
        (law_moments("ones", 5), 5, 100, 0.8258257205),
        (law_moments("gaussian", 2), 2, 4, 0.1739130435),
        (law_moments("gaussian", 2, 2.0), 2, 4, 0.0434782609),
        (law_moments("sparse", 7, 3.0), 7, 50, 1 / 9),
        (law_moments("gaussian", 1), 1, 9, 0.2),
    ],
)
def test_the_closed_form_by_hand(moments: Moments, dim: int, length: int, expected: float) -> None:
    assert ab_star(moments, length) == pytest.approx(expected, abs=1e-10)
    at = torch.tensor(expected, dtype=torch.float64, requires_grad=True)
    reduced_loss(at, moments, dim, length, 1.0).backward()
    assert at.grad is not None
    assert float(at.grad) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("law", ["gaussian", "sparse", "ones"])
def test_moments_of_a_sample(law: str) -> None:
    process = ARProcess(4, 5, law, scale=1.2)  # type: ignore[arg-type]
    found, exact = estimate_moments(process.first(200_000, generator())), law_moments(law, 4, 1.2)
    for name, error in zip(("k1", "k2", "k3"), found.errors, strict=True):
        assert abs(getattr(found, name) - getattr(exact, name)) <= 4 * error + 1e-9


@pytest.mark.parametrize(
    ("law", "first_holds", "second_holds"), [("gaussian", True, False), ("sparse", True, True), ("ones", False, False)]
)
def test_conditions(law: str, first_holds: bool, second_holds: bool) -> None:
    sample = ARProcess(3, 5, law).first(20_000, generator())  # type: ignore[arg-type]
    assert check_condition_1(sample).holds is first_holds
    # All ones have equal squares: what fails for them is the first condition.
    assert check_condition_2(sample).holds is (second_holds or law == "ones")


def test_unequal_coordinates_are_named() -> None:
    sample = torch.randn(20_000, 3, generator=generator()) * torch.tensor([1.0, 1.0, 2.0])
    report = check_condition_1(sample)
    assert not report.holds
    assert report.worst.startswith("k")


def test_the_flow_conserves_and_converges_from_every_start() -> None:
    moments = law_moments("gaussian", 3)
    for a0, b0 in ((0.1, 0.1), (0.5, 1.5), (2.0, 2.0)):
        a, b = mesa_flow(a0, b0, moments, 3, 20, [0.0, 0.01, 0.1, 1.0, 10.0])
        assert np.abs(a**2 - b**2 - (a0**2 - b0**2)).max() < 1e-6
        assert a[-1] * b[-1] == pytest.approx(ab_star(moments, 20), rel=1e-6)


def test_the_flow_is_that_of_the_population_loss() -> None:
    moments = law_moments("gaussian", 3)
    a, b = mesa_flow(0.3, 0.6, moments, 3, 20, [0.0, 1e-6])
    ends = [torch.tensor(one, dtype=torch.float64, requires_grad=True) for one in (0.3, 0.6)]
    reduced_loss(ends[0] * ends[1], moments, 3, 20, 1.0).backward()
    for moved, end in zip((a, b), ends, strict=True):
        assert end.grad is not None
        assert (moved[1] - moved[0]) / 1e-6 == pytest.approx(-float(end.grad), rel=1e-3)


def test_sampled_slopes_agree_with_the_population() -> None:
    process, moments = ARProcess(3, 8), law_moments("gaussian", 3)
    model = LinearCausalAttention(3, a0=0.3, b0=0.4)
    slopes = []
    for seed in range(40):
        model.zero_grad()
        model.loss(process.sample(2000, generator(seed))).backward()
        assert model.kq.grad is not None
        slopes.append(model.kq.grad[3:, :3].diagonal().sum().real)
    at = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    reduced_loss(at * 0.4, moments, 3, 8, 1.0).backward()
    found = torch.stack(slopes)
    assert at.grad is not None
    assert abs(float(found.mean() - at.grad)) < 4 * float(found.std()) / math.sqrt(40)


def test_the_best_single_step_and_preconditioner_are_found() -> None:
    x = ARProcess(3, 15).sample(50, generator())
    exact = effective_gd_step(mesa_gd_predict(x, 0.37), x)
    assert float(exact.step) == pytest.approx(0.37)
    assert float(exact.residual) == pytest.approx(0.0, abs=1e-20)
    matrix = torch.randn(3, 3, dtype=torch.complex128, generator=generator())
    model = LinearCausalAttention(3)
    with torch.no_grad():
        model.kq[3:, :3], model.pv[:, :3] = matrix, torch.eye(3)
    other = effective_gd_step(model(x).detach(), x)
    torch.testing.assert_close(other.preconditioner, matrix)
    assert float(other.residual) > 0.05
    assert float(other.preconditioned_residual) == pytest.approx(0.0, abs=1e-20)
    assert float(effective_gd_step(ols_predict(x), x).residual) > 0.05


@pytest.mark.parametrize("law", ["gaussian", "sparse"])
def test_the_fit_of_fixed_sequences_is_least_squares_of_smallest_norm(law: str) -> None:
    """With one nonzero coordinate a sequence, six of the nine entries of P are free: they stay 0."""
    x = ARProcess(3, 12, law).sample(40, generator())
    predictions = torch.randn(40, 10, 3, dtype=torch.complex128, generator=generator(1))
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
    outer = torch.einsum("bti,btj->btij", x, before.conj()).cumsum(1)[:, 1:-1]
    outer = outer / torch.arange(1, 11)[:, None, None]
    design = torch.einsum("btij,btk->btijk", outer, x[:, 1:-1]).flatten(0, 2).flatten(1)
    best = torch.linalg.pinv(design) @ predictions.flatten()
    left = (design @ best - predictions.flatten()).abs().square().sum() / predictions.abs().square().sum()
    fit = GDStepFit(x)
    for _ in range(2):
        found = fit(predictions)
        torch.testing.assert_close(found.preconditioner.flatten(), best, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(found.preconditioned_residual, left, rtol=1e-10, atol=0)
    assert int((found.preconditioner.abs() > 1e-9).sum()) == (3 if law == "sparse" else 9)


def test_off_diagonal_share_by_hand() -> None:
    assert float(off_diagonal_share(torch.tensor([[3.0, 0.0], [4.0, 0.0]]))) == pytest.approx(0.8)


def _nothing() -> None:
    law_moments("cauchy", 3)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (_nothing, "gaussian, sparse or ones"),
        (lambda: ab_star(law_moments("ones", 3), 2), "at least 3"),
        (lambda: ARProcess(0, 20), "at least 1"),
        (lambda: ARProcess(3, 2), "at least 3"),
        (lambda: ARProcess(3, 20, scale=0.0), "above 0"),
        (lambda: LinearCausalAttention(3, init="zeros"), "diagonal or random"),
    ],
)
def test_impossible_requests_are_told(call: Callable[[], object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()


def test_processes_are_what_they_say() -> None:
    x = ARProcess(3, 10, "sparse", scale=2.0).sample(100, generator())
    torch.testing.assert_close(x.abs(), x[:, :1].abs().expand_as(x))
    assert ((x[:, 0].abs() > 0).sum(1) == 1).all()
    assert set(x[:, 0].real.abs().unique().tolist()) == {0.0, 2.0}
    turned = x[:, 1:] * x[:, :-1].conj()
    torch.testing.assert_close(turned, turned[:, :1].expand_as(turned))
    own = ARProcess(2, 5, lambda count, generator: torch.full((count, 2), 3.0)).sample(4, generator())
    assert torch.equal(own[:, 0].real, torch.full((4, 2), 3.0).double())
    real = ARProcess(3, 10).sample_real(4, generator())
    assert real.shape == (4, 10, 6)
    torch.testing.assert_close(
        torch.view_as_complex(real.double().unflatten(2, (3, 2))),
        ARProcess(3, 10).sample(4, generator()),
        rtol=1e-5,
        atol=1e-5,
    )


def model_of(function: Callable[[Tensor], Tensor]) -> nn.Module:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    return Model()


def test_the_probe_reads_any_model_and_more_of_its_own() -> None:
    from dynascope.probes.mesa import MesaOptimizer
    from dynascope.probes.views import ModelView

    x = ARProcess(3, 10).sample(30, generator())
    probe = MesaOptimizer(x)
    found = probe.measure(ModelView(0, model_of(lambda prompts: mesa_gd_predict(prompts, 0.2)), (), {}, 0.1))
    assert float(found["mesa/step"]) == pytest.approx(0.2)
    assert "mesa/a" not in found
    model = LinearCausalAttention(3, a0=0.5, b0=0.2)
    first = probe.measure(ModelView(0, model, (), {}, 0.1))
    assert float(first["mesa/a"]) == pytest.approx(0.5)
    assert first["mesa/off_diagonal"].tolist() == [0.0, 0.0]
    with torch.no_grad():
        model.kq[3:, :3] *= 2
    second = probe.measure(ModelView(1, model, (), {}, 0.1))
    assert float(second["mesa/conserved"]) == pytest.approx(1.0 - 0.25)
    assert float(second["mesa/step"]) == pytest.approx(0.2)


def test_the_loss_from_moments_is_the_loss_from_data_and_so_is_its_gradient() -> None:
    x = ARProcess(2, 7).sample(30, torch.Generator().manual_seed(0))
    model = LinearCausalAttention(2, a0=0.3, b0=0.4, init="random")
    expected = model.loss(x)
    gradients = torch.autograd.grad(expected, [model.kq, model.pv])
    found = FullBatchLoss(x, chunk=7)(model)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, [model.kq, model.pv]), gradients)
