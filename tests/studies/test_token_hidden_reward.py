"""Each claim of token-hidden-reward tells a world with the effect from one without; and the study runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from every_study import StudyTests
from fabricated import fabricate

from dynascope.rl.presets import kl_cov, thr_gspo
from dynascope.studies import Runs, load_study
from dynascope.studies.token_hidden_reward.claims import SWEEP
from dynascope.studies.token_hidden_reward.method import ARMS, Config, objective

STUDY = load_study("token-hidden-reward")


def world(folder: Path, seed: int, *, is_effect: bool) -> Runs:
    """One seed's records in a world where the paper is right about everything, or about nothing."""
    arms = {}
    for name, arm in STUDY.arms.items():
        tilt = arm.p * (0.5 if is_effect else -0.5)
        noise = 0.01 * seed * arm.p
        lost = 0.01 * seed + (0.0 if is_effect else 0.2) if arm.beta is not None else 0.0
        arms[name] = {
            "policy/entropy": np.full(12, 0.3 - tilt + noise + 0.001 * seed),
            "greedy/correct": np.array([0.2, 0.5 + tilt + noise - lost]),
            "test/pass_at_k": np.array([[0.2, 0.6], [0.4, 0.8 - tilt + noise]]),
            "thr/displacement": np.full(4, tilt + noise),
        }
    up = np.where(np.arange(60) < (60 if is_effect else 30), 1.0, -1.0)[None]
    for moved in ("head", "all"):
        arms["neutral"] |= {f"mechanism/{moved}_plus": up, f"mechanism/{moved}_minus": -up}
    held = (0.8 if is_effect else 0.3) + 0.001 * seed
    arms["neutral"]["thr/concentration"] = np.array([[0.1, 0.2, 0.3, held, 0.95]])
    return fabricate(folder, arms)


class TestStudy(StudyTests):
    study = STUDY
    world = staticmethod(world)
    num_figures = 7


def test_a_turning_tilt_goes_from_one_side_to_the_other() -> None:
    config = Config(num_steps=5)
    (steering,) = objective(config, ARMS["turning"]).post
    assert [steering.p(step) for step in range(5)] == pytest.approx([-0.2, -0.1, 0.0, 0.1, 0.2])
    (masked,) = objective(config, ARMS["dominant-twice"]).post
    assert (masked.p, masked.mask_small, masked.beta) == (0.0, True, 2.0)
    (holding,) = objective(Config(held=0.4), ARMS["holding"]).post
    assert holding.p.target == 0.4
    assert objective(config, ARMS["gspo-exploit"]) == thr_gspo
    assert [ARMS[arm].p for arm in SWEEP] == [-0.5, -0.2, -0.1, 0.0, 0.1, 0.2, 0.5]
    assert objective(config, ARMS["kl-cov"]) is kl_cov


@pytest.mark.parametrize("settings", [{"num_samples": 1}, {"step_length": 0.0}])
def test_impossible_settings_are_told(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="num_samples must"):
        Config(**settings)
