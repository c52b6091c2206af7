"""What claims share: means over the end of a series."""

from pathlib import Path

import numpy as np
import pytest
from fabricated import fabricate

from dynascope.studies.harness.measures import last_mean


def test_the_last_looks_alone_count(tmp_path: Path) -> None:
    values = {"entropy": np.array([9.0, 2.0, 1.0]), "by_layer": np.array([[9.0, 9.0], [1.0, 2.0]])}
    record = fabricate(tmp_path, {"arm": values})["arm"]
    assert last_mean(record, "entropy", 2) == 1.5
    assert last_mean(record, "entropy", 10) == 4.0  # a short run has no more
    assert last_mean(record, "by_layer", 1) == 1.5
    with pytest.raises(KeyError):
        last_mean(record, "other", 2)
