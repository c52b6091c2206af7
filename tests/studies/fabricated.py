"""Records with series that were made up, to see that a claim's rule tells a world with the effect from one without."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from dynascope.record import Series, open_record
from dynascope.studies import Runs, StudyRecord

Values = Mapping[str, object]


def fabricate(folder: Path, arms: Mapping[str, Values]) -> Runs:
    """One seed's records: each arm's series by name, an array whose first axis is the steps (a number is one step)."""
    runs = {}
    for arm, series in arms.items():
        with StudyRecord(folder / arm, earlier={}, config={}) as record:
            for name, values in series.items():
                steps = np.atleast_1d(np.asarray(values))
                record.declare(Series(name, tuple(f"dim_{axis}" for axis in range(steps.ndim - 1))))
                for step, value in enumerate(steps):
                    record.add(step, {name: value})
        runs[arm] = open_record(folder / arm)
    return runs


World = Callable[..., Runs]
"""(folder, seed, is_effect=…) -> one seed's records in a world where the paper is right about everything, or nothing."""


def worlds_of(world: World, folder: Path, num_seeds: int) -> dict[bool, list[Runs]]:
    """Several seeds of both worlds."""
    return {
        is_effect: [world(folder / f"{is_effect}-{seed}", seed, is_effect=is_effect) for seed in range(num_seeds)]
        for is_effect in (True, False)
    }
