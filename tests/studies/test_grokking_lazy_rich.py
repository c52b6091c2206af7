"""Each claim of grokking-lazy-rich tells a world with the effect from one without; and the study runs."""

from pathlib import Path

import numpy as np
import pytest
from every_study import StudyTests
from fabricated import fabricate

from dynascope.studies import Runs, judge, load_study
from dynascope.studies.grokking_lazy_rich.claims import at
from dynascope.studies.grokking_lazy_rich.method import ALPHAS, Arm, Config, committee
from dynascope.studies.harness import StudyRecord

STUDY = load_study("grokking-lazy-rich")
CLAIMS = {claim.id: claim for claim in STUDY.claims}
NUM_LOOKS = 300


def curve(fitted: float, learnt: float, final: float = 0.01) -> dict[str, object]:
    """Losses that fall below the levels of the study at two steps."""
    steps = np.arange(NUM_LOOKS)
    return {
        "train/loss": np.where(steps < fitted, 0.7, 0.01),
        "test/loss": np.where(steps < learnt, 0.75, min(final, 0.75)),
    }


def world(folder: Path, seed: int, *, is_effect: bool) -> Runs:
    """One seed's records in a world where the paper is right about everything, or about nothing."""
    jitter = seed * 0.01
    arms: dict[str, dict[str, object]] = {}
    for place, alpha in enumerate(ALPHAS):
        learnt = (40, 120, 200, 280)[place] if is_effect else 40
        final = 0.02 if place < 3 else (0.5 if is_effect else 0.02)
        grown = np.linspace(0.1, 0.1 + (0.6 / 2**place if is_effect else 0.05 * (place + 1)) + 0.001 * seed, NUM_LOOKS)
        linear = np.full(NUM_LOOKS, 0.1)
        linear[20:40] += 0.2 + jitter if is_effect else 0.001 * seed
        arms[at(alpha)] = {
            **curve(20, learnt + seed, final),
            "lazy/plateau": 0.5 + jitter,
            "kernel/alignment": grown,
            "test/linear": linear,
            "test/misalignment": np.linspace(1, (0.1 if is_effect else 0.9) + jitter, NUM_LOOKS),
        }
    arms["many-examples"] = curve(20, 22 + seed if is_effect else 150 + seed)
    arms["few-examples"] = curve(20, NUM_LOOKS if is_effect else 30)
    arms["few-examples"]["test/loss"] = np.asarray(arms["few-examples"]["test/loss"]) + 0.001 * seed
    arms["eps-0.05"] = curve(20, 290 if is_effect else 22 + seed, 0.02 + jitter if is_effect else 0.05 + jitter)
    arms["eps-1"] = curve(20, 100, 0.3 if is_effect else 0.05)
    arms["eps-0.05-alpha-5"] = curve(20, 250 + seed if is_effect else 30 + seed)
    arms["eps-1-alpha-0.25"] = curve(20, 60)
    theory = np.linspace(0.9, 0.7, 30)
    arms["mean-field"] = {
        "mean_field/test": theory * (1 + (0.001 if is_effect else 0.1) * (1 + jitter)),
        "simulated/test": theory,
    }
    for task, low, high in (("digits", 0.1, 2.0), ("modular", 0.3, 10.0)):
        arms[f"{task}-{at(low)}"] = curve(20, 40 if is_effect else 100)
        arms[f"{task}-{at(high)}"] = curve(20, (200 if is_effect else 30) + seed)
    return fabricate(folder, arms)


class TestStudy(StudyTests):
    study = STUDY
    world = staticmethod(world)
    num_figures = 5


def test_two_tasks_that_are_never_learnt_say_nothing_of_the_gap(tmp_path: Path) -> None:
    never = {**curve(20, NUM_LOOKS), "test/loss": np.full(NUM_LOOKS, 0.5)}
    runs = fabricate(tmp_path, {f"digits-{at(0.1)}": never, f"digits-{at(2.0)}": never})
    judged = judge(CLAIMS["C7-digits"], [runs, runs, runs])
    assert judged.holds is None
    assert judged.measured is None


def test_impossible_settings_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Config(num_steps=0)
    with pytest.raises(ValueError, match="leaves nothing to learn"):
        Config(modulus=2)
    with (
        StudyRecord(tmp_path / "run", earlier={}, config={}) as record,
        pytest.raises(ValueError, match="beyond the stable"),
    ):
        committee(Config(num_steps=5), Arm(eps=30.0), 0, record)
