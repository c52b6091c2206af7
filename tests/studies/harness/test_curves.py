"""Rows of charts: one a seed, series and step, and nothing where there is nothing."""

import math
from pathlib import Path

import numpy as np
import pytest
from fabricated import fabricate
from scipy import stats

from dynascope.record import Series, open_record
from dynascope.studies import StudyRecord
from dynascope.studies.harness.curves import Rows, curves, mean_lines, tries, tries_chart, with_intervals


def test_rows_leave_out_what_a_record_does_not_have(tmp_path: Path) -> None:
    full = fabricate(tmp_path / "a", {"base": {"loss": np.array([2.0, 1.0]), "gain": np.array([0.5])}})
    bare = fabricate(tmp_path / "b", {"base": {"loss": np.array([3.0])}, "other": {"loss": np.array([9.0])}})
    rows = curves([full, bare], "base", {"loss": "training", "gain": "what for"}, alpha=1)
    assert [(row["seed"], row["what"], row["step"], row["value"], row["alpha"]) for row in rows] == [
        (0, "training", 0, 2.0, 1),
        (0, "training", 1, 1.0, 1),
        (0, "what for", 0, 0.5, 1),
        (1, "training", 0, 3.0, 1),
    ]
    assert curves([full], "other", {"loss": "training"}) == []
    assert tries([full], {"none": "no such arm"}) == []
    mean_lines([full, bare], {"base": "base", "other": "other"}, "gain", title="Gain", y="gain")


def test_intervals_are_those_over_seeds() -> None:
    rows: Rows = [{"step": 3, "what": "a", "seed": seed, "value": value} for seed, value in enumerate((1.0, 2.0, 4.0))]
    rows += [{"step": 5, "what": "a", "seed": 0, "value": 7.0}, {"step": 5, "what": "b", "seed": 0, "value": math.nan}]
    first, second = with_intervals(rows, "step")
    error = stats.sem([1.0, 2.0, 4.0]) * stats.t.ppf(0.975, 2)
    assert (first["mean"], first["low"], first["high"]) == pytest.approx((7 / 3, 7 / 3 - error, 7 / 3 + error))
    assert second == {"step": 5, "what": "a", "mean": 7.0, "low": 7.0, "high": 7.0}


def test_tries_are_those_of_the_last_test_of_every_seed_that_has_the_arm(tmp_path: Path) -> None:
    seeds = []
    for seed in range(2):
        with StudyRecord(tmp_path / str(seed), earlier={}, config={}) as record:
            record.declare(Series("test/pass_at_k", ("k",), coords={"k": [1, 2]}))
            record.add(0, {"test/pass_at_k": np.array([0.0, 0.1])})
            record.add(5, {"test/pass_at_k": np.array([0.5, 0.75 + seed / 8])})
        seeds.append({"grpo": open_record(tmp_path / str(seed))})
    chart = tries_chart(seeds, {"grpo": "GRPO", "none": "no such arm"}, title="Tries")
    assert [(row["seed"], row["what"], row["k"], row["value"]) for row in chart.data["rows"]] == [
        (0, "GRPO", 1, 0.5),
        (0, "GRPO", 2, 0.75),
        (1, "GRPO", 1, 0.5),
        (1, "GRPO", 2, 0.875),
    ]
