"""Each claim of kdrl tells a world with the effect from one without; and the study runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from every_study import StudyTests
from fabricated import fabricate

from dynascope.rl.presets import grpo, kdrl
from dynascope.studies import Runs, load_study
from dynascope.studies.kdrl.method import Arm, Config, objective

STUDY = load_study("kdrl")

RIGHT = {
    "grpo": 0.4,
    "kd-k1": 0.2,
    "kd-k2": 0.4,
    "kdrl": 0.5,
    "kdrl-annealed": 0.55,
    "weak-grpo": 0.1,
    "weak-kdrl": 0.4,
    "sft": 0.3,
    "kdrl-k3": 0.45,
    "kdrl-top": 0.3,
    "kdrl-response": 0.5,
    "kdrl-group": 0.52,
}
NOT = {
    "grpo": 0.5,
    "kd-k1": 0.5,
    "kd-k2": 0.2,
    "kdrl": 0.4,
    "kdrl-annealed": 0.3,
    "weak-grpo": 0.4,
    "weak-kdrl": 0.1,
    "sft": 0.5,
    "kdrl-k3": 0.5,
    "kdrl-top": 0.5,
    "kdrl-response": 0.3,
    "kdrl-group": 0.3,
}


def world(folder: Path, seed: int, *, is_effect: bool) -> Runs:
    """One seed's records in a world where the paper is right about everything, or about nothing."""
    end = RIGHT if is_effect else NOT
    return fabricate(
        folder,
        {
            arm: {
                "test/correct": np.array([0.2, value + 0.001 * seed * (1 + place % 3)]),
                "test/length": np.array([20.0, (18.0 if (arm == "kdrl") == is_effect else 20.0) + 0.01 * seed * place]),
            }
            for place, (arm, value) in enumerate(end.items())
        },
    )


class TestStudy(StudyTests):
    study = STUDY
    world = staticmethod(world)
    num_figures = 4


def test_arms_are_the_presets_with_the_studys_coefficient() -> None:
    config = Config(beta=2e-3, num_steps=40)
    term = kdrl.kl[0]
    assert objective(config, Arm()) == grpo.having(aggregation="token-mean")
    assert objective(config, Arm(kind="k2")).kl[0].weight(0) == term.weight(0)
    annealed = objective(config, Arm(kind="k2", is_annealed=True)).kl[0]
    assert objective(config, Arm(kind="full", top=4)).kl[0].top == 4
    assert [annealed.weight(step) for step in (0, 11, 40)] == pytest.approx([5e-3, 1e-3, 1e-3])


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"clamp": -1.0}])
def test_impossible_settings_are_told(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="beta and clamp must be positive"):
        Config(**settings)
