"""Each claim of hapo tells a world with the effect from one without; and the study runs."""

from pathlib import Path

import numpy as np
import pytest
from fabricated import assert_tells_apart, fabricate, worlds_of

from dynascope.studies import Runs, load_study, run_study
from dynascope.studies.hapo.method import ARMS, Config
from dynascope.studies.harness.report import report_study

STUDY = load_study("hapo")
CLAIMS = {claim.id: claim for claim in STUDY.claims}


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


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[Runs]]:
    return worlds_of(world, tmp_path_factory.mktemp("worlds"), num_seeds=3)


@pytest.mark.parametrize("claim", CLAIMS)
def test_claim_holds_where_the_effect_is_and_fails_where_it_is_not(claim: str, worlds: dict[bool, list[Runs]]) -> None:
    assert_tells_apart(CLAIMS[claim], worlds)


def test_smoke_preset_runs_every_arm_and_draws_every_figure(tmp_path: Path) -> None:
    verdict = run_study(STUDY, preset="smoke", seeds=1, jobs=1, root=tmp_path / "runs" / "studies")
    assert verdict.failures == {}
    pictures = report_study(verdict.run, tmp_path / "pictures")
    assert len(list(pictures.glob("*.png"))) == 5


def test_without_the_guard_the_token_average_alone_differs() -> None:
    config = Config()
    free, guarded = (ARMS[name].objective(config) for name in ("token-average-unguarded", "token-average"))
    assert (free.advantage.fallback, guarded.advantage.fallback) == (None, 5.0)
    assert free.having(advantage=guarded.advantage) == guarded


def test_one_optimizer_step_a_rollout_is_told() -> None:
    with pytest.raises(ValueError, match="num_passes=2"):
        Config(num_minibatches=1, num_passes=1)
