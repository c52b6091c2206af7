"""One arm with one seed: trained into a run directory of its own, and marked when it is finished."""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from dynascope.record import Record, open_record
from dynascope.studies.harness.catalogue import configure, load_study
from dynascope.studies.harness.study import Experiment, StudyRecord

FINISHED = "finished.json"


@dataclasses.dataclass(frozen=True)
class Unit:
    """An arm and a seed, and where their record lies."""

    arm: str
    seed: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.arm} seed {self.seed}"

    @property
    def is_finished(self) -> bool:
        """Whether its training came to its end."""
        return (self.folder / FINISHED).is_file()

    def open(self) -> Record:
        """Its record."""
        return open_record(self.folder)


def train_unit(
    study: Experiment | str, preset: str, overrides: dict[str, Any], unit: Unit, earlier: list[Unit]
) -> None:
    """Train one unit from its beginning; what a killed attempt left in its folder is dropped.

    A study is loaded by its origin in a process of its own, since functions do not travel between processes.
    """
    study = load_study(study) if isinstance(study, str) else study
    config, arm = configure(study, preset, overrides), study.arms[unit.arm]
    shutil.rmtree(unit.folder, ignore_errors=True)
    torch.manual_seed(unit.seed)
    started = time.perf_counter()
    settings = {"study": study.name, "preset": preset, "arm": unit.arm, "seed": unit.seed}
    settings |= {"arm value": repr(arm), "settings": dataclasses.asdict(config)}
    with StudyRecord(unit.folder, earlier={one.arm: one.open() for one in earlier}, config=settings) as record:
        study.train(config, arm, unit.seed, record)
    done = unit.folder / f"{FINISHED}.new"
    done.write_text(json.dumps({"wall_seconds": round(time.perf_counter() - started, 3)}))
    done.replace(unit.folder / FINISHED)
