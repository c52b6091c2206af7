"""Each claim of active-dormant-heads tells a world with the effect from one without; and the study runs."""

from pathlib import Path

import numpy as np
import pytest
from fabricated import assert_tells_apart, worlds_of

from dynascope.findings.extreme_tokens import detect_extreme_tokens
from dynascope.record import Series, open_record
from dynascope.studies import Runs, StudyRecord, load_study, run_study
from dynascope.studies.active_dormant_heads.method import Config
from dynascope.studies.harness.report import report_study

STUDY = load_study("active-dormant-heads")
CLAIMS = {claim.id: claim for claim in STUDY.claims}
STEPS = (0, 1, 10, 50, 100, 200, 300)


def world(folder: Path, seed: int, *, is_effect: bool) -> Runs:
    """One seed's records in a world where the paper is right about everything, or about nothing."""
    runs = {}
    jitter = 0.002 * seed
    for name, arm in STUDY.arms.items():
        has_sink = (arm.attention == "softmax") == is_effect
        grows = (arm.optimizer == "adamw" and arm.attention == "softmax") == is_effect
        with StudyRecord(folder / name, earlier={}, config={}) as record:
            for series in ("sink_score", "value_drain", "sink_logit", "sink_logit_spread"):
                record.declare(Series(f"extreme/{series}", ("layer", "head")))
            record.declare(Series("triggers/sink_score", ("layer", "head")))
            record.declare(Series("extreme/peak_mean", ("block",)))
            for step in STEPS:
                share = step / STEPS[-1]
                drain = 1 - 0.9 * share if has_sink else (0.9 if is_effect else 0.5 + 0.1 * share)
                logit = (0.5 if is_effect else 2.0) * np.log(step + 1e-3)
                peak = 1 + share * (1.0 if grows else 0.01) + jitter
                values = {
                    "extreme/sink_score": 0.05 + 0.9 * share
                    if has_sink
                    else 0.01 + (0.0 if is_effect else 0.3 * share),
                    "triggers/sink_score": 0.01 if is_effect else 0.5,
                    "extreme/value_drain": drain,
                    "extreme/sink_logit": logit,
                    "extreme/sink_logit_spread": 1 + (-0.5 if is_effect else 0.5) * share,
                }
                record.add(step, {series: np.full((1, 1), value + jitter) for series, value in values.items()})
                record.add(
                    step, {"extreme/peak_mean": np.array([1.0, peak, 1.0][: arm.depth] if arm.depth > 1 else [peak])}
                )
            lost = 0.0 if is_effect or arm.attention == "softmax" else 0.3
            record.add(STEPS[-1], {"risk/copy": 0.01 + lost + jitter})
        runs[name] = open_record(folder / name)
    return runs


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
    assert len(list(pictures.glob("*.png"))) == 5
    record = open_record(verdict.run / "deep-adam" / "seed-0")
    assert record["extreme/output_drain"].sizes["layer"] == 3
    assert record["heads/loss_change"].sizes["head"] == 3
    assert np.isfinite(detect_extreme_tokens(record).reinforcement)
    starts = [
        open_record(verdict.run / arm / "seed-0")["extreme/peak_mean"].values[0] for arm in ("deep-adam", "deep-sgd")
    ]
    np.testing.assert_array_equal(*starts)  # arms of one shape start from the same weights


@pytest.mark.parametrize("settings", [{"num_steps": 2}, {"batch_size": 0}, {"context": 4}])
def test_impossible_settings_are_told(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        Config(**settings)
