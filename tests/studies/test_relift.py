"""Each claim of relift tells a world with the effect from one without; its base model errs as it should; and it runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from every_study import StudyTests
from fabricated import fabricate

from dynascope.rl.tasks.arithmetic import Sum
from dynascope.studies import Runs, load_study
from dynascope.studies.relift.method import CarelessArithmetic, CarelessSum, Config, accept, passes

STUDY = load_study("relift")


def world(folder: Path, seed: int, *, is_effect: bool) -> Runs:
    """One seed's records in a world where the paper is right about everything, or about nothing."""
    moves = {"sft", "relift"} if is_effect else {"rl", "relift-lacking"}
    arms = {}
    for arm in STUDY.arms:
        hardest = (0.5 if arm in moves else 0.02) + 0.002 * seed
        is_best = (arm == "relift") == is_effect
        easy_loss = 0.1 if (arm == "sft") == is_effect else 0.01
        arms[arm] = {
            "validation/correct": np.array([0.5, (0.8 if is_best else 0.65) + 0.002 * seed]),
            "difficulty/accuracy": np.array([[0, 0.2, 0.5, 0.9], [hardest, 0.3, 0.6, 0.9 - easy_loss]]),
            "validation/passing": np.array([0.0, hardest]),
            "demonstrations/used": np.array([20.0, 1400.0 if arm == "sft" or not is_effect else 300.0 + seed]),
        }
    return fabricate(folder, arms)


class TestStudy(StudyTests):
    study = STUDY
    world = staticmethod(world)
    num_figures = 4


def test_the_base_models_data_lose_the_last_carry_and_nothing_else() -> None:
    assert CarelessSum(47, 85).completion == "7+5=12,4+8+1=13>32$"
    assert CarelessSum(99, 1).completion == "9+1=10,9+0+1=10>0$"
    for one in (Sum(7, 5), Sum(12, 34)):
        assert CarelessSum(one.first, one.second).completion == one.completion
    problems = CarelessArithmetic((1, 2)).draw(400, torch.Generator().manual_seed(0))
    wrong = [one for one in problems if not accept(one, one.completion)]
    assert wrong == [one for one in problems if passes(one)]
    assert all(one.check(one.completion).is_chain_right for one in wrong)
    assert 0.15 < len(wrong) / len(problems) < 0.35


@pytest.mark.parametrize("settings", [{"num_steps": 0}, {"num_looks": 0}, {"num_steps": 2, "num_looks": 3}])
def test_impossible_settings_are_told(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"at least 1|between 1"):
        Config(**settings)
