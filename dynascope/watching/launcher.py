"""Running a training script under watch without changing it."""

import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from dynascope.watching.attach import Watch


@dataclass(frozen=True)
class Outcome:
    """How a watched script ended: its run directory, the optimizer steps seen, and the status it exits with."""

    run: Path
    num_steps: int
    exit_status: int


def launch(
    script: str,
    args: Sequence[str] = (),
    *,
    is_module: bool = False,
    run: str | Path | None = None,
    budget: float | None = None,
    every: int | None = None,
    probes: Sequence[str] | None = None,
) -> Outcome:
    """Run `script` as `python script args…` would, with every optimizer in it under watch.

    The script finds its own `sys.argv`, `sys.path` and `__main__`. What it raises is shown as Python would show it and
    gives exit status 1; its own exit status is kept. The record is closed in every case. With `is_module`, `script` is
    a module's name, as after `python -m`.

    Raises:
        FileNotFoundError: when there is no such script.
        ValueError: when it is not Python, and for settings that `Watch` refuses.
        RecordError: when the run directory cannot take a record.

    >>> launch("train.py", ["--steps", "100"], run="runs/mine").exit_status
    0
    """
    if not is_module:
        _check(script)
    before = list(sys.argv), list(sys.path)
    sys.argv = [script, *args]
    # As Python does: the script's own folder is where its imports are looked for first.
    sys.path[0] = os.getcwd() if is_module else str(Path(script).resolve().parent)
    watch = Watch(run=run, budget=budget, every=every, probes=probes, config={"script": script, "args": list(args)})
    try:
        status = _run_watched(watch, script, is_module)
    finally:
        sys.argv, sys.path[:] = before
    return Outcome(watch.run, watch.num_steps, status)


def _run_watched(watch: Watch, script: str, is_module: bool) -> int:
    with watch:
        try:
            if is_module:
                runpy.run_module(script, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            watch.close(stop)
            if stop.code is None or isinstance(stop.code, int):
                return stop.code or 0
            print(stop.code, file=sys.stderr)
            return 1
        except KeyboardInterrupt as stop:
            watch.close(stop)
            return 130
        except Exception as error:  # noqa: BLE001  the script's failure is shown as Python shows it, the record closed
            watch.close(error)
            traceback.print_exception(error.with_traceback(_from_script(error, script)))
            return 1
    return 0


def _check(script: str) -> None:
    path = Path(script)
    if not path.exists():
        raise FileNotFoundError(f"there is no script {script}; give the path of a Python file")
    if path.is_dir():
        raise ValueError(f"{script} is a folder; give the path of a Python file in it")
    try:
        compile(path.read_bytes(), script, "exec")
    except (SyntaxError, ValueError, UnicodeDecodeError) as error:
        where = f" (line {error.lineno})" if isinstance(error, SyntaxError) and error.lineno else ""
        raise ValueError(f"{script} is not a Python script: {error.args[0]}{where}") from None


def _from_script(error: Exception, script: str) -> TracebackType | None:
    """The traceback from the script's first line on, without the launcher's own frames."""
    trace = error.__traceback__
    while trace is not None and Path(trace.tb_frame.f_code.co_filename).name != Path(script).name:
        trace = trace.tb_next
    return trace or error.__traceback__
