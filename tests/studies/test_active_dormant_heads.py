"""Each claim of active-dormant-heads tells a world with the effect from one without; and the study runs."""

from pathlib import Path

import numpy as np
import pytest
from every_study import StudyTests

from dynascope.findings.extreme_tokens import detect_extreme_tokens
from dynascope.record import Series, open_record
from dynascope.studies import Runs, StudyRecord, Verdict, load_study
from dynascope.studies.active_dormant_heads.method import Config

STUDY = load_study("active-dormant-heads")
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


class TestStudy(StudyTests):
    study = STUDY
    world = staticmethod(world)
    num_figures = 5

    def test_heads_and_layers_are_recorded_and_arms_of_one_shape_start_alike(self, smoke: Verdict) -> None:
        record = open_record(smoke.run / "deep-adam" / "seed-0")
        assert record["extreme/output_drain"].sizes["layer"] == 3
        assert record["heads/loss_change"].sizes["head"] == 3
        assert np.isfinite(detect_extreme_tokens(record).reinforcement)
        other = open_record(smoke.run / "deep-sgd" / "seed-0")
        np.testing.assert_array_equal(*(one["extreme/peak_mean"].values[0] for one in (record, other)))


@pytest.mark.parametrize("settings", [{"num_steps": 2}, {"batch_size": 0}, {"context": 4}])
def test_impossible_settings_are_told(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        Config(**settings)
