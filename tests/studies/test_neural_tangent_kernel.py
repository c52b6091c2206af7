"""Each claim of neural-tangent-kernel tells a world with the effect from one without; and the study runs."""

from pathlib import Path

import numpy as np
import pytest
from every_study import StudyTests
from fabricated import fabricate

from dynascope.studies import Runs, load_study
from dynascope.studies.neural_tangent_kernel.method import NUM_MODES, WIDTHS, Config

STUDY = load_study("neural-tangent-kernel")
STEPS = np.arange(400)


def decays(rates: np.ndarray) -> np.ndarray:
    """(steps, modes)"""
    return np.exp(-np.outer(STEPS, rates))


def world(folder: Path, seed: int, *, is_effect: bool) -> Runs:
    """One seed's records in a world where the paper is right about everything, or about nothing."""
    generator = np.random.default_rng(seed)
    jitter = 1 + 0.02 * generator.standard_normal()
    arms: dict[str, dict[str, object]] = {}
    for width in WIDTHS:
        falls = width**-0.5 if is_effect else 0.3
        arms[f"circle-{width}"] = {"limit/error": 2 * falls * jitter, "kernel/distance": np.array([0, falls * jitter])}
    rates = 0.2 / np.arange(1, NUM_MODES + 1)
    predicted = np.log(2) / rates
    for task in ("digits", "direction"):
        for width in (64, 4096):
            measured = rates if is_effect else rates[::-1]
            is_far = is_effect and width == 64
            beside = (0.4 if is_far else 0.05) * jitter
            arms[f"{task}-{width}"] = {
                "modes/error": decays(measured * jitter),
                "modes/predicted_half_life": predicted[None],
                "modes/beside": np.array([0, beside]),
            }
    mean, std = np.zeros(32), np.ones(32)
    outputs = generator.standard_normal((50, 32)) * (1 if is_effect else 2.5) + (0 if is_effect else 4)
    arms["ensemble"] = {"ensemble/outputs": outputs[None], "predicted/mean": mean[None], "predicted/std": std[None]}
    arms["definiteness"] = {
        "smallest/relu": 0.01 if is_effect else -1e-9,
        "smallest/erf": 0.01 * jitter if is_effect else 1e-9,
        "rank/identity": 11 if is_effect else 50,
    }
    return fabricate(folder, arms)


class TestStudy(StudyTests):
    study = STUDY
    world = staticmethod(world)
    num_figures = 4
    num_seeds = 4


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"num_steps": 0}, "at least 1"), ({"top_rate": 2.0}, "between 0 and 2"), ({"narrower": 65}, "smallest width")],
)
def test_impossible_settings_are_told(settings: dict[str, float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Config(**settings)  # type: ignore[arg-type]
