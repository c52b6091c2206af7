"""Rows of charts: one a seed, series and step, and nothing where there is nothing."""

import math
from pathlib import Path

import numpy as np
import pytest
from fabricated import fabricate
from scipy import stats

from dynascope.studies.harness.curves import Rows, curves, mean_lines, tries, with_intervals


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
