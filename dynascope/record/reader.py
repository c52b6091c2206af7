"""Reading a record: labelled arrays over steps, while it is being written and after."""

import difflib
from collections.abc import Iterator
from functools import reduce
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from dynascope.record.chunk import Chunk
from dynascope.record.locking import is_held
from dynascope.record.model import Event, Finding, RecordError, Series
from dynascope.record.piece import Piece
from dynascope.record.rank_file import RankFile
from dynascope.record.run_file import read_run_file
from dynascope.record.schema import lock_path
from dynascope.record.thinning import MIN_POINTS, thinned

if TYPE_CHECKING:  # loading xarray takes a third of a second, which a training script need not pay
    import xarray


def open_record(path: str | Path) -> "Record":
    """Open the record in a run directory, or one process's `.sqlite` file of it.

    Raises RecordError when there is none, or it is damaged, foreign, or of a newer version.

    >>> open_record("runs/mine")["loss"].plot()  # doctest: +SKIP
    """
    record = Record(Path(path))
    for file in record.files():
        file.check()
    return record


class Record:
    """A record, read-only; each question is answered from the files as they are, so it follows a live run.

    Holds no file open between questions, and may be used from several threads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def ranks(self) -> list[int]:
        """The ranks that have written so far."""
        return [file.rank for file in self.files()]

    @property
    def config(self) -> dict[str, Any]:
        """What run.json says: how the run was started; the user's own configuration is under "config"."""
        return read_run_file(self.path if self.path.is_dir() else self.path.parent)

    @property
    def events(self) -> list[Event]:
        """What happened, of all ranks, in the order of the wall clock."""
        return sorted(chain.from_iterable(file.events() for file in self.files()), key=lambda event: event.time)

    @property
    def findings(self) -> list[Finding]:
        """What detectors concluded, in the order in which they did."""
        return [finding for file in self.files() for finding in file.findings()]

    def files(self) -> list[RankFile]:
        """The files of all processes that have written so far; RecordError when there is none."""
        if self.path.is_file():
            return [RankFile(self.path)]
        files = [RankFile(path) for path in sorted(self.path.glob("rank-*.sqlite"))]
        if not files:
            reason = "holds no record" if self.path.is_dir() else "does not exist"
            raise RecordError(f"{self.path} {reason}; give the directory of a run, or its rank-*.sqlite file")
        return files

    def is_live(self) -> bool:
        """Whether a process is writing it."""
        return any(is_held(lock_path(file.path)) for file in self.files())

    def names(self) -> list[str]:
        """Names of all series, in the order of their declaration."""
        return list(dict.fromkeys(name for file in self.files() for name in file.series()))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and any(file.find(name) for file in self.files())

    def __getitem__(self, name: str) -> "xarray.DataArray":
        return self.series(name)

    def info(self, name: str) -> Series:
        """The declaration of a series; KeyError with names that are near when there is none."""
        for file in self.files():
            found = file.find(name)
            if found is not None:
                return found[1]
        near = difflib.get_close_matches(name, self.names(), n=3)
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else "names() lists those that it has"
        raise KeyError(f"{self.path} has no series {name!r}; {hint}")

    def last_step(self, name: str | None = None) -> int | None:
        """The last step of a series, or of all; None when nothing was measured yet."""
        if name is not None:
            self.info(name)
        return max((last for file in self.files() if (last := file.last_step(name)) is not None), default=None)

    def series(
        self,
        name: str,
        *,
        since: int | None = None,
        until: int | None = None,
        max_points: int | None = None,
    ) -> "xarray.DataArray":
        """A series with dims (step, …): all of it, or steps from `since` to `until` (included).

        `max_points` (at least 8) thins it for a chart: of scalars the extremes and what is not finite stay,
        of arrays every k-th. When several ranks hold the series, a leading dim "rank" tells them apart, and
        steps that a rank lacks are NaN; each rank then keeps its share of `max_points`, at least 8.
        """
        self.info(name)
        held = {file: found for file in self.files() if (found := file.find(name)) is not None}
        measured = {file: found for file, found in held.items() if found[2] is not None}
        by_rank = {
            file.rank: _labelled(declared, _read(file, declared, shape, since, until))
            for file, (_, declared, shape) in (measured or held).items()
        }
        if max_points is not None:
            by_rank = _thin(by_rank, max_points)
        return _joined(by_rank)

    def piece(self, name: str, *, since: int | None = None) -> Piece:
        """A series from step `since` on, in plain arrays: what detectors read.

        What several ranks measured comes as one, the mean over those that have a value.
        """
        held = [(file, found) for file in self.files() if (found := file.find(name)) is not None]
        if len(held) == 1:
            file, (_, declared, shape) = held[0]
            return _read(file, declared, shape, since)
        series = self.series(name, since=since)
        with np.errstate(all="ignore"):
            return Piece.of(series.mean("rank", skipna=True) if "rank" in series.dims else series)

    def __enter__(self) -> "Record":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def __repr__(self) -> str:
        return f"<Record {str(self.path)!r}: {len(self.names())} series, last step {self.last_step()}>"


def _read(
    file: RankFile, series: Series, shape: tuple[int, ...] | None, since: int | None, until: int | None = None
) -> Piece:
    if shape is None:  # declared, and nothing measured yet
        shape = tuple(len(series.coords.get(dim, ())) for dim in series.dims)
    chunks = [chunk for _, chunk in file.chunks(series.name, since, until)]
    empty = Chunk(np.empty(0, np.int64), np.empty((0, *shape), file.dtype(series.name)))
    whole = Chunk.joined([empty, *chunks])
    wanted = slice(
        0 if since is None else int(np.searchsorted(whole.steps, since)),
        None if until is None else int(np.searchsorted(whole.steps, until, side="right")),
    )
    labels = {dim: list(series.coords.get(dim, range(size))) for dim, size in zip(series.dims, shape, strict=True)}
    return Piece(whole.steps[wanted], whole.values[wanted], labels)


def _labelled(series: Series, piece: Piece) -> "xarray.DataArray":
    import xarray

    return xarray.DataArray(
        piece.values,
        dims=("step", *series.dims),
        coords={"step": piece.steps, **piece.coords},
        name=series.name,
        attrs={"unit": series.unit, "description": series.description},
    )


def _thin(by_rank: dict[int, "xarray.DataArray"], max_points: int) -> dict[int, "xarray.DataArray"]:
    """Each rank at the steps that any rank wants to keep, so that they stay comparable."""
    share = max(max_points // len(by_rank), min(max_points, MIN_POINTS))
    kept = [array.step.values[thinned(array.values, share)] for array in by_rank.values()]
    steps = reduce(np.union1d, kept)
    return {rank: array[np.isin(array.step.values, steps)] for rank, array in by_rank.items()}


def _joined(by_rank: dict[int, "xarray.DataArray"]) -> "xarray.DataArray":
    import xarray

    if len(by_rank) == 1:
        return next(iter(by_rank.values()))
    # NaN marks what a rank lacks, and of our dtypes only floats have one.
    arrays = [array if array.dtype.kind == "f" else array.astype(np.float64) for array in by_rank.values()]
    if all(array.indexes["step"].equals(arrays[0].indexes["step"]) for array in arrays):
        arrays = [kept.astype(array.dtype) for kept, array in zip(arrays, by_rank.values(), strict=True)]
    ranks = xarray.DataArray(list(by_rank), dims="rank", name="rank")
    return xarray.concat(arrays, dim=ranks, join="outer", combine_attrs="override")
