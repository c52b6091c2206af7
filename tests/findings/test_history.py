"""The bounded past of detectors, against pandas and by hand."""

import numpy as np
import pandas as pd
import pytest

from dynascope.findings import history
from dynascope.findings.history import log_slope, trailing_median


@pytest.mark.parametrize("lag", [0, 1, 3, 40])
@pytest.mark.parametrize("window", [1, 2, 7, 48])
def test_trailing_median_is_that_of_pandas(window: int, lag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_ROWS", 16)
    random = np.random.default_rng(0)
    values = random.normal(size=50)
    values[random.integers(0, 50, 12)] = np.nan
    values[[7, 8]] = np.inf, -np.inf
    known = pd.Series(np.where(np.isfinite(values), values, np.nan))
    expected = known.rolling(window, min_periods=min(window, max(2, window // 2))).median().shift(lag)
    if window == 1:  # one value is never half of two
        expected[:] = np.nan
    np.testing.assert_allclose(trailing_median(values, window, lag), expected)


def test_trailing_median_by_hand() -> None:
    np.testing.assert_equal(trailing_median(np.array([1.0, 9.0, 2.0, np.nan]), window=2), [np.nan, 5.0, 5.5, np.nan])
    assert len(trailing_median(np.empty(0), window=5)) == 0


def test_slopes_in_log_step_by_hand() -> None:
    steps = np.array([0, 1, 10, 100])
    values = np.array([9.0, 9.0, 2 * np.log(10), 2 * np.log(100)])
    assert log_slope(steps, values, since=5.0) == pytest.approx(2)
    values[3] = np.nan
    assert np.isnan(log_slope(steps, values, since=5.0))
