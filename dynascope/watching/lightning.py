"""The watch as a callback of Lightning."""

from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from dynascope.watching.attach import Watch


class DynascopeLightning(Callback):
    """Watches a Lightning `Trainer`'s run: probes on the module and its optimizers, and every metric that it logs.

    `settings` are those of `Watch`; the run directory defaults to `<default_root_dir>/dynascope`.

    >>> trainer = lightning.Trainer(callbacks=[DynascopeLightning(run="runs/mine")])
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self.watch: Watch | None = None
        self._last_logged = -1

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Attach the probes; optimizers are met at their first step."""
        settings = {"run": f"{trainer.default_root_dir}/dynascope", **self._settings}
        self.watch = Watch(pl_module, **settings)
        self.watch.__enter__()

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        """Record what the module logged since the last optimizer step."""
        if trainer.global_step > self._last_logged:
            self._last_logged = trainer.global_step
            self._log(trainer.logged_metrics, "train", trainer.global_step)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Record the validation's metrics."""
        if not trainer.sanity_checking:
            self._log(trainer.callback_metrics, "val", trainer.global_step)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Note what ended the training, and close the record."""
        if self.watch is not None:
            self.watch.close(exception)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Close the record and look for findings."""
        if self.watch is not None:
            self.watch.close()

    def _log(self, metrics: Any, stage: str, step: int) -> None:
        if self.watch is None or not metrics:
            return
        named = {name if "/" in name else f"{stage}/{name.removeprefix(f'{stage}_')}": v for name, v in metrics.items()}
        self.watch.log(named, step=step)
