"""Attaching probes to a training run: `with dynascope.watch(model, optimizer, run=...)`."""

import copy
import itertools
import os
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from dynascope.probes import Probe, choose_probes
from dynascope.probes.probe import Need
from dynascope.probes.views import ExampleBatch
from dynascope.record import Finding, RecordError, RecordWriter, open_record
from dynascope.watching.collector import Collector
from dynascope.watching.losses import listening
from dynascope.watching.outbox import Outbox
from dynascope.watching.schedule import Budget, Every, Schedule
from dynascope.watching.tracker import Tracker

if TYPE_CHECKING:  # detectors load pandas and xarray, for which a training need not wait
    from dynascope.findings import Follower

DEFAULT_BUDGET, DEFAULT_EVERY = 0.02, 50
MOST_OPTIMIZERS = 8
FIRST_LOOK, LOOKING_SHARE = 30.0, 0.002
"""Seconds until detectors first look at the record, and the share of time that their looking may take."""


class Watch:
    """Probes attached to a training run for as long as the `with` block lasts.

    Args:
        model: The model that is trained; None lets the watch find it from the optimizer.
        optimizer: One optimizer or several; None watches every optimizer that takes a step.
        run: The directory for the record; it must not hold one yet. None makes `runs/<script>-<date>-<time>`. An open
            RecordWriter is written to and left open.
        budget: The share of wall time that probes may take (default 0.02).
        every: Look at each so many steps instead; the default (50) under several processes, which must agree.
        probes: Names of probes (see `dynascope.probes.available`), classes or instances; None means the default set.
        config: Settings of the training to keep beside the record.

    Raises:
        ValueError: for an unknown probe, an impossible budget or interval, or a budget under several processes.
        RecordError: when the run directory cannot take a record.

    The training under watch is bit-identical to the training without it. A probe that fails is switched off, with an
    event in the record; nothing that the watch does raises into the training.

    >>> with dynascope.watch(model, optimizer, run="runs/mine") as w:
    ...     for step, batch in enumerate(loader):
    ...         train_step(batch)
    ...         w.log(accuracy=accuracy)
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        *,
        run: str | Path | RecordWriter | None = None,
        budget: float | None = None,
        every: int | None = None,
        probes: Sequence[str | type[Probe] | Probe] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._model = model
        began = time.perf_counter()
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or [])
        self._only = {id(one) for one in optimizers}
        rank, num_processes = _process()
        if budget is not None and every is not None:
            raise ValueError("give a budget or an interval (every), not both")
        if budget is not None and num_processes > 1:
            raise ValueError(
                "a budget lets each process choose its own steps, but all must look together: use every=50 (--every 50)"
            )
        if num_processes > 1 and run is None:
            raise ValueError("under several processes name the run directory that they share: run=DIR (--run DIR)")
        self._make_schedule = _schedule_maker(budget, every, num_processes)
        self._probes = choose_probes(probes)
        self._make_schedule([])  # an impossible budget or interval is told before anything is written
        self._owns_writer = not isinstance(run, RecordWriter)
        if isinstance(run, RecordWriter):
            self.run, self._writer = run.folder, run
        else:
            self.run = Path(run) if run is not None else _fresh_run()
            self._writer = RecordWriter(self.run, rank=rank, config=config)
        self._optimizers = optimizers
        self._is_distributed = num_processes > 1
        self._process_id = os.getpid()
        self._outbox = Outbox(self._writer)
        self._collector = Collector(self._writer)
        self._trackers: weakref.WeakKeyDictionary[Optimizer, Tracker] = weakref.WeakKeyDictionary()
        self._in_order: list[Tracker] = []
        self._latest: Tracker | None = None
        self._losses: list[Tensor] = []
        self._norm_before_clipping: Tensor | None = None
        self._is_inside_step = False
        self._has_told_full = False
        self._num_example_batches = 0
        self._is_closed = False
        self._open = ExitStack()
        self._closing = threading.Event()
        self._looking: threading.Thread | None = None
        self._follower: "Follower | None" = None
        self._opening_seconds = time.perf_counter() - began

    # The block

    def __enter__(self) -> "Watch":
        self._writer.event("start", f"watching {Path(sys.argv[0]).name or 'a session'}")
        self._open.enter_context(listening(self._guarded(self._on_loss), self._guarded(self._on_clip)))
        for handle in (
            register_optimizer_step_pre_hook(self._guarded(self._before_step)),
            register_optimizer_step_post_hook(self._guarded(self._after_step)),
        ):
            self._open.callback(handle.remove)
        for optimizer in self._optimizers:
            self._guarded(self._tracker_of)(optimizer)
        if self._writer.rank == 0:
            self._looking = threading.Thread(target=self._look_regularly, name="dynascope-findings", daemon=True)
            self._looking.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """End the watch: write what is left, look for findings, and leave the training as it was found.

        `error` is what ended the training, if something did; it is noted, not raised.
        """
        if os.getpid() != self._process_id or self._is_closed:
            return
        self._is_closed = True
        self._open.close()
        for tracker in self._in_order:
            self._guarded(tracker.close)()
        self._guarded(self._outbox.close)()
        if error is not None and not (isinstance(error, SystemExit) and error.code in (None, 0)):
            message = f"{type(error).__name__}: {error}".strip(": ")
            trace = "".join(traceback.format_exception(error))
            self._writer.event("exception", message, step=self.step, data={"traceback": trace})
        self._writer.event("end", f"{self.num_steps} optimizer steps", step=self.step)
        self._closing.set()
        if self._looking is not None:
            self._looking.join()
            self._guarded(self._look_for_findings)()
        if self._owns_writer:
            try:
                self._writer.close()
            except (RecordError, OSError) as problem:
                warnings.warn(f"dynascope: {problem}", stacklevel=2)

    def _look_regularly(self) -> None:
        """Look for findings while the training goes on, so that they come early enough to matter."""
        look, pause = self._guarded(self._look_for_findings), FIRST_LOOK
        while not self._closing.wait(pause):
            started = time.thread_time()
            look()
            pause = max(FIRST_LOOK, (time.thread_time() - started) / LOOKING_SHARE)

    def _look_for_findings(self) -> None:
        from dynascope.findings import Follower, all_detectors

        self._writer.flush()
        self._follower = self._follower or Follower(open_record(self.run), all_detectors)
        for finding in self._follower.new_findings():
            self._writer.finding(finding)

    # What the user says

    @property
    def step(self) -> int | None:
        """The step that the most recent optimizer is in; None before the first."""
        return self._latest.step if self._latest is not None else None

    @property
    def num_steps(self) -> int:
        """Optimizer steps seen so far, over all optimizers."""
        return sum(tracker.step for tracker in self._in_order)

    @property
    def findings(self) -> list[Finding]:
        """What the detectors conclude from the record; complete once the watch is closed."""
        return open_record(self.run).findings

    def log(self, values: Mapping[str, Any] | None = None, /, *, step: int | None = None, **named: Any) -> None:
        """Record quantities of your own: numbers, arrays or tensors, at the current step unless `step` says otherwise.

        Raises RecordError when a quantity already has a value at that step.

        >>> w.log(accuracy=0.93)
        >>> w.log({"val/loss": loss})
        """
        at = step if step is not None else (self.step or 0)
        if os.getpid() == self._process_id:
            self._outbox.put(at, {**(values or {}), **named})

    def event(self, kind: str, message: str) -> None:
        """Note something that happened, at the current step."""
        self._writer.event(kind, message, step=self.step)

    def examples(
        self,
        ids: Int[Tensor, " batch"],
        logits: Float[Tensor, "batch classes"],
        labels: Int[Tensor, " batch"],
    ) -> None:
        """Hand over a batch's examples with their identities, for the probes that follow single examples.

        Their series count these batches as steps, so that gradient accumulation may hand over several a step.

        >>> w.examples(batch["example_id"], logits, batch["label"])
        """
        if os.getpid() != self._process_id:
            return
        batch = ExampleBatch(self._num_example_batches, ids.detach(), logits.detach(), labels.detach())
        self._num_example_batches += 1
        for probe in [probe for probe in self._probes if Need.EXAMPLES in probe.needs]:
            try:
                with torch.no_grad():
                    self._outbox.put(batch.step, self._collector.whole(probe, probe.measure(batch), {}))
            except Exception as error:  # noqa: BLE001  a failing probe never ends a run
                self._probes.remove(probe)
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                self._writer.event("probe-off", f"probe {probe.name!r} was switched off: {reason}", step=self.step)

    # What the training does

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        tracker = self._tracker_of(optimizer)
        if tracker is not None:
            self._is_inside_step = True
            tracker.before_step()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        tracker = self._tracker_of(optimizer)
        if tracker is not None:
            self._is_inside_step = False
            self._latest = tracker
            tracker.after_step(self._losses, self._norm_before_clipping)
            self._losses, self._norm_before_clipping = [], None

    def _on_loss(self, loss: Tensor) -> None:
        # An optimizer that evaluates a closure again and again begins with the loss at the weights of its step.
        if not (self._is_inside_step and self._losses):
            self._losses.append(loss.detach().clone())
        for tracker in self._in_order:
            tracker.on_loss(loss)

    def _on_clip(self, norm: Tensor) -> None:
        self._norm_before_clipping = norm.detach()

    def _tracker_of(self, optimizer: Optimizer) -> Tracker | None:
        tracker = self._trackers.get(optimizer)
        if tracker is None and (not self._only or id(optimizer) in self._only) and not self._is_full():
            tracker = self._follow(optimizer)
        return tracker

    def _follow(self, optimizer: Optimizer) -> Tracker:
        number = len(self._in_order) + 1
        tracker = Tracker(
            optimizer,
            copy.deepcopy(self._probes),
            self._make_schedule([probe.name for probe in self._probes]),
            self._writer,
            model=self._model if _owns(self._model, optimizer) else None,
            prefix="" if number == 1 else f"optimizer{number}/",
            is_distributed=self._is_distributed,
            started=time.perf_counter() if number == 1 else self._in_order[0].started,
            already_spent=self._opening_seconds if number == 1 else 0.0,
        )
        self._trackers[optimizer] = tracker
        self._in_order.append(tracker)
        return tracker

    def _is_full(self) -> bool:
        if len(self._in_order) < MOST_OPTIMIZERS:
            return False
        if not self._has_told_full:
            self._has_told_full = True
            self._writer.event(
                "note", f"more than {MOST_OPTIMIZERS} optimizers took a step; the later ones are not watched"
            )
        return True

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., None]:
        """`function`, which from its first failure on does nothing; the failure is noted and the training goes on."""
        has_failed = False

        def guarded(*args: Any, **kwargs: Any) -> None:
            nonlocal has_failed
            if has_failed or torch.compiler.is_compiling() or os.getpid() != self._process_id:
                return
            try:
                function(*args, **kwargs)
            except Exception as error:  # noqa: BLE001  nothing of the watch may end the user's run
                has_failed = True
                message = f"the watch stopped looking: {type(error).__name__}: {error}".splitlines()[0]
                warnings.warn(f"dynascope: {message}", stacklevel=2)
                self._writer.event("watch-off", message, data={"traceback": traceback.format_exc()})

        return guarded


def watch(
    model: nn.Module | None = None, optimizer: Optimizer | Sequence[Optimizer] | None = None, **settings: Any
) -> Watch:
    """Attach probes to the training inside a `with` block; `settings` are those of `Watch`.

    >>> with dynascope.watch(model, optimizer, run="runs/mine", probes=["attention"]) as w:
    ...     train(model, optimizer)
    """
    return Watch(model, optimizer, **settings)


def _process() -> tuple[int, int]:
    """This process's rank and the number of processes, from torch.distributed or from its launcher's environment."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _schedule_maker(budget: float | None, every: int | None, num_processes: int) -> Callable[[Sequence[str]], Schedule]:
    if every is not None:
        return lambda probes: Every(probes, every)
    if budget is None and num_processes > 1:
        return lambda probes: Every(probes, DEFAULT_EVERY)
    return lambda probes: Budget(probes, DEFAULT_BUDGET if budget is None else budget)


def _fresh_run() -> Path:
    """`runs/<script>-<date>-<time>`, numbered if two start within one second."""
    script = Path(sys.argv[0]).stem if sys.argv and sys.argv[0] not in ("", "-c") else "session"
    base = Path("runs") / f"{script}-{time.strftime('%Y%m%d-%H%M%S')}"
    candidates = itertools.chain([base], (base.with_name(f"{base.name}-{number}") for number in itertools.count(2)))
    return next(path for path in candidates if not path.exists())


def _owns(model: nn.Module | None, optimizer: Optimizer) -> bool:
    if model is None:
        return False
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return any(id(parameter) in trained for parameter in model.parameters())
