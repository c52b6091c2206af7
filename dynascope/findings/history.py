"""The bounded past that detectors remember."""

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float, Int


class History:
    """The last `limit` measurements of one scalar series, with their steps.

    >>> history = History(limit=100)
    >>> new = history.extend(series)  # the indices of the new ones within history.values
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.steps: Int[np.ndarray, " kept"] = np.empty(0, dtype=np.int64)
        self.values: Float[np.ndarray, " kept"] = np.empty(0)
        self.count = 0

    def extend(self, series: xr.DataArray) -> range:
        """Append new measurements; what lies further back than `limit` before the first new one is forgotten."""
        added = series.sizes["step"]
        self.steps = np.concatenate([self.steps[-self._limit :], series["step"].values])
        self.values = np.concatenate([self.values[-self._limit :], series.values.astype(np.float64)])
        self.count += added
        return range(len(self.values) - added, len(self.values))

    def rolling_median(self, window: int, lag: int = 0) -> Float[np.ndarray, " kept"]:
        """Median of the `window` finite values before each one (`lag=1` leaves the value itself out); NaN if too few."""
        finite = pd.Series(np.where(np.isfinite(self.values), self.values, np.nan))
        median = finite.rolling(window, min_periods=max(2, window // 2)).median().shift(lag)
        return np.asarray(median, dtype=np.float64)


class Streak:
    """Counts how many looks in a row a condition held, and speaks once when it held often enough.

    >>> streak = Streak(3)
    >>> [streak.fires(holds, step) for step, holds in enumerate([True, True, True, True])]
    [None, None, 0, None]
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._since: int | None = None
        self._count = 0
        self._has_fired = False

    def fires(self, holds: bool | np.bool, step: int) -> int | None:
        """The step at which the streak began, the first time that it is long enough; None otherwise."""
        if not holds:
            self._since, self._count = None, 0
            return None
        self._since = step if self._since is None else self._since
        self._count += 1
        if self._has_fired or self._count < self._length:
            return None
        self._has_fired = True
        return self._since
