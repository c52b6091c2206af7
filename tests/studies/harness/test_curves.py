"""Rows of charts: one a seed, series and step, and nothing where there is nothing."""

from pathlib import Path

import numpy as np
from fabricated import fabricate

from dynascope.studies.harness.curves import curves, mean_lines, tries


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
