"""Each claim of mesa-optimization tells a world with the effect from one without; and the study runs."""

from pathlib import Path

import numpy as np
import pytest
from fabricated import assert_tells_apart, fabricate, worlds_of

from dynascope.studies import Runs, load_study, run_study
from dynascope.studies.harness.report import report_study
from dynascope.studies.mesa_optimization.method import Config

STUDY = load_study("mesa-optimization")
CLAIMS = {claim.id: claim for claim in STUDY.claims}


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


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[Runs]]:
    return worlds_of(world, tmp_path_factory.mktemp("worlds"), num_seeds=3)


@pytest.mark.parametrize("claim", CLAIMS)
def test_claim_holds_where_the_effect_is_and_fails_where_it_is_not(claim: str, worlds: dict[bool, list[Runs]]) -> None:
    assert_tells_apart(CLAIMS[claim], worlds)


def test_smoke_preset_runs_every_arm_and_draws_every_figure(tmp_path: Path) -> None:
    verdict = run_study(STUDY, preset="smoke", seeds=1, jobs=1, root=tmp_path)
    assert verdict.failures == {}
    pictures = report_study(verdict.run, tmp_path / "pictures")
    assert len(list(pictures.glob("*.png"))) == 3


@pytest.mark.parametrize("settings", [{"length": 2}, {"num_steps": 0}])
def test_impossible_settings_are_told(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        Config(**settings)
