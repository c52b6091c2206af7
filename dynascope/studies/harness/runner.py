"""Running a study: every arm with every seed, each kept when it is finished, then the verdict."""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import dynascope
from dynascope.record import RecordError
from dynascope.record.locking import acquire
from dynascope.studies.harness import engines
from dynascope.studies.harness.catalogue import configure
from dynascope.studies.harness.study import Experiment, Runs, Study
from dynascope.studies.harness.unit import Unit, train_unit
from dynascope.studies.harness.verdict import Verdict, judge, verdict_as_json


@dataclasses.dataclass(frozen=True)
class Trained:
    """Every arm with every seed: where they lie, their finished records by seed and arm, and what failed and why."""

    folder: Path
    runs: Sequence[Runs]
    failures: Mapping[str, str]
    wall_seconds: float


def run_study(
    study: Study,
    *,
    preset: str = "small",
    seeds: int = 3,
    jobs: int | None = None,
    engine: engines.Engine = "local",
    overrides: Mapping[str, Any] | None = None,
    root: str | Path = "runs/studies",
) -> Verdict:
    """Train every arm as `train_arms` does and judge the claims.

    >>> run_study(load_study("data-diet"), preset="smoke", seeds=1).exit_status()
    0
    """
    trained = train_arms(study, preset=preset, seeds=seeds, jobs=jobs, engine=engine, overrides=overrides, root=root)
    judgements = [judge(claim, trained.runs) for claim in study.claims]
    verdict = Verdict(study, preset, seeds, judgements, trained.folder, trained.wall_seconds, trained.failures)
    written = trained.folder / "verdict.json.new"
    written.write_text(json.dumps(verdict_as_json(verdict), indent=1))
    written.replace(trained.folder / "verdict.json")
    return verdict


def train_arms(
    study: Experiment,
    *,
    preset: str = "small",
    seeds: int = 3,
    jobs: int | None = None,
    engine: engines.Engine = "local",
    overrides: Mapping[str, Any] | None = None,
    root: str | Path = "runs/studies",
) -> Trained:
    """Train every arm with seeds 0 … seeds−1; what an earlier call finished is kept.

    The records lie in `root/<study>/<preset>-<digest>/<arm>/seed-<n>`; the digest is of the settings and the arms, so
    that other settings never mix with these. `jobs` processes run side by side (default: one a core).

    Raises ValueError for an impossible setting, or when another process is running the same study with the same
    settings. An arm that fails does not end the others; `failures` says what happened.

    >>> train_arms(load_study("data-diet"), preset="smoke", seeds=1).failures
    {}
    """
    if seeds < 1:
        raise ValueError(f"--seeds {seeds}: at least one seed is needed")
    jobs = jobs if jobs is not None else os.cpu_count() or 1
    if jobs < 1:
        raise ValueError(f"--jobs {jobs}: at least one process is needed")
    config = configure(study, preset, dict(overrides or {}))
    folder = Path(root) / study.name / f"{preset}-{_digest(study, config)}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = acquire(folder / "study.lock")
    except RecordError as error:
        raise ValueError(str(error).replace("choose another run directory, or ", "")) from None
    started = time.perf_counter()
    try:
        units = {
            (arm, seed): Unit(arm, seed, folder / arm / f"seed-{seed}") for arm in study.arms for seed in range(seeds)
        }
        failures = _train_all(study, preset, dict(overrides or {}), units, min(jobs, len(units)), engine)
    finally:
        os.close(lock)
    runs = [
        {arm: units[arm, seed].open() for arm in study.arms if units[arm, seed].is_finished} for seed in range(seeds)
    ]
    return Trained(folder, runs, failures, time.perf_counter() - started)


def _train_all(
    study: Experiment,
    preset: str,
    overrides: dict[str, Any],
    units: dict[tuple[str, int], Unit],
    jobs: int,
    engine: engines.Engine,
) -> dict[str, str]:
    """Train what is not finished yet, each unit once those that it builds upon are; returns what failed and why."""
    before = {unit: [units[arm, unit.seed] for arm in study.after.get(unit.arm, ())] for unit in units.values()}
    order = TopologicalSorter(before)
    order.prepare()
    failures: dict[str, str] = {}
    if all(unit.is_finished for unit in before):
        return failures
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        engines.start(engine, jobs) as submit,
        Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress,
    ):
        bar = progress.add_task(study.name, total=len(units))
        running = {}
        while order.is_active():
            for unit in order.get_ready():
                missing = [str(one) for one in before[unit] if str(one) in failures]
                if unit.is_finished or missing:
                    if missing:
                        failures[str(unit)] = f"needs {', '.join(missing)}, which failed"
                    order.done(unit)
                    progress.advance(bar)
                else:
                    task = submit(train_unit, study.origin or study, preset, overrides, unit, before[unit])
                    running[task] = unit
            finished, _ = wait(running, return_when=FIRST_COMPLETED) if running else ((), ())
            for task in finished:
                unit = running.pop(task)
                error = task.exception()
                if error is not None:
                    failures[str(unit)] = _told(error)
                order.done(unit)
                progress.advance(bar)
    return failures


def _told(error: BaseException) -> str:
    from concurrent.futures.process import BrokenProcessPool

    if isinstance(error, BrokenProcessPool):
        return "its process was ended from outside, perhaps for want of memory; run again to resume, with fewer --jobs"
    return f"{type(error).__name__}: {error}"


def _digest(study: Experiment, config: Any) -> str:
    """Eight hex digits that change with the settings, the arms and the version; an arm that is but its name adds nothing."""
    arms = {name: repr(arm) for name, arm in study.arms.items() if arm != name}
    content = json.dumps([dynascope.__version__, dataclasses.asdict(config), arms], sort_keys=True, default=repr)
    return hashlib.sha256(content.encode()).hexdigest()[:8]
