"""Following one optimizer: what happens between two of its steps, measured and sent to the record."""

import itertools
import math
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynascope.probes.probe import Need, Probe
from dynascope.probes.views import AttentionCall, ModelView, ModuleOutput, StepView
from dynascope.record import RecordWriter, Series
from dynascope.watching.collector import Collector
from dynascope.watching.entrance import Visitor, stand_at, step_away
from dynascope.watching.hessian import HessianWatch, differentiable_leaves, leaves
from dynascope.watching.locate import locate, wrapped
from dynascope.watching.outbox import Outbox
from dynascope.watching.schedule import Schedule
from dynascope.watching.shadow import first_rows, shadow_pass
from dynascope.watching.shards import local, summing_over_shards, whole
from dynascope.watching.undisturbed import undisturbed

STEP_NEEDS = frozenset({Need.PARAMETERS, Need.GRADIENTS, Need.PREVIOUS_GRADIENTS, Need.UPDATES, Need.OPTIMIZER_STATE})
SHADOW_NEEDS = frozenset({Need.MODULES, Need.ACTIVATIONS, Need.BLOCKS, Need.ATTENTION})

ALWAYS = (
    Series("loss", description="The objective of the step: the sum over its backward calls."),
    Series("eval/loss", description="Mean loss of the forward passes in evaluation mode since the last step."),
    Series("learning_rate", dims=("group",), description="Learning rate of each parameter group."),
    Series("time/step", unit="s", description="Wall time from one optimizer step to the next."),
    Series("time/elapsed", unit="s", description="Wall time since the watch began."),
    Series(
        "throughput/examples", unit="examples/s", description="Examples of this process over wall time of the step."
    ),
    Series("gradients/total_norm_unclipped", description="Norm of the whole gradient before it was clipped."),
)
# Each process has its own of these; everything else is the same everywhere and is written by the first.
_PER_RANK = {"loss", "eval/loss", "time/step", "time/elapsed", "throughput/examples"}
# After so many steps without a call at any entrance, the model's forward pass is taken to be out of sight.
_STEPS_TO_SEE_A_FORWARD = 3


class Tracker:
    """One optimizer under watch, with its model, its probes and their schedule.

    The watch calls `before_step` and `after_step` around each optimizer step and `on_loss` at each backward pass. The
    tracker holds the optimizer and the model weakly. Under several processes every one of them does the same, as
    reading shards is a joint act, and the first one writes.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        probes: Sequence[Probe],
        schedule: Schedule,
        writer: RecordWriter,
        *,
        model: nn.Module | None = None,
        prefix: str = "",
        is_distributed: bool = False,
        started: float,
        already_spent: float = 0.0,
    ) -> None:
        began = time.perf_counter()
        self.step = 0
        self.prefix = prefix
        self.started = started
        self._optimizer = weakref.ref(optimizer)
        self._probes = {probe.name: probe for probe in probes}
        self._schedule = schedule
        self._writer = writer
        self._outbox = Outbox(writer)
        self._collector = Collector(writer, prefix)
        self._is_distributed = is_distributed
        self._muted: set[str] = set()
        self._last_step_at = time.perf_counter()
        self._model: weakref.ref[nn.Module] | None = None
        self._visitor = Visitor(self._arrive, self._leave)
        self._is_entrance_known = False
        self._names = [f"parameter{index}" for index, _ in enumerate(_parameters(optimizer))]
        self._eval_losses: list[Tensor] = []
        self._num_examples = 0
        self._snapshot: dict[str, Tensor] = {}
        self._previous_gradients: dict[str, Tensor] = {}
        self._looked: set[str] = set()
        self._costs: dict[str, float] = {}
        self._measured: dict[str, Tensor | float] = {}
        self._hessian: HessianWatch | None = None
        for series in ALWAYS:
            if writer.rank == 0 or series.name in _PER_RANK:
                writer.declare(Series(prefix + series.name, series.dims, series.unit, series.description))
        if model is not None:
            self._meet(model)
        self._due = set(schedule.due(0, started))
        self._shared = already_spent + time.perf_counter() - began

    # Around the optimizer's step

    def before_step(self) -> None:
        """Meet the model at the first step; keep what the step is about to change, if a probe wants the update."""
        if self._model is None:
            self._meet(None)
        for probe in self._due_probes(Need.UPDATES):
            with self._paying(probe.name):
                self._snapshot = self._snapshot or {
                    name: local(parameter).clone() for name, parameter in self._named_parameters().items()
                }

    def after_step(self, losses: Sequence[Tensor], norm_before_clipping: Tensor | None) -> None:
        """Measure the step, send it to the record, and plan the next."""
        now = time.perf_counter()
        paid = sum(self._costs.values())
        self._measure_step()
        values = self._always(now, losses, norm_before_clipping) | self._measured
        if self._writer.rank > 0:
            values = {name: value for name, value in values.items() if name.removeprefix(self.prefix) in _PER_RANK}
        self._outbox.put(self.step, values)
        self._shared += time.perf_counter() - now - (sum(self._costs.values()) - paid)
        self._plan_next()

    def close(self) -> None:
        """Send what is left and step away from the model."""
        step_away(self._visitor)
        self._outbox.close()

    def on_loss(self, loss: Tensor) -> None:
        """A backward pass is about to start from `loss`."""
        for probe in self._due_probes(Need.CURVATURE):
            hessian = self._hessian
            if hessian is None or probe.name in self._looked:
                continue
            with self._paying(probe.name), hessian.view(loss, self.step, self._learning_rates()[0]) as view:
                if view is not None:
                    self._looked.add(probe.name)
                    self._keep(probe, self._collector.whole(probe, probe.measure(view), {}))
        self._hessian = None

    def _always(
        self, now: float, losses: Sequence[Tensor], norm_before_clipping: Tensor | None
    ) -> dict[str, Tensor | float]:
        duration, self._last_step_at = now - self._last_step_at, now
        values: dict[str, Tensor | float] = {
            "learning_rate": torch.tensor(self._learning_rates(), dtype=torch.float64),
            "time/step": duration,
            "time/elapsed": now - self.started,
        }
        if losses:
            values["loss"] = _sum(losses)
        if self._eval_losses:
            values["eval/loss"] = _sum(self._eval_losses) / len(self._eval_losses)
        if norm_before_clipping is not None:
            # Under sharding this is a DTensor whose whole value is a collective away; all processes are here together.
            values["gradients/total_norm_unclipped"] = whole(norm_before_clipping)
        if self._num_examples and duration > 0:
            values["throughput/examples"] = self._num_examples / duration
        return {self.prefix + name: value for name, value in values.items()}

    def _measure_step(self) -> None:
        probes = [probe for probe in self._probes.values() if probe.name in self._due and probe.needs <= STEP_NEEDS]
        if not probes:
            return
        views: list[StepView] = []
        with self._paying(*(probe.name for probe in probes)):
            views.append(self._step_view(frozenset().union(*(probe.needs for probe in probes))))
        for view, probe in itertools.product(views, probes):
            if Need.PREVIOUS_GRADIENTS in probe.needs and not view.previous_gradients:
                continue  # at the very first step there is none; the probe stays due
            with self._paying(probe.name), torch.no_grad():
                self._looked.add(probe.name)
                coords = {"parameter": list(view.parameters), **getattr(probe, "coords", lambda view: {})(view)}
                self._keep(probe, self._collector.whole(probe, probe.measure(view), coords))

    def _step_view(self, needs: frozenset[Need]) -> StepView:
        optimizer = self._optimizer()
        assert optimizer is not None
        named = self._named_parameters()
        parameters = {name: local(parameter) for name, parameter in named.items()}
        gradients = {name: local(p.grad) for name, p in named.items() if p.grad is not None and not p.grad.is_sparse}
        updates: dict[str, Tensor] = {}
        if Need.UPDATES in needs and self._snapshot:
            # The snapshot becomes the update in place: no third copy of the parameters.
            before = [self._snapshot[name] for name in parameters]
            torch._foreach_sub_(before, list(parameters.values()))
            torch._foreach_neg_(before)
            updates = dict(zip(parameters, before, strict=True))
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        return StepView(
            step=self.step,
            parameters=parameters,
            gradients=gradients,
            previous_gradients=self._previous_gradients,
            updates=updates,
            states={name: optimizer.state.get(parameter, {}) for name, parameter in named.items()},
            groups={name: group_of[id(parameter)] for name, parameter in named.items()},
            num_examples=self._num_examples or None,
            sum_over_shards=summing_over_shards(named),
            gather=lambda name: whole(named[name]),
            full_shapes={name: parameter.shape for name, parameter in named.items()},
        )

    def _plan_next(self) -> None:
        self._schedule.spent(self._costs, self._shared)
        self._shared = 0.0
        # A probe that could not look yet (no forward pass in sight, no earlier gradient) tries at the next step.
        unmet = {name for name in self._due - self._looked if name in self._probes}
        self._due = unmet | set(self._schedule.due(self.step + 1, time.perf_counter()))
        self.step += 1
        self._looked, self._costs, self._measured = set(), {}, {}
        self._eval_losses = []
        self._num_examples = 0
        self._snapshot, self._previous_gradients = {}, {}
        for probe in self._due_probes(Need.PREVIOUS_GRADIENTS):
            with self._paying(probe.name):
                self._previous_gradients = self._previous_gradients or {
                    name: local(parameter.grad).clone()
                    for name, parameter in self._named_parameters().items()
                    if parameter.grad is not None
                }

    # At the model's entrance

    def _meet(self, hint: nn.Module | None) -> None:
        optimizer = self._optimizer()
        assert optimizer is not None
        parameters = _parameters(optimizer)
        found = locate(parameters, hint)
        if found is None:
            return
        self._model = weakref.ref(found.model)
        names = {id(parameter): _clean(name) for name, parameter in found.model.named_parameters()}
        self._names = [names.get(id(p), f"parameter{index}") for index, p in enumerate(parameters)]
        self._writer.event(
            "model",
            f"{type(found.model).__name__} with {sum(p.numel() for p in parameters):,} trained parameters, "
            f"{type(optimizer).__name__}",
            step=self.step,
            data={"optimizer": type(optimizer).__name__, "prefix": self.prefix, "probes": sorted(self._probes)},
        )
        stand_at(found.entrances, self._visitor)

    def _arrive(self, entrance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._is_entrance_known:
            self._is_entrance_known = True
            step_away(self._visitor)
            stand_at([entrance], self._visitor)
        if not (torch.is_grad_enabled() and entrance.training):
            return
        batch = next((leaf for leaf in leaves((args, kwargs)) if leaf.ndim), None)
        self._num_examples += 0 if batch is None else batch.shape[0]
        probes = [p for p in self._probes.values() if p.name in self._due - self._looked and p.needs <= SHADOW_NEEDS]
        inner = entrance
        while (inside := wrapped(inner)) is not None:
            inner = inside
        if probes:
            self._look_inside(inner, args, kwargs, probes)
        for probe in self._due_probes(Need.MODEL):
            if probe.name not in self._looked:
                self._look_at_model(inner, args, kwargs, probe)
        if self._due_probes(Need.CURVATURE):
            self._hessian = HessianWatch(inner, _parameters_of(self._optimizer), args, kwargs)

    def _leave(self, entrance: nn.Module, output: Any) -> None:
        if torch.is_grad_enabled() and entrance.training:
            if self._hessian is not None:
                self._hessian.outputs = differentiable_leaves(output)
            return
        loss = next((leaf for leaf in leaves(output) if leaf.numel() == 1 and leaf.is_floating_point()), None)
        if loss is not None:
            self._eval_losses.append(loss.detach().clone())

    def _look_inside(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], probes: Sequence[Probe]
    ) -> None:
        """One shadow pass for all probes that are due; a probe that fails is dropped, the others see the rest."""
        measured: dict[str, list[tuple[str, Mapping[str, Tensor]]]] = {probe.name: [] for probe in probes}
        inside = 0.0

        def observe(need: Need, view: ModuleOutput | AttentionCall) -> None:
            nonlocal inside
            began = time.perf_counter()
            for probe in probes:
                if need in probe.needs and probe.name in self._probes:
                    with self._paying(probe.name):
                        measured[probe.name].append((view.name, probe.measure(view)))
            inside += time.perf_counter() - began

        names = [probe.name for probe in probes]
        needs = frozenset().union(*(probe.needs for probe in probes))
        began = time.perf_counter()
        with self._paying(*names, is_free=True):
            shadow_pass(model, args, kwargs, needs, observe, self._prefix_of(model))
        shared = (time.perf_counter() - began - inside) / len(probes)
        for probe in probes:
            if probe.name in self._probes:
                self._looked.add(probe.name)
                self._costs[probe.name] = self._costs.get(probe.name, 0.0) + shared
                self._keep(probe, self._collector.places(probe, measured[probe.name]))

    def _look_at_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], probe: Probe) -> None:
        """Show one probe the model itself, with the first rows of the batch."""
        with self._paying(probe.name), undisturbed(model), torch.no_grad():
            self._looked.add(probe.name)
            rows, named = first_rows(args, kwargs)
            view = ModelView(self.step, model, rows, named, self._learning_rates()[0], self._prefix_of(model))
            coords: Mapping[str, Sequence[str]] = getattr(probe, "coords", lambda view: {})(view)
            self._keep(probe, self._collector.whole(probe, probe.measure(view), coords))

    def _prefix_of(self, part: nn.Module) -> str:
        """What stands before the part's module names in the whole model."""
        model = self._model() if self._model is not None else None
        modules = model.named_modules() if model is not None else []
        name = next((_clean(name) for name, module in modules if module is part), "")
        return f"{name}." if name else ""

    def _keep(self, probe: Probe, values: Mapping[str, Tensor]) -> None:
        if probe.name not in self._muted:
            self._measured |= values

    # Keeping the run safe and the books right

    @contextmanager
    def _paying(self, *names: str, is_free: bool = False) -> Iterator[None]:
        """Charge the time inside to the named probes in equal parts, and switch them off if it fails."""
        began = time.perf_counter()
        try:
            yield
        except Exception as error:  # noqa: BLE001  whatever a probe does, the user's run goes on
            for name in names:
                self._switch_off(name, error)
        finally:
            if not is_free:
                share = (time.perf_counter() - began) / max(len(names), 1)
                for name in names:
                    self._costs[name] = self._costs.get(name, 0.0) + share

    def _switch_off(self, name: str, error: Exception) -> None:
        if name not in self._probes or name in self._muted:
            return
        if self._is_distributed:
            # The other processes go on with it, and some measurements are joint acts: take part, but write nothing.
            self._muted.add(name)
        else:
            del self._probes[name]
            self._due.discard(name)
            self._schedule.drop(name)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        self._writer.event("probe-off", f"probe {name!r} was switched off: {reason}", step=self.step)

    def _due_probes(self, need: Need) -> list[Probe]:
        return [p for p in self._probes.values() if need in p.needs and p.name in self._due]

    def _learning_rates(self) -> list[float]:
        optimizer = self._optimizer()
        groups = optimizer.param_groups if optimizer is not None else []
        return [_learning_rate(group.get("lr")) for group in groups]

    def _named_parameters(self) -> dict[str, Tensor]:
        return dict(zip(self._names, _parameters_of(self._optimizer), strict=False))


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _parameters_of(reference: "weakref.ref[Optimizer]") -> list[Tensor]:
    optimizer = reference()
    return _parameters(optimizer) if optimizer is not None else []


def _clean(name: str) -> str:
    """A parameter's name as in the plain model, whatever wraps its blocks."""
    for wrapper in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name


def _learning_rate(lr: Any) -> float:
    """A learning rate as a number; one kept on an accelerator is not waited for."""
    if isinstance(lr, Tensor):
        return float(lr) if lr.device.type == "cpu" else math.nan
    return math.nan if lr is None else float(lr)


def _sum(scalars: Sequence[Tensor]) -> Tensor:
    return torch.stack([local(scalar).reshape(()).float() for scalar in scalars]).sum()
