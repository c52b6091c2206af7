"""Kernel probes: hand-worked numbers, a constant kernel's prediction, and a run under watch."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dynascope
from dynascope.kernels import LinearizedTwin, kernel_regression_baseline, linearize, ntk
from dynascope.nn import NTKLinear
from dynascope.probes.displacement import WeightDisplacement
from dynascope.probes.tangent_kernel import ModeProgress, TangentKernel, last_logit
from dynascope.probes.views import ModelView


def view(model: nn.Module, *args: Tensor, step: int = 0, lr: float = 0.1) -> ModelView:
    return ModelView(step, model, args, {}, lr)


def test_a_linear_models_kernel_stands_still_and_is_aligned_with_what_it_can_see() -> None:
    model = NTKLinear(2, 1, bias=False).double()
    x = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, -1.0], [-2.0, 0.0]], dtype=torch.float64)
    probe = TangentKernel(x, x[:, 0])
    first = probe.measure(view(model, x))
    assert "kernel/velocity" not in first
    # K = x xᵀ / 2 has eigenvalues 4 and 1, the first along the labels.
    assert first["kernel/trace"].item() == pytest.approx((2 + 0.5 + 0.5 + 2) / 4)
    assert first["kernel/eigenvalues"].tolist() == pytest.approx([1.0, 0.25, 0.0, 0.0], abs=1e-9)
    assert first["kernel/label_power"][0].item() == pytest.approx(1.0)
    shares = torch.tensor([0.8, 0.2])
    assert first["kernel/effective_rank"].item() == pytest.approx(float(torch.special.entr(shares).sum().exp()))
    assert math.isinf(first["kernel/condition"].item()) or first["kernel/condition"].item() > 1e12
    nn.init.normal_(model.weight)
    second = probe.measure(view(model, x, step=5))
    assert second["kernel/distance"].item() == pytest.approx(0.0)
    assert second["kernel/velocity"].item() == pytest.approx(0.0, abs=1e-12)


def test_mode_progress_of_a_linearized_model_is_as_predicted() -> None:
    torch.manual_seed(0)
    model = linearize(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double())
    x, y = torch.randn(5, 3).double(), torch.randn(5).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    probe = ModeProgress(x, y)
    for step in range(30):
        if step % 10 == 0:
            measured = probe.measure(view(model, x, step=step, lr=0.3))
            torch.testing.assert_close(measured["modes/error"], measured["modes/predicted"], rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(measured["modes/loss"], measured["modes/loss_predicted"])
        optimizer.zero_grad()
        (0.5 * (model(x)[:, 0] - y).square().mean()).backward()
        optimizer.step()
    assert measured["modes/error"].max() < 1


def test_probes_run_under_watch_on_given_and_on_seen_examples(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    x, y = torch.randn(20, 4), torch.randn(20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    start = ntk(model, x, output="trace")
    probes = [TangentKernel(), ModeProgress(x, y, scale=2 / 20), WeightDisplacement()]
    with dynascope.watch(model, optimizer, run=tmp_path / "run", every=5, probes=probes):
        for _ in range(16):
            optimizer.zero_grad()
            (model(x)[:, 0] - y).square().mean().backward()
            optimizer.step()
    record = dynascope.open(tmp_path / "run")
    assert not [event for event in record.events if event.kind == "probe-off"]
    assert record["kernel/trace"].values[0] == pytest.approx(float(start.diagonal().mean()), rel=1e-4)
    assert record["kernel/distance"].values[0] == 0
    assert record["kernel/distance"].values[-1] > 1e-4
    assert record["kernel/velocity"].step.values.tolist() == [5, 10, 15]
    assert "kernel/alignment" not in record
    progress = record["modes/loss"]
    assert progress.values[-1] < progress.values[0]
    assert record["modes/loss_predicted"].values[1] == pytest.approx(progress.values[1], rel=0.1)
    displacement = record["weights/displacement"]
    assert displacement.values[0] == pytest.approx(0.0, abs=1e-7)
    assert (displacement.values[-1] > 0).all()


def test_a_language_model_has_a_kernel_without_being_told_how(tmp_path: Path) -> None:
    import transformers

    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=8, vocab_size=11)
    model = transformers.GPT2LMHeadModel(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with dynascope.watch(model, optimizer, run=tmp_path / "run", every=1, probes=["tangent-kernel"]):
        for _ in range(2):
            tokens = torch.randint(11, (3, 8))
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens, num_items_in_batch=torch.tensor(21), use_cache=False).loss.backward()
            optimizer.step()
    record = dynascope.open(tmp_path / "run")
    assert not [event.message for event in record.events if event.kind == "probe-off"]
    assert record["kernel/distance"].values[1] > 0


def test_outputs_that_are_none_are_told() -> None:
    assert last_logit(torch.arange(24.0).view(2, 3, 4)).tolist() == [[11.0], [23.0]]
    with pytest.raises(ValueError, match="give the probe a readout"):
        last_logit({"loss": 1})


def test_arguments_that_are_no_examples_are_told() -> None:
    with pytest.raises(ValueError, match="give the probe its inputs"):
        TangentKernel().examples(ModelView(0, nn.Linear(1, 1), (torch.ones(2, 1), 0.5), {}, 0.1))


def test_displacement_by_hand() -> None:
    from dynascope.probes.views import StepView

    def step_view(weight: Tensor, bias: Tensor) -> StepView:
        return StepView(0, {"weight": weight, "bias": bias}, {}, {}, {}, {}, {})

    probe = WeightDisplacement()
    weight, bias = torch.tensor([3.0, 4.0]), torch.zeros(2)
    assert probe.measure(step_view(weight, bias))["weights/displacement"][0] == 0
    moved = probe.measure(step_view(torch.tensor([3.0, 5.0]), torch.ones(2)))["weights/displacement"]
    assert moved[0].item() == pytest.approx(0.2)
    assert math.isnan(moved[1].item())


def test_a_twin_follows_a_linear_model_exactly_and_leaves_a_rich_one() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(20, 4), torch.randn(20, 1)
    for model, is_lazy in (
        (nn.Linear(4, 1), True),
        (nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), False),
    ):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        twin = LinearizedTwin(model, optimizer)
        for _ in range(30):
            twin_loss = twin.step(lambda tangent: (tangent(x) - y).square().mean())
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            schedule.step()
        assert (abs(float(loss) - float(twin_loss)) < 1e-5) is is_lazy


def test_the_lazy_plateau_is_where_the_linearized_model_ends() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 1)).double()
    x, y, other = torch.randn(6, 3).double(), torch.randn(6, 1).double(), torch.randn(4, 3).double()
    tangent = linearize(model)
    optimizer = torch.optim.LBFGS(tangent.parameters(), max_iter=2000, tolerance_grad=1e-14, tolerance_change=1e-16)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (tangent(x) - y).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(kernel_regression_baseline(model, x, y, other), tangent(other), rtol=1e-3, atol=1e-4)
