"""A record as rows of scalars, a step at a time: the form that experiment trackers take."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

from dynascope.record.model import Series
from dynascope.record.rank_file import RankFile
from dynascope.record.reader import Record

WINDOW_BYTES = 2**20  # as Python numbers in dictionaries these are some 30 MiB


@dataclass(frozen=True)
class Row:
    """All that was measured at one step; `time` is when it was written, in seconds since the epoch."""

    step: int
    time: float
    values: dict[str, float | int | bool]


def tags(series: Series, shape: tuple[int, ...]) -> list[str]:
    """One name for each scalar of a measurement, in the order of its flattened values.

    >>> tags(Series("attention/entropy", ("layer", "head")), (1, 2))
    ['attention/entropy/layer=0/head=0', 'attention/entropy/layer=0/head=1']
    """
    labels = [
        [f"{dim}={label}" for label in series.coords.get(dim, range(size))]
        for dim, size in zip(series.dims, shape, strict=True)
    ]
    return ["/".join([series.name, *place]) for place in product(*labels)]


def rows_by_process(record: Record, progress: Callable[[float], None]) -> Iterator[tuple[str, Iterator[Row]]]:
    """A title and all rows for each process that wrote the record: the run's name, or the rank when there are several."""
    files = record.files()
    for number, file in enumerate(files):

        def report(share: float, num_before: int = number) -> None:
            progress((num_before + share) / len(files))

        yield (file.path.stem if len(files) > 1 else record.path.resolve().name), rows_of(file, report)


def rows_of(file: RankFile, progress: Callable[[float], None]) -> Iterator[Row]:
    """Rows in ascending order of steps; memory holds one window of steps at a time."""
    named = {}
    for name in file.series():
        found = file.find(name)
        if found is not None and found[2] is not None:
            named[name] = tags(found[1], found[2])
    windows = file.windows(WINDOW_BYTES)
    for number, (since, until) in enumerate(windows):
        window: dict[int, Row] = {}
        for name, columns in named.items():
            for time, chunk in file.chunks(name, since, until):
                flat = chunk.values.reshape(len(chunk.steps), -1).tolist()
                for step, values in zip(chunk.steps.tolist(), flat, strict=True):
                    if since <= step <= until:
                        row = window.setdefault(step, Row(step, time, {}))
                        row.values.update(zip(columns, values, strict=True))
        for step in sorted(window):
            yield window[step]
        progress((number + 1) / len(windows))
