"""The bounded past that detectors remember."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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


class Aligned:
    """Several series at the steps at which all of them were told, in whatever pieces they reach a detector.

    Of a step at which only some were told nothing comes once a later one is whole; at most `limit` wait.

    >>> aligned = Aligned(("loss", "accuracy"))
    >>> for step, (loss, accuracy) in aligned.feed(new): ...
    """

    def __init__(self, names: Sequence[str], limit: int = 10_000) -> None:
        self._waiting: dict[str, dict[int, Any]] = {name: {} for name in names}
        self._limit = limit

    def feed(self, new: Mapping[str, xr.DataArray]) -> Iterator[tuple[int, list[Any]]]:
        """(step, the value of each series), steps in order."""
        for name, waiting in self._waiting.items():
            if name in new:
                waiting.update(zip(new[name]["step"].values.tolist(), new[name].values, strict=True))
        whole = sorted(set.intersection(*map(set, self._waiting.values())))
        for step in whole:
            yield step, [waiting.pop(step) for waiting in self._waiting.values()]
        for waiting in self._waiting.values():
            left_behind = [step for step in waiting if whole and step < whole[-1]]
            for step in left_behind + sorted(waiting.keys() - set(left_behind))[: -self._limit]:
                del waiting[step]


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
