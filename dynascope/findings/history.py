"""The bounded past that detectors remember."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dynascope.record import Piece

_ROWS = 1 << 16
"""Windows that are sorted at once."""


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

    def extend(self, series: Piece) -> range:
        """Append new measurements; what lies further back than `limit` before the first new one is forgotten."""
        added = len(series)
        self.steps = np.concatenate([self.steps[-self._limit :], series.steps])
        self.values = np.concatenate([self.values[-self._limit :], series.values.astype(np.float64)])
        self.count += added
        return range(len(self.values) - added, len(self.values))

    def rolling_median(self, window: int, lag: int = 0) -> Float[np.ndarray, " kept"]:
        """Median of the `window` finite values before each one (`lag=1` leaves the value itself out); NaN if too few."""
        return trailing_median(self.values, window, lag)


def trailing_median(values: Float[np.ndarray, " kept"], window: int, lag: int = 0) -> Float[np.ndarray, " kept"]:
    """Median of the finite ones among `window` values, of which the last lies `lag` back; NaN where under half are finite.

    >>> trailing_median(np.array([1.0, 9.0, 2.0, np.nan]), window=2)
    array([nan, 5. , 5.5, nan])
    """
    if not len(values):
        return values
    finite = np.where(np.isfinite(values), values, np.nan)
    known = np.concatenate([np.full(window - 1 + lag, np.nan), finite])[: window - 1 + len(finite)]
    windows = np.lib.stride_tricks.sliding_window_view(known, window)
    parts = [_median(windows[start : start + _ROWS]) for start in range(0, len(windows), _ROWS)]
    return np.concatenate(parts)


def _median(windows: Float[np.ndarray, "count window"]) -> Float[np.ndarray, " count"]:
    rows = np.sort(windows, axis=1)  # what is not a number comes last
    window = rows.shape[1]
    count = window - np.isnan(rows).sum(1)
    places = np.stack([np.maximum(count - 1, 0) // 2, count // 2], 1)
    median = np.take_along_axis(rows, places, 1).mean(1)
    return np.where(count >= max(2, window // 2), median, np.nan)


def log_slope(steps: Int[np.ndarray, " looks"], values: Float[np.ndarray, " looks"], since: float) -> float:
    """Least-squares slope of values against the log of the step, from a step on; NaN for fewer than two looks.

    >>> log_slope(np.array([1, 10, 100]), 0.5 * np.log([1, 10, 100]), since=1)
    0.5
    """
    late = (steps >= max(since, 1)) & np.isfinite(values)
    if late.sum() < 2:
        return float("nan")
    return float(np.polyfit(np.log(steps[late]), values[late], 1)[0])


class Aligned:
    """Several series at the steps at which all of them were told, in whatever pieces they reach a detector.

    Of a step at which only some were told nothing comes once a later one is whole; at most `limit` wait.

    >>> aligned = Aligned(("loss", "accuracy"))
    >>> for step, (loss, accuracy) in aligned.feed(new): ...
    """

    def __init__(self, names: Sequence[str], limit: int = 10_000) -> None:
        self._waiting: dict[str, dict[int, Any]] = {name: {} for name in names}
        self._limit = limit

    def feed(self, new: Mapping[str, Piece]) -> Iterator[tuple[int, list[Any]]]:
        """(step, the value of each series), steps in order."""
        for name, waiting in self._waiting.items():
            if name in new:
                waiting.update(zip(new[name].steps.tolist(), new[name].values, strict=True))
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
