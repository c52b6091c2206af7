"""Any objectives against each other on the same task: what `dynascope compare` runs."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynascope.studies.comparison.measures import Comparison
from dynascope.studies.comparison.method import TASKS
from dynascope.studies.harness.runner import train_arms
from dynascope.studies.harness.study import Experiment


def experiment(objectives: Sequence[str], task: str) -> Experiment:
    """The objectives as arms. Raises ValueError for a task or an objective that is not there, or is named twice.

    >>> experiment(["grpo", "dapo"], "arithmetic").arms
    {'grpo': 'grpo', 'dapo': 'dapo'}
    """
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r}; there are {', '.join(TASKS)}")
    kind = TASKS[task]
    known = kind.objectives
    for name in objectives:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"task {task} has no objective {name!r}; {hint}")
    if len(set(objectives)) < len(objectives):
        raise ValueError(f"{','.join(objectives)} names an objective twice")
    return Experiment(name=task, arms={name: name for name in objectives}, presets=kind.presets, train=kind.train)


def compare(
    objectives: Sequence[str],
    task: str = "arithmetic",
    *,
    preset: str = "small",
    seeds: int = 3,
    jobs: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    root: str | Path = "runs/compare",
) -> Comparison:
    """Train every objective on equal terms and measure them; what an earlier call with the same settings trained is kept.

    Raises ValueError as `experiment` does, and for an impossible setting.

    >>> compare(["grpo", "dapo"], preset="smoke", seeds=1).measure("dapo", "correct")
    """
    arms = experiment(objectives, task)
    if task == "gsm8k" and not {"data", "model"} <= set(overrides or {}):
        raise ValueError("task gsm8k wants a folder of problems and one of a model: --data DIR --model DIR")
    trained = train_arms(arms, preset=preset, seeds=seeds, jobs=jobs, overrides=overrides, root=root)
    finished = Comparison(
        task, preset, tuple(objectives), trained.runs, trained.folder, trained.failures, trained.wall_seconds
    )
    finished.save()
    return finished


__all__ = ["Comparison", "compare", "experiment"]
