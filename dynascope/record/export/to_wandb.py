"""Weights & Biases: an offline run, which `wandb sync OUTPUT/wandb/offline-run-*` uploads if you ever want that.

Nothing is sent anywhere. An array becomes one key for each of its numbers (`attention/entropy/layer=0/head=1`). When
several processes wrote the record, each is a run of one group.
"""

from collections.abc import Callable
from pathlib import Path

import wandb
from wandb.sdk import wandb_setup

from dynascope.record.export.rows import WINDOW_BYTES, rows_by_process
from dynascope.record.reader import Record


def write(record: Record, output: Path, progress: Callable[[float], None]) -> None:
    """Log one row a step; ValueError for negative steps, which W&B would drop."""
    for file in record.files():
        windows = file.windows(WINDOW_BYTES)
        if windows and windows[0][0] < 0:
            raise ValueError(f"W&B holds no negative steps, and {file.path} begins at step {windows[0][0]}")
    is_alone = len(record.ranks) == 1
    output.mkdir()
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        save_code=False,
        x_disable_stats=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
    )
    for title, rows in rows_by_process(record, progress):
        run = wandb.init(
            mode="offline",
            dir=str(output),
            project="dynascope",
            name=title,
            group=None if is_alone else record.path.resolve().name,
            config=record.config,
            settings=settings,
            reinit="create_new",
        )
        for row in rows:
            run.log(row.values, step=row.step)
        run.finish()
    # `finish` returns before W&B's own process has written the file; only ending that process waits for it. It is left
    # running where it serves runs of the caller's own: then the file is whole a moment later.
    if wandb_setup.singleton().most_recent_active_run is None:
        wandb.teardown()
