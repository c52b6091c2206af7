"""Each claim of mamba-icl-outliers tells a world with the effect from one without; and the study runs."""

from pathlib import Path

import numpy as np
import pytest
from every_study import StudyTests
from fabricated import fabricate

from dynascope.studies import Runs, judge, load_study
from dynascope.studies.mamba_icl_outliers.method import Config

STUDY = load_study("mamba-icl-outliers")


def world(folder: Path, seed: int, *, is_effect: bool) -> Runs:
    """One seed's records in a world where the paper is right about everything, or about nothing."""
    off = 0.001 * seed
    # Errors at 0, 20, 40, 60 and 80 % outliers, gates of clean examples and outliers, and log2 gate by rank.
    robust, fragile = np.array([0, 0, 0.001, 0.002, 0.004]), np.array([0, 0.1, 0.2, 0.8, 0.95])
    errors = {"gated": robust, "linear": fragile, "gated-more-outliers": robust - 0.002, "gated-no-outliers": fragile}
    ratios = {"gated": 8.0, "gated-no-outliers": 1.2}
    if not is_effect:
        errors = {
            "gated": fragile,
            "linear": 0.1 * fragile,
            "gated-more-outliers": fragile + 0.02,
            "gated-no-outliers": robust,
        }
        ratios = {"gated": 1.2, "gated-no-outliers": 8.0}
    errors["gated-two-lrs"] = errors["gated"]
    arms: dict[str, dict[str, object]] = {}
    for arm in STUDY.arms:
        is_hurt = ("gated" in arm) == is_effect
        arms[arm] = {
            **{f"error/{rule}": (errors.get(arm, robust) + off)[None] for rule in ("flip", "target", "random")},
            "mamba/gate": np.array([[[0.01 * (ratios.get(arm, 1.0) + off), 0.01]]]),
            "mamba/decay_slope": np.array([[(-0.5 if is_effect else 0.01) + off]]),
            "accuracy/placement": np.array([[0.99, 0.98, (0.7 if is_hurt else 0.985) + off]]),
            "steps_to_hinge": (5.0 if ("gated" in arm) != is_effect else 50.0) + seed,
            "error/seen": 0.01,
            "error/unseen": (0.08 if is_effect else 0.005) + off,
        }
    return fabricate(folder, arms)


class TestStudy(StudyTests):
    study = STUDY
    world = staticmethod(world)
    num_figures = 4
    told_apart_elsewhere = ("C8-half",)

    def test_a_gate_that_falls_too_fast_is_told(self, tmp_path: Path, worlds: dict[bool, list[Runs]]) -> None:
        """It cannot be flat in the same world."""
        steep = [
            fabricate(tmp_path / f"{at}", {"gated": {"mamba/decay_slope": np.array([[-1.5 + 0.01 * at]])}})
            for at in range(3)
        ]
        claim = next(one for one in STUDY.claims if one.id == "C8-half")
        assert judge(claim, worlds[True]).holds is True
        assert judge(claim, steep).holds is False


@pytest.mark.parametrize(("settings", "told"), [({"gated_steps": 0}, "at least 1"), ({"num_tests": 1}, "at least 2")])
def test_impossible_settings_are_told(settings: dict[str, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Config(**settings)
