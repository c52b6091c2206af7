"""A chart with few points still shows what matters."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

from dynascope.record.thinning import thinned


def test_short_series_stays_whole():
    assert thinned(np.arange(10.0), 10).tolist() == list(range(10))


@pytest.mark.parametrize("odd", [1e9, -1e9, np.nan, np.inf, -np.inf])
def test_one_odd_value_in_a_million_survives(odd):
    values = np.sin(np.arange(1_000_000))
    values[654_321] = odd
    kept = thinned(values, 100)
    assert 654_321 in kept
    assert len(kept) <= 100


def test_nan_beside_spikes_hides_neither():
    values = np.zeros(1000)
    values[[500, 501, 502]] = [7, np.nan, -7]
    assert {500, 501, 502} <= set(thinned(values, 30).tolist())


def test_arrays_keep_evenly_spaced_steps_and_the_last():
    kept = thinned(np.zeros((1000, 2)), 11)
    assert kept.tolist() == [*range(0, 1000, 100), 999]


@given(
    numpy_strategies.arrays(st.sampled_from(["float32", "float64", "int64", "bool"]), st.integers(1, 300)),
    st.integers(8, 60),
)
def test_bound_and_ends_hold_for_any_values(values, max_points):
    kept = thinned(values, max_points)
    assert len(kept) <= max_points or len(kept) == len(values) <= max_points
    assert kept[0] == 0
    assert kept[-1] == len(values) - 1
    assert (np.diff(kept) > 0).all()
    finite = values[np.isfinite(values)]
    if len(finite):
        assert finite.max() in values[kept]
        assert finite.min() in values[kept]


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="at least 8"):
        thinned(np.zeros(100), 7)
