"""The context manager: what it records, whom it follows, and that it survives bad probes."""

import copy
import gc
import pickle
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dynascope
from dynascope.probes import Need, Probe
from dynascope.probes.views import ModelView
from dynascope.record import RecordWriter, Series
from dynascope.watching import entrance


def small() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    return model, torch.optim.Adam(model.parameters(), lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 3)).square().mean().backward()
        optimizer.step()


class Failing(Probe):
    name = "failing"
    needs = frozenset({Need.GRADIENTS})
    series = (Series("failing/value"),)

    def measure(self, view: object) -> Mapping[str, Tensor]:
        raise RuntimeError("no luck")


class FailingInside(Failing):
    name = "failing-inside"
    needs = frozenset({Need.MODULES})


class NotANumber(Probe):
    name = "nan"
    needs = frozenset({Need.GRADIENTS})
    series = (Series("nan/value"),)

    def measure(self, view: object) -> Mapping[str, Tensor]:
        return {"nan/value": torch.tensor(float("nan"))}


def test_gradients_weights_and_updates_are_what_they_say(tmp_path: Path) -> None:
    model, optimizer = small()
    with dynascope.watch(model, optimizer, run=tmp_path / "run", every=1):
        for _ in range(3):
            before = [parameter.detach().clone() for parameter in model.parameters()]
            train(model, optimizer, steps=1)
            after = [parameter.detach().clone() for parameter in model.parameters()]
            gradients = [parameter.grad.clone() for parameter in model.parameters()]
    record = dynascope.open(tmp_path / "run")
    assert record["gradients/norm"].parameter.values.tolist() == [name for name, _ in model.named_parameters()]
    np.testing.assert_allclose(record["gradients/norm"][-1], [g.norm() for g in gradients], rtol=1e-5)
    np.testing.assert_allclose(record["weights/norm"][-1], [w.norm() for w in after], rtol=1e-5)
    moved = [(a - b).norm() for a, b in zip(after, before, strict=True)]
    np.testing.assert_allclose(record["updates/norm"][-1], moved, rtol=1e-4)
    ratio = [m / a.norm() for m, a in zip(moved, after, strict=True)]
    np.testing.assert_allclose(record["updates/ratio"][-1], ratio, rtol=1e-4)


def test_cosine_of_successive_gradients(tmp_path: Path) -> None:
    model, optimizer = small()
    gradients = []
    with dynascope.watch(model, optimizer, run=tmp_path / "run", every=1):
        for _ in range(3):
            train(model, optimizer, steps=1)
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    expected = torch.nn.functional.cosine_similarity(gradients[2], gradients[1], dim=0)
    np.testing.assert_allclose(dynascope.open(tmp_path / "run")["gradients/cosine"][-1], expected, rtol=1e-4)


@pytest.mark.parametrize("probe", [Failing, FailingInside])
def test_a_failing_probe_is_switched_off_and_the_others_go_on(probe: type[Probe], tmp_path: Path) -> None:
    model, optimizer = small()
    with dynascope.watch(model, optimizer, run=tmp_path / "run", every=1, probes=["default", probe]):
        train(model, optimizer)
    record = dynascope.open(tmp_path / "run")
    (event,) = [event for event in record.events if event.kind == "probe-off"]
    assert event.message == f"probe {probe.name!r} was switched off: RuntimeError: no luck"
    assert record["gradients/norm"].sizes["step"] == 5
    assert record["activations/rms"].sizes["step"] == 5


def test_a_probe_that_measures_nan_is_kept_and_its_nan_recorded(tmp_path: Path) -> None:
    model, optimizer = small()
    with dynascope.watch(model, optimizer, run=tmp_path / "run", every=1, probes=[NotANumber]):
        train(model, optimizer)
    values = dynascope.open(tmp_path / "run")["nan/value"].values
    assert np.isnan(values).tolist() == [True] * 5


def test_users_own_quantities_take_the_current_step(tmp_path: Path) -> None:
    model, optimizer = small()
    with dynascope.watch(model, optimizer, run=tmp_path / "run", probes=["none"]) as w:
        for step in range(4):
            w.log({"val/loss": torch.tensor(1.0 / (step + 1))}, table=np.eye(2))
            train(model, optimizer, steps=1)
    record = dynascope.open(tmp_path / "run")
    assert record["val/loss"].step.values.tolist() == [0, 1, 2, 3]
    assert record["table"].shape == (4, 2, 2)


def test_only_the_named_optimizer_is_followed(tmp_path: Path) -> None:
    (model, optimizer), (other_model, other) = small(), small()
    with dynascope.watch(model, optimizer, run=tmp_path / "run", probes=["none"]):
        train(model, optimizer, steps=2)
        train(other_model, other, steps=7)
    record = dynascope.open(tmp_path / "run")
    assert record["loss"].size == 2
    assert not [name for name in record.names() if name.startswith("optimizer")]


def test_model_and_optimizer_leave_as_they_came(tmp_path: Path) -> None:
    model, optimizer = small()
    with dynascope.watch(model, optimizer, run=tmp_path / "run", every=1):
        train(model, optimizer)
        copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))  # noqa: S301  our own bytes
        assert not model._forward_hooks
        assert not model._forward_pre_hooks
    assert "__call__" not in nn.Sequential.__dict__
    assert not entrance._visitors
    assert copied(torch.ones(1, 3)).shape == pickled(torch.ones(1, 3)).shape == (1, 1)


def test_the_watch_keeps_no_model_alive(tmp_path: Path) -> None:
    import weakref

    with dynascope.watch(run=tmp_path / "run", every=1):
        model, optimizer = small()
        train(model, optimizer)
        alive = weakref.ref(model)
        del model, optimizer
        gc.collect()
        assert alive() is None


def test_evaluation_losses_that_the_model_returns_are_recorded(tmp_path: Path) -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.line(x)
            return y, y.square().mean()

    model = WithLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with dynascope.watch(model, optimizer, run=tmp_path / "run"):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(16, 3))[1].backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            losses = [model(torch.randn(16, 3))[1] for _ in range(2)]
        model.train()
        optimizer.zero_grad()
        model(torch.randn(16, 3))[1].backward()
        optimizer.step()
    series = dynascope.open(tmp_path / "run")["eval/loss"]
    assert series.step.values.tolist() == [3]
    assert series.item() == pytest.approx((sum(losses) / 2).item())


def test_an_exception_in_the_block_is_noted_and_passed_on(tmp_path: Path) -> None:
    model, optimizer = small()

    def fail() -> None:
        with dynascope.watch(model, optimizer, run=tmp_path / "run"):
            train(model, optimizer)
            raise ZeroDivisionError("division by zero")

    with pytest.raises(ZeroDivisionError):
        fail()
    record = dynascope.open(tmp_path / "run")
    assert [event.message for event in record.events if event.kind == "exception"] == [
        "ZeroDivisionError: division by zero"
    ]
    assert record["loss"].size == 5


def test_budget_and_interval_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not both"):
        dynascope.watch(run=tmp_path / "run", budget=0.1, every=5)


def test_a_budget_under_several_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="every=50"):
        dynascope.watch(run=tmp_path / "run", budget=0.1)
    with pytest.raises(ValueError, match="--run DIR"):
        dynascope.watch()


def test_unsampled_steps_never_ask_the_device_for_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = small()
    asked = []
    with dynascope.watch(model, optimizer, run=tmp_path / "run", every=1000):
        train(model, optimizer, steps=2)
        for name in ("item", "__bool__", "__float__", "__int__", "tolist"):
            original = getattr(Tensor, name)
            monkeypatch.setattr(
                Tensor, name, lambda self, *a, n=name, f=original, **k: asked.append(n) or f(self, *a, **k)
            )
        train(model, optimizer, steps=20)
        monkeypatch.undo()
    # Adam itself asks for its own step counters on the CPU; the bare loop asks exactly as often.
    bare: list[str] = []
    for name in ("item", "__bool__", "__float__", "__int__", "tolist"):
        original = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, *a, n=name, f=original, **k: bare.append(n) or f(self, *a, **k))
    train(model, optimizer, steps=20)
    monkeypatch.undo()
    assert asked == bare


def test_an_open_record_is_written_to_and_left_open(tmp_path: Path) -> None:
    model, optimizer = small()
    with RecordWriter(tmp_path / "run") as record:
        with dynascope.watch(model, optimizer, run=record, every=1, probes=["gradients"]):
            train(model, optimizer)
        record.add(0, {"afterwards": 1.0})
    with dynascope.open(tmp_path / "run") as read:
        assert {"loss", "gradients/norm", "afterwards"} <= set(read.names())


def test_findings_are_looked_for_while_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynascope.watching.attach.FIRST_LOOK", 0.02)
    model, optimizer = small()
    with dynascope.watch(model, optimizer, run=tmp_path / "run", every=1, probes=["none"]):
        with torch.no_grad():
            model[0].weight.fill_(float("nan"))
        train(model, optimizer)
        record = dynascope.open(tmp_path / "run")
        for _ in range(500):
            if record.findings:
                break
            time.sleep(0.02)
        assert [finding.id for finding in record.findings] == ["loss-not-finite"]
    assert len(record.findings) == 1


class Caller(Probe):
    """Calls the model, differentiates it, and disturbs what a probe could disturb."""

    name = "caller"
    needs = frozenset({Need.MODEL})
    series = (Series("caller/output", ("row",)), Series("caller/slope", ("name",)), Series("caller/lr"))

    def coords(self, view: ModelView) -> Mapping[str, list[str]]:
        return {"name": [name for name, _ in view.model.named_parameters()]}

    def measure(self, view: ModelView) -> Mapping[str, Tensor]:
        assert not view.model.training
        torch.randn(3)
        with torch.enable_grad():
            output = view()
            slopes = torch.autograd.grad(output.sum(), list(view.model.parameters()))
        norms = torch.stack([slope.norm() for slope in slopes])
        return {"caller/output": output[:, 0].detach(), "caller/slope": norms, "caller/lr": torch.tensor(view.lr)}


def test_a_probe_may_call_the_model_itself_and_disturbs_nothing(tmp_path: Path) -> None:
    ends = []
    for is_watched in (False, True):
        torch.manual_seed(0)
        model, optimizer = small()
        if is_watched:
            start = copy.deepcopy(model)
            with dynascope.watch(model, optimizer, run=tmp_path / "run", every=2, probes=[Caller()]):
                train(model, optimizer)
        else:
            train(model, optimizer)
        ends.append([parameter.detach().clone() for parameter in model.parameters()] + [torch.get_rng_state()])
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))

    record = dynascope.open(tmp_path / "run")
    assert record["caller/output"].step.values.tolist() == [0, 2, 4]
    assert record["caller/slope"]["name"].values.tolist() == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert record["caller/lr"].values.tolist() == pytest.approx([1e-2] * 3)
    torch.manual_seed(0)
    small()
    first = start(torch.randn(16, 3)).detach()[:, 0]
    assert record["caller/output"].values[0] == pytest.approx(first.numpy(), abs=1e-6)
