"""Fewer points for a chart, keeping what one looks for in it: spikes, dips and values that are not finite."""

import numpy as np
from jaxtyping import Int64, Shaped

MIN_POINTS = 8


def thinned(values: Shaped[np.ndarray, "steps ..."], max_points: int) -> Int64[np.ndarray, " kept"]:
    """Positions along the first axis to keep: ascending, at most `max_points`, with the first and the last.

    A series of scalars is cut into buckets of consecutive steps, and of each bucket the least and the
    greatest finite value are kept, and the first that is not finite. Of arrays every k-th is kept. Raises
    ValueError when `max_points` is less than 8.

    >>> thinned(np.array([0.0] * 500 + [9.0] + [0.0] * 499), 10)  # 500 is among them
    """
    if max_points < MIN_POINTS:
        raise ValueError(f"max_points is {max_points}; ask for at least {MIN_POINTS}")
    count = len(values)
    if count <= max_points:
        return np.arange(count)
    if values.ndim > 1:
        return _with_ends(np.arange(0, count, -(-count // (max_points - 1))), count)
    return _with_ends(_extremes(values, max_points - 2), count)


def _extremes(values: Shaped[np.ndarray, " steps"], max_points: int) -> Int64[np.ndarray, " kept"]:
    finite = np.isfinite(values)
    width = -(-len(values) // (max_points // (2 if finite.all() else 3)))
    num_buckets = -(-len(values) // width)
    padding = num_buckets * width - len(values)

    def bucketed(content: Shaped[np.ndarray, " steps"], fill: float) -> Shaped[np.ndarray, "buckets width"]:
        return np.pad(content, (0, padding), constant_values=fill).reshape(num_buckets, width)

    as_float = values.astype(np.float64, copy=False)
    start = np.arange(num_buckets) * width
    kept = [
        start + bucketed(np.where(finite, as_float, np.inf), np.inf).argmin(axis=1),
        start + bucketed(np.where(finite, as_float, -np.inf), -np.inf).argmax(axis=1),
    ]
    if not finite.all():
        kept.append(start + bucketed(~finite, 0.0).argmax(axis=1))
    return np.concatenate(kept)


def _with_ends(kept: Int64[np.ndarray, " inner"], count: int) -> Int64[np.ndarray, " kept"]:
    return np.unique(np.concatenate([kept, [0, count - 1]]))
