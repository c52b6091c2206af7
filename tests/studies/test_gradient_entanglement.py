"""Each claim of gradient-entanglement tells a world with the effect from one without; and the study runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from every_study import StudyTests
from fabricated import fabricate

from dynascope.studies import Runs, load_study
from dynascope.studies.gradient_entanglement.method import Config, sentiment_suffix

STUDY = load_study("gradient-entanglement")
ENDS = {"dpo-0": -0.1, "dpo-8": -2.0}


def world(folder: Path, seed: int, *, is_effect: bool) -> Runs:
    """One seed's records in a world where the paper is right about everything, or about nothing."""
    random, arms = np.random.default_rng(seed), {}
    for name, arm in STUDY.arms.items():
        predicted = np.abs(random.standard_normal((100, 2))) * [1, -1]
        realised = predicted.copy()
        if not is_effect:
            realised[::3] *= -1
        end = ENDS.get(name, 3.0) if is_effect else {"dpo-8": 1.0, "dpo-0": -1.0}.get(name, 0.5)
        rise = arm.suffix if is_effect else -arm.suffix
        arms[name] = {
            "predicted": predicted[None],
            "realised": realised[None],
            "cosine": np.full((1, 100), rise / 10 + 0.001 * seed),
            "log_prob": np.array([[-20.0, -20.0], [-20.0 + end + 0.01 * seed, -25.0]]),
        }
    return fabricate(folder, arms)


class TestStudy(StudyTests):
    study = STUDY
    world = staticmethod(world)
    num_figures = 5


def test_responses_differ_in_the_label_alone() -> None:
    config = Config()
    batch = sentiment_suffix(config, 8, 50, torch.Generator().manual_seed(0))
    chosen, rejected = batch.tokens.chunk(2)
    differs = chosen != rejected
    assert bool(differs[:, config.prompt_length].all())
    assert int(differs.sum()) == 50
    assert 10 < int(chosen[:, config.prompt_length].sum()) < 40  # both labels occur
    assert batch.mask.sum(1).tolist() == [9] * 100


@pytest.mark.parametrize("settings", [{"num_steps": 0}, {"width": 30}])
def test_impossible_settings_are_told(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Config(**settings)
