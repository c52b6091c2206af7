"""The watch as a callback of HF `Trainer` (and so of TRL's trainers)."""

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dynascope.watching.attach import Watch


class DynascopeCallback(TrainerCallback):
    """Watches a `Trainer`'s run: probes on its model and optimizer, and every number that it logs.

    `settings` are those of `Watch`; the run directory defaults to `<output_dir>/dynascope`, and the trainer's
    arguments are kept as the record's config.

    >>> trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[DynascopeCallback(run="runs/mine")])
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self._last_step: dict[str, int] = {}
        self.watch: Watch | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach the probes; the optimizer is met at its first step."""
        settings = {"run": f"{args.output_dir}/dynascope", "config": args.to_sanitized_dict(), **self._settings}
        self.watch = Watch(kwargs.get("model"), **settings)
        self.watch.__enter__()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Record the trainer's own numbers; its training loss is kept as `trainer/loss` beside the watch's."""
        if self.watch is None or not state.is_world_process_zero:
            return
        numbers = {_series_name(name): value for name, value in (logs or {}).items() if isinstance(value, (int, float))}
        # The trainer logs several times at one step (its own numbers, an evaluation, the summary): the first counts.
        fresh = {name: value for name, value in numbers.items() if self._last_step.get(name, -1) < state.global_step}
        self._last_step |= dict.fromkeys(fresh, state.global_step)
        self.watch.log(fresh, step=state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the record and look for findings."""
        if self.watch is not None:
            self.watch.close()


def _series_name(name: str) -> str:
    """`eval_loss` -> `val/loss`, `loss` -> `trainer/loss`: grouped as everything else in the record."""
    if name.startswith("eval_"):
        return f"val/{name.removeprefix('eval_')}"
    return name if "/" in name else f"trainer/{name}"
