"""`export`: one door to all formats."""

import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Literal, get_args

from dynascope.record.reader import open_record

Format = Literal["parquet", "netcdf", "tensorboard", "wandb", "mlflow"]
_NAMES = {name: "record.nc" if name == "netcdf" else name for name in get_args(Format)}


def export(
    record_path: str | Path,
    to: Format,
    output: str | Path | None = None,
    progress: Callable[[float], None] | None = None,
) -> Path:
    """Write a record in another format, and return where it is.

    `output` is by default `export/<format>` in the run's directory. `progress` is called with the share done, from
    0 to 1. The record is streamed, so memory stays bounded however long the run was. What each format holds, and how
    names are spelt in it, is told in its own file (`to_parquet.py`, …).
    Raises RecordError for a record that cannot be read; ValueError for an unknown format, a missing library, an
    `output` that exists (nothing is written over), or a record that the format cannot hold.

    >>> export("runs/mine", "parquet")  # doctest: +SKIP
    PosixPath('runs/mine/export/parquet')
    """
    if to not in _NAMES:
        raise ValueError(f"unknown format {to!r}; choose one of {', '.join(_NAMES)}")
    record = open_record(record_path)
    try:
        write = import_module(f"dynascope.record.export.to_{to}").write
    except ModuleNotFoundError as error:
        raise ValueError(
            f'export to {to} needs {str(error.name).split(".")[0]}, which is not installed: pip install "dynascope[export]"'
        ) from None
    home = record.path if record.path.is_dir() else record.path.parent
    target = Path(output) if output is not None else home / "export" / _NAMES[to]
    if target.exists():
        raise ValueError(f"{target} exists already; choose another output, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(record, target, progress or _silent)
    except BaseException:
        # A half-written export would look whole to the tool that reads it.
        shutil.rmtree(target, ignore_errors=True) if target.is_dir() else target.unlink(missing_ok=True)
        raise
    return target


def _silent(share: float) -> None:
    pass
