"""Each claim of mesa-optimization tells a world with the effect from one without; and the study runs."""

from pathlib import Path

import numpy as np
import pytest
from every_study import StudyTests
from fabricated import fabricate

from dynascope.studies import Runs, load_study
from dynascope.studies.mesa_optimization.method import Config

STUDY = load_study("mesa-optimization")


def world(folder: Path, seed: int, *, is_effect: bool) -> Runs:
    """One seed's records in a world where the paper is right about everything, or about nothing."""
    arms = {}
    for number, (name, arm) in enumerate(STUDY.arms.items()):
        off = 1e-4 * (1 + seed) if is_effect else 0.2 + 0.1 * (number % 3) + 0.001 * seed
        ratio = (1.0 if arm.law == "sparse" else 0.2) + (1e-4 * seed if is_effect else 0.3 + 0.01 * seed)
        is_broken = (name == "ones") == is_effect
        arms[name] = {
            "target": 0.25,
            "mesa/a": np.array([0.1, 0.5]),
            "mesa/b": np.array([0.1, 0.5 * (1 + off)]),
            "mesa/off_diagonal": np.array([[0, 0], [0.1, (0.2 if is_broken else 0.01) + 0.001 * seed]]),
            "capability/mean_ratio": np.array([[0.5, ratio]]),
        }
    return fabricate(folder, arms)


class TestStudy(StudyTests):
    study = STUDY
    world = staticmethod(world)
    num_figures = 3


@pytest.mark.parametrize("settings", [{"length": 2}, {"num_steps": 0}])
def test_impossible_settings_are_told(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        Config(**settings)
