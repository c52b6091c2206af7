"""What the dense recording of the eight laboratories costs: `python benchmarks/dense_recording.py --study NAME`.

Every arm of the preset (small unless told otherwise) as it is, and with nothing looked at or written. Both take turns, forth
and back, in one process; processor time, which other processes of the machine disturb less, and the writer's thread counts.
Each arm's median counts, and the preset is their sum. The bar is 1.05x.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from dynascope.studies.harness import StudyRecord
from dynascope.studies.harness.catalogue import configure, load_study
from dynascope.studies.harness.study import Experiment
from dynascope.studies.harness.unit import Unit, train_unit

STUDIES = (
    "scan-and-snap",
    "icl-linear-regression",
    "active-dormant-heads",
    "mamba-icl-outliers",
    "mesa-optimization",
    "exact-permutations",
    "grokking-lazy-rich",
    "neural-tangent-kernel",
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
def unseen(study: Experiment) -> Iterator[None]:
    """The study's training with no looks and no steps that are recorded."""
    package = f"dynascope.studies.{study.name.replace('-', '_')}."
    with contextlib.ExitStack() as patches:
        for module in [module for name, module in sys.modules.items() if name.startswith(package)]:
            for name, value in list(vars(module).items()):
                if name in ("descend", "train_cells"):
                    patches.enter_context(mock.patch.object(module, name, without_looks(value)))
                if name == "log_steps":
                    patches.enter_context(mock.patch.object(module, name, return_value=[]))
        yield


def recorded(study: Experiment, preset: str, arm: str, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        train_unit(study, preset, {}, Unit(arm, seed, Path(folder) / "run"), [])


def unrecorded(study: Experiment, preset: str, arm: str, seed: int) -> None:
    with unseen(study):
        study.train(configure(study, preset, {}), study.arms[arm], seed, Nothing())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, help="this one alone")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--arms", nargs="*", help="these alone")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--turns", type=int, default=2)
    options = parser.parse_args()
    for name in [options.study] if options.study else STUDIES:
        study = load_study(name)
        total = {unrecorded: 0.0, recorded: 0.0}
        for arm in options.arms or study.arms:
            for way in total:
                way(study, "smoke", arm, 0)
            of_arm = dict.fromkeys(total, 0.0)
            for seed in range(options.seeds):
                seconds: dict[Callable[..., None], list[float]] = {way: [] for way in total}
                for turn in range(options.turns):
                    for way in list(total)[:: -1 if turn % 2 else 1]:
                        began = time.process_time()
                        way(study, options.preset, arm, seed)
                        seconds[way].append(time.process_time() - began)
                for way, measured in seconds.items():
                    of_arm[way] += statistics.median(measured)
            tell(f"{name} {arm}", *of_arm.values())
            total = {way: total[way] + of_arm[way] for way in total}
        tell(f"{name}: the preset", *total.values())


def tell(what: str, bare: float, whole: float) -> None:
    print(f"{what:46} {bare:8.2f} s bare {whole / bare:8.3f}x recorded", flush=True)


if __name__ == "__main__":
    main()
