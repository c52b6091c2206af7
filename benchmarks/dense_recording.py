"""What the dense recording of the eight laboratories costs: `python benchmarks/dense_recording.py`.

One arm of each at its small preset, tests at the end cut short: as it is, and with nothing looked at or written. Both take
turns in one process; processor time, which other processes of the machine disturb less, and the writer's thread counts. The
bar is 1.05x.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

from dynascope.studies.harness import StudyRecord
from dynascope.studies.harness.catalogue import configure, load_study
from dynascope.studies.harness.unit import Unit, train_unit


@dataclass(frozen=True)
class Case:
    """An arm of a study, the module that trains it, and settings that cut its tests."""

    study: str
    arm: str
    module: str = "method"
    settings: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case("scan-and-snap", "scan", "synthetic"),
    Case("icl-linear-regression", "heads-2", settings={"num_tests": 100}),
    Case("active-dormant-heads", "softmax"),
    Case("mamba-icl-outliers", "gated", settings={"num_tests": 100}),
    Case("mesa-optimization", "sparse-1"),
    Case("mesa-optimization", "gaussian-from-1"),
    Case("exact-permutations", "trained-ntk"),
    Case("grokking-lazy-rich", "alpha-1"),
    Case("neural-tangent-kernel", "digits-64"),
    Case("neural-tangent-kernel", "circle-1024"),
)


class Nothing(StudyRecord):
    """A record that keeps nothing."""

    def __init__(self) -> None:
        self.earlier = {}

    def declare(self, *told: object, **more: object) -> None: ...

    def add(self, *told: object, **more: object) -> None: ...


def without_looks(train: Callable[..., Any]) -> Callable[..., Any]:
    """The training function as if it had not been asked to look."""
    return lambda *told, looks=(), look=None, **more: train(*told, **more)


@contextlib.contextmanager
def unseen(case: Case) -> Iterator[None]:
    """The study's training with no looks, no watch and no steps that are recorded."""
    module = import_module(f"dynascope.studies.{case.study.replace('-', '_')}.{case.module}")
    loops = {name: without_looks(vars(module)[name]) for name in ("descend", "train_cells") if name in vars(module)}
    nothing = {"log_steps": lambda *told, **more: []} if "log_steps" in vars(module) else {}
    with contextlib.ExitStack() as patches:
        for name, replacement in {**loops, **nothing}.items():
            patches.enter_context(mock.patch.object(module, name, replacement))
        patches.enter_context(mock.patch("dynascope.watch", return_value=contextlib.nullcontext()))
        yield


def recorded(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        train_unit(load_study(case.study), "small", case.settings, Unit(case.arm, 0, Path(folder) / "run"), [])


def unrecorded(case: Case) -> None:
    study = load_study(case.study)
    with unseen(case):
        study.train(configure(study, "small", case.settings), study.arms[case.arm], 0, Nothing())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", choices=sorted({case.study for case in CASES}), help="one study")
    options = parser.parse_args()
    for case in CASES:
        if options.only not in (None, case.study):
            continue
        seconds: dict[Callable[[Case], None], list[float]] = {unrecorded: [], recorded: []}
        for turn in range(options.turns + 1):
            for way, measured in seconds.items():
                began = time.process_time()
                way(case)
                if turn:
                    measured.append(time.process_time() - began)
        without, whole = (statistics.median(measured) for measured in seconds.values())
        print(f"{case.study:24} {case.arm:14} {without:8.2f} s bare {whole / without:8.3f}x recorded", flush=True)


if __name__ == "__main__":
    main()
