"""Each claim of riskpo tells a world with the effect from one without; and the study runs."""

from pathlib import Path

import numpy as np
import pytest
from every_study import StudyTests

from dynascope.record import Series, open_record
from dynascope.studies import Runs, StudyRecord, Verdict, load_study
from dynascope.studies.riskpo.method import ARMS, Config

STUDY = load_study("riskpo")
# By arm in the world of the paper: entropy, Pass@1, Pass@8.
RIGHT = {"grpo-sequence": (0.2, 0.8, 0.95), "riskpo": (0.3, 0.85, 0.97), "seeking": (0.22, 0.8, 0.95)}
WRONG = {"grpo-sequence": (0.3, 0.8, 0.95), "riskpo": (0.1, 0.4, 0.6), "seeking": (0.2, 0.8, 0.95)}
RIGHT["riskpo-single"] = (0.3, 0.7, 0.9)
WRONG["riskpo-single"] = (0.1, 0.5, 0.7)


def world(folder: Path, seed: int, *, is_effect: bool) -> Runs:
    """One seed's records in a world where the paper is right about everything, or about nothing."""
    steps = np.ones(12)
    for name in ARMS:
        known = RIGHT if is_effect else WRONG
        level, first, eighth = known.get(name, known["riskpo"])
        off = 0.0 if is_effect else 0.2
        scalars = {
            "policy/entropy": (level + 0.001 * seed) * steps,
            "covariance/risk": (0.1 if is_effect else 0.5) * steps + 0.001 * seed,
            "covariance/mean": 0.3 * steps,
            "covariance/upper_tail": 0.2 * steps,
            "covariance/lower_tail": (0.1 if is_effect else -0.2) * steps + 0.001 * seed,
            "greedy/correct": (first + (0.001 * seed if name == "riskpo" else 0)) * np.ones(2),
            "risk/below_low": (0.2 + off + 0.001 * seed) * steps,
            "risk/below_high": (0.8 - off + 0.001 * seed) * steps,
        }
        tries = np.array([first, 0.0, 0.0, eighth]) + 0.001 * seed * (1 if name == "riskpo" else 0)
        with StudyRecord(folder / name, earlier={}, config={}) as record:
            record.declare(Series("test/pass_at_k", ("k",), coords={"k": [1, 2, 4, 8]}))
            for series, values in scalars.items():
                for step, value in enumerate(values):
                    record.add(step, {series: value})
            record.add(12, {"test/pass_at_k": tries})
    return {name: open_record(folder / name) for name in ARMS}


@pytest.mark.filterwarnings("ignore:only .* bundles lie below")
class TestStudy(StudyTests):
    study = STUDY
    world = staticmethod(world)
    num_figures = 4

    def test_tails_are_recorded_of_grpo_too(self, smoke: Verdict) -> None:
        for arm in ARMS:
            tail = open_record(smoke.run / arm / "seed-0")["risk/cvar"].values
            assert len(tail) == 12
            assert (tail >= 0).all()

    def test_the_averse_measure_differs_from_the_mean_by_what_the_tails_ask_for(self, smoke: Verdict) -> None:
        record = open_record(smoke.run / "riskpo" / "seed-0")
        risk, mean, upper, lower = (
            record[f"covariance/{name}"].values for name in ("risk", "mean", "upper_tail", "lower_tail")
        )
        omega = smoke.study.presets["smoke"].omega
        np.testing.assert_allclose(risk - mean, -upper - omega * lower, atol=1e-4)

    def test_greedy_answers_are_told_before_and_after(self, smoke: Verdict) -> None:
        assert open_record(smoke.run / "riskpo" / "seed-0")["greedy/correct"].step.values.tolist() == [0, 12]


def test_the_level_of_the_ratio_matters() -> None:
    """With one optimizer step a rollout every ratio is 1 and two arms would be the same."""
    for preset in STUDY.presets.values():
        assert preset.num_minibatches * preset.num_passes > 1
    sizes = {name: arm.objective(Config(), 0).advantage.bundle_size for name, arm in ARMS.items() if "riskpo" in name}
    assert sizes == {"riskpo": 5, "riskpo-centred": 5, "riskpo-unit": 5, "riskpo-single": 1}


def test_a_test_that_is_too_small_is_told() -> None:
    with pytest.raises(ValueError, match="Pass@8"):
        Config(test_samples=4)
