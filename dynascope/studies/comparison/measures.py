"""What a comparison tells of each objective: means over seeds with intervals, and its lead over the first, seed by seed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynascope.record import Record
from dynascope.studies.harness import Runs
from dynascope.studies.harness.unit import Unit
from dynascope.studies.harness.verdict import student_interval

RESULT = "comparison.json"


def at_end(record: Record, name: str) -> float:
    """The last value of a test's series, or the mean of the last tenth of a noisy one; NaN where it was not recorded."""
    if name not in record or not record[name].size:
        return float("nan")
    values = record[name].values
    return float(values[-1] if name.startswith("test/") else np.mean(values[-max(1, len(values) // 10) :]))


def most_tried(record: Record) -> float:
    """pass@k at the end, at the largest k."""
    return float(record["test/pass_at_k"].values[-1, -1])


def clipped(record: Record) -> float:
    """Share of tokens whose gradient the clip took, on either side."""
    return at_end(record, "policy/clip/low") + at_end(record, "policy/clip/high")


def demonstrations(record: Record) -> float:
    """How many were used; NaN for an objective that has none."""
    used = "demonstrations/used"
    return float(record[used].values[-1]) if used in record else float("nan")


MEASURES = {
    "reward": lambda record: at_end(record, "rollout/reward"),
    "correct": lambda record: at_end(record, "test/correct"),
    "pass_at_most": most_tried,
    "chain": lambda record: at_end(record, "test/chain"),
    "length": lambda record: at_end(record, "test/length"),
    "kl_start": lambda record: at_end(record, "test/kl_start"),
    "entropy": lambda record: at_end(record, "policy/entropy"),
    "clipped": clipped,
    "demonstrations": demonstrations,
    "tokens_per_second": lambda record: at_end(record, "rollout/tokens_per_second"),
}
"""Each from the record of one seed, NaN where the task has no such thing."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; the 95 % interval (Student's t) needs two."""

    mean: float
    ci95: tuple[float, float] | None
    num_samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Estimate | None":
        """None where there is no sample that is a number."""
        known = [one for one in samples if np.isfinite(one)]
        if not known:
            return None
        return cls(float(np.mean(known)), student_interval(known) if len(known) > 1 else None, len(known))


@dataclass(frozen=True)
class Comparison:
    """A finished comparison."""

    task: str
    preset: str
    objectives: tuple[str, ...]
    runs: Sequence[Runs]
    folder: Path
    failures: Mapping[str, str]
    wall_seconds: float

    def measure(self, objective: str, measure: str) -> Estimate | None:
        """One number of an objective."""
        return Estimate.of([MEASURES[measure](records[objective]) for records in self.runs if objective in records])

    def lead(self, objective: str) -> Estimate | None:
        """By how much more of its answers are right at the end than with the first objective, paired by seeds."""
        first = self.objectives[0]
        pairs = [(records[objective], records[first]) for records in self.runs if {objective, first} <= set(records)]
        return Estimate.of([at_end(one, "test/correct") - at_end(other, "test/correct") for one, other in pairs])

    @property
    def start(self) -> float:
        """Share of right answers before training, which is the same for all objectives; a mean over seeds."""
        return float(np.mean([one["test/correct"].values[0] for records in self.runs for one in records.values()]))

    def as_json(self) -> dict[str, Any]:
        """The comparison as plain values."""
        return {
            "task": self.task,
            "preset": self.preset,
            "seeds": len(self.runs),
            "start": self.start if any(self.runs) else None,
            "objectives": [
                {
                    "name": name,
                    "measures": {measure: _plain(self.measure(name, measure)) for measure in MEASURES},
                    "lead": None if name == self.objectives[0] else _plain(self.lead(name)),
                }
                for name in self.objectives
            ],
            "failures": dict(self.failures),
            "run": str(self.folder),
            "wall_seconds": round(self.wall_seconds, 1),
        }

    def save(self) -> None:
        """Leave the result in the folder, whole or not at all, for `Comparison.load`."""
        written = self.folder / f"{RESULT}.new"
        written.write_text(json.dumps(self.as_json(), indent=1))
        written.replace(self.folder / RESULT)

    @classmethod
    def load(cls, folder: str | Path) -> "Comparison":
        """The last comparison that was finished in a folder."""
        folder = Path(folder)
        told = json.loads((folder / RESULT).read_text())
        names = tuple(one["name"] for one in told["objectives"])
        units = [[Unit(name, seed, folder / name / f"seed-{seed}") for name in names] for seed in range(told["seeds"])]
        runs = [{unit.arm: unit.open() for unit in row if unit.is_finished} for row in units]
        return cls(told["task"], told["preset"], names, runs, folder, told["failures"], told["wall_seconds"])


def _plain(estimate: Estimate | None) -> dict[str, Any] | None:
    if estimate is None:
        return None
    return {"mean": estimate.mean, "ci95": estimate.ci95 and list(estimate.ci95), "samples": estimate.num_samples}
