"""Each claim of hapo tells a world with the effect from one without; and the study runs."""

from pathlib import Path

import numpy as np
import pytest
from every_study import StudyTests
from fabricated import fabricate

from dynascope.studies import Runs, load_study
from dynascope.studies.hapo.method import ARMS, Config

STUDY = load_study("hapo")


def world(folder: Path, seed: int, *, is_effect: bool) -> Runs:
    """One seed's records in a world where the paper is right about everything, or about nothing."""
    arms = {}
    for number, (name, arm) in enumerate(ARMS.items()):
        is_even = arm.averages_tokens == is_effect
        better = (0.1 if is_effect else -0.1) * (name != "dapo") + 0.002 * seed * number
        arms[name] = {
            "policy/entropy": np.full(22, 0.5 + better),
            "test/correct": np.array([0.5, 0.7 + better]),
            "weight/token_mean": np.full(22, 1e-6 if is_even else -0.1 - 0.01 * seed),
            "weight/wrong_over_right": np.full(22, 1 + 1e-5 if is_even else 1.4 + 0.01 * seed),
        }
        if name == "dapo" and not is_effect:
            arms[name]["weight/wrong_over_right"] = np.full(22, 0.9 - 0.01 * seed)
    return fabricate(folder, arms)


class TestStudy(StudyTests):
    study = STUDY
    world = staticmethod(world)
    num_figures = 5


def test_without_the_guard_the_token_average_alone_differs() -> None:
    config = Config()
    free, guarded = (ARMS[name].objective(config) for name in ("token-average-unguarded", "token-average"))
    assert (free.advantage.fallback, guarded.advantage.fallback) == (None, 5.0)
    assert free.having(advantage=guarded.advantage) == guarded


def test_one_optimizer_step_a_rollout_is_told() -> None:
    with pytest.raises(ValueError, match="num_passes=2"):
        Config(num_minibatches=1, num_passes=1)
