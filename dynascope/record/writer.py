"""Writing a record: `add` only appends to lists; a background thread makes chunks of them for SQLite."""

import atexit
import ctypes
import operator
import os
import sqlite3
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsIndex

import numpy as np

from dynascope.record import locking
from dynascope.record.chunk import Chunk
from dynascope.record.column import INT64, Column, checked, plain_text
from dynascope.record.model import Finding, RecordError, Series
from dynascope.record.run_file import write_run_file
from dynascope.record.schema import ARTIFACTS, SCHEMA, lock_path, rank_path, series_row, to_json

_POINT_BYTES = 64  # a Python float and its step in two lists


class RecordWriter:
    """The single writer of one process's part of a record.

    Creates `folder` (with parents) and in it `rank-NNNNN.sqlite`; rank 0 also writes `run.json` with
    `config` in it. Scalars and small arrays of float32, float64, int64 and bool are kept bit for bit; other
    real types are widened, and a series that mixes types is promoted as NumPy does.

    Promise: after `kill -9` everything up to the last flush (at most `flush_interval` seconds ago) is
    readable. A power loss may also cost what the operating system had not yet put on the disk, but leaves
    the file whole. Memory: at most `buffer_bytes` and one call's values wait to be written (twice that
    while they are being written), beside 32 KiB a series; beyond it `add` waits for the disk. A full disk
    never raises in `add` nor stops the run: it is warned of once and tried again at every flush, and what
    meanwhile does not fit in the buffer is counted and told in an event. Safe to call from several threads;
    in a forked child every call does nothing.

    Raises RecordError when `folder` already holds a record of this rank, or another process is writing it.

    >>> with RecordWriter("runs/mine", config={"seed": 0}) as record:
    ...     record.declare(Series("loss", unit="nats", description="Training loss."))
    ...     record.add(0, {"loss": 2.3})
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        rank: int = 0,
        config: Mapping[str, Any] | None = None,
        flush_interval: float = 1.0,
        buffer_bytes: int = 64 * 2**20,
    ) -> None:
        if rank < 0 or not flush_interval > 0 or buffer_bytes <= 0:
            raise ValueError("rank must be 0 or more, flush_interval and buffer_bytes more than 0")
        self.folder, self.rank = Path(folder), rank
        self._buffer_bytes = buffer_bytes
        self._path = rank_path(self.folder, rank)
        try:
            (self.folder / ARTIFACTS).mkdir(parents=True, exist_ok=True)
            self._lock_descriptor = locking.acquire(lock_path(self._path))
            try:
                _refuse_existing(self._path)
                if rank == 0:
                    write_run_file(self.folder, config or {})
                self._connection = _create(self._path)
            except BaseException:
                os.close(self._lock_descriptor)
                raise
        except (sqlite3.Error, OSError) as error:
            raise RecordError(
                f"cannot make a record in {self.folder} ({error}); choose a run directory that can be written"
            ) from None

        self._columns: dict[str, Column] = {}
        self._changed: dict[int, Column] = {}  # declared, or their shape learnt, since the last flush
        self._events: list[tuple[Any, ...]] = []  # rows of the tables event and finding
        self._findings: list[tuple[Any, ...]] = []
        self._waiting_bytes = 0
        self._next_chunk = 1
        self._is_open, self._is_writing = True, False
        self._trouble: str | None = None
        self._num_dropped = 0
        # Reentrant, so that a signal handler that logs does not wait for the code that it interrupted.
        self._state = threading.RLock()
        self._disk = threading.RLock()
        self._wake = threading.Event()
        self._thread = threading.Thread(
            target=self._flush_regularly, args=(flush_interval,), name="dynascope-record", daemon=True
        )
        self._thread.start()
        atexit.register(self._close_at_exit)
        _open_writers.add(self)

    def declare(self, series: Series) -> None:
        """State a series before its first value; again with the same content is allowed.

        Raises ValueError for one that makes no sense, RecordError for one that contradicts the earlier one.
        """
        series = checked(series)
        with self._state:
            if not self._is_open:
                return
            known = self._columns.get(series.name)
            if known is None:
                self._keep(Column(len(self._columns) + 1, series))
            elif known.series != series:
                raise RecordError(
                    f"series {series.name!r} is already declared as {known.series}; give the new one another name"
                )

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Record one measurement (a number, an array or a tensor) of each named series at `step`.

        A series that was not declared declares itself, its dims named dim_0, dim_1, … Raises RecordError,
        and records nothing of this call, when a series was already measured at this step or a later one, or
        when a value has another shape than its series, or is not a real number.
        """
        if not self._is_open:
            return
        if self._waiting_bytes >= self._buffer_bytes and not self._make_room():
            with self._state:
                self._num_dropped += len(values)
            return
        step = operator.index(step)
        if step not in INT64:
            raise RecordError(f"step {step} is beyond what 64 bits hold; count steps from a smaller number")
        size = _POINT_BYTES * len(values)
        staged = []
        fresh: dict[str, Column] = {}
        with self._state:
            columns = self._columns
            for name, value in values.items():
                column = columns.get(name)
                if column is None:
                    column = fresh[name] = Column.of_value(len(columns) + len(fresh) + 1, name, value)
                if step <= column.last_step:
                    raise RecordError(
                        f"series {name!r} already has step {column.last_step}, so step {step} cannot follow; "
                        "record each step once and in ascending order"
                    )
                if value.__class__ is not column.quick_type:
                    value = column.admit(value)
                    size += value.nbytes if isinstance(value, np.ndarray) else 0
                staged.append((column, value))
            for column in fresh.values():
                self._keep(column)
            for column, value in staged:
                column.last_step = step
                column.steps.append(step)
                column.values.append(value)
                if column.shape is None:
                    self._learn_shape(column, value)
            self._waiting_bytes += size
            if self._waiting_bytes > self._buffer_bytes // 2 and self._trouble is None:
                self._wake.set()

    def event(
        self, kind: str, message: str, *, step: SupportsIndex | None = None, data: Mapping[str, Any] | None = None
    ) -> None:
        """Record that something happened, at this moment of the wall clock."""
        if self._is_open:
            at = None if step is None else operator.index(step)
            row = (plain_text(kind), plain_text(message), at, time.time(), to_json(data or {}))
            with self._state:
                self._events.append(row)

    def finding(self, finding: Finding) -> None:
        """Record what a detector concluded; the same (id, where, step) again is kept once."""
        if self._is_open:
            place = (plain_text(finding.id), plain_text(finding.where), operator.index(finding.step))
            row = (*place, to_json({**vars(finding), "evidence": dict(finding.evidence)}))
            with self._state:
                self._findings.append(row)

    def flush(self) -> None:
        """Wait until everything recorded so far is on disk (when the disk refuses it, it stays waiting)."""
        if self._is_open:
            self._write()

    def close(self) -> None:
        """Write what is left and make the file stand alone; RecordError when the disk did not take it all."""
        with self._state if self._is_open else nullcontext():
            if not self._is_open:
                return
            self._is_open = False
        atexit.unregister(self._close_at_exit)
        _open_writers.discard(self)
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._write()
        num_lost = self._num_dropped + sum(len(column.steps) for column in self._columns.values())
        with self._disk:
            if self._trouble is None:
                _stand_alone(self._connection)
            self._connection.close()
        lock_path(self._path).unlink(missing_ok=True)
        os.close(self._lock_descriptor)
        if self._trouble is not None:
            raise RecordError(
                f"{num_lost} points could not be written to {self._path} ({self._trouble}); "
                "what was written before is readable; free space on that disk before the next run"
            )

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except RecordError as loss:
            if error is None:
                raise
            _warn(str(loss))  # the training's own exception matters more

    def _keep(self, column: "Column") -> None:
        self._columns[column.series.name] = column
        self._changed[column.id] = column

    def _learn_shape(self, column: "Column", value: Any) -> None:
        column.shape = np.shape(value)
        column.quick_type = float if column.shape == () else None
        self._changed[column.id] = column

    def _make_room(self) -> bool:
        """Wait for the disk; False when it takes nothing, so that the buffer stays at its bound."""
        if self._trouble is None:
            self._write()
        return self._trouble is None

    def _flush_regularly(self, interval: float) -> None:
        while self._is_open:
            self._wake.wait(interval)
            self._wake.clear()
            if self._is_open:
                self._write()

    def _write(self) -> None:
        """Put everything that waits on disk in one transaction, or leave it waiting for the next attempt."""
        with self._disk:
            if self._is_writing:
                return  # called from a signal handler that interrupted this very method
            self._is_writing = True
            try:
                self._write_waiting()
            finally:
                self._is_writing = False

    def _write_waiting(self) -> None:
        with self._state:
            taken = [(column, column.steps, column.values) for column in self._columns.values() if column.steps]
            for column, _, _ in taken:
                column.steps, column.values = [], []
            changed, self._changed = self._changed, {}
            events, self._events = self._events, []
            findings, self._findings = self._findings, []
            num_bytes, num_dropped = self._waiting_bytes, self._num_dropped
        if not (taken or changed or events or findings or num_dropped):
            return
        has_committed = False
        try:
            tails = self._transact(taken, changed, events, findings, num_dropped)
            has_committed = True
        except (sqlite3.Error, MemoryError) as error:
            first_time, self._trouble = self._trouble is None, str(error)
            if first_time:
                _warn(f"{self._path} cannot be written ({error}); trying again at every flush")
        finally:
            with self._state:
                if has_committed:
                    for column, tail in tails:
                        column.tails = tail
                    self._num_dropped -= num_dropped
                    self._waiting_bytes -= num_bytes
                    self._trouble = None
                else:
                    for column, steps, values in taken:
                        column.steps[:0], column.values[:0] = steps, values
                    self._changed = changed | self._changed
                    self._events[:0], self._findings[:0] = events, findings

    def _transact(
        self,
        taken: list[tuple["Column", list[int], list[Any]]],
        changed: dict[int, "Column"],
        events: list[tuple[Any, ...]],
        findings: list[tuple[Any, ...]],
        num_dropped: int,
    ) -> list[tuple["Column", list[tuple[int, Chunk]]]]:
        now = time.time()
        tails, replaced, written = [], [], []
        for column, steps, values in taken:
            tail = list(column.tails)
            chunk = Chunk.of(steps, values)
            # Like a binary counter: a slow run leaves few chunks, and rewrites each value only a few times.
            while tail and tail[-1][1].values.nbytes <= chunk.values.nbytes:
                identity, earlier = tail.pop()
                replaced.append((identity,))
                chunk = Chunk.joined([earlier, chunk])
            for piece in chunk.pieces():
                written.append((self._next_chunk, column.id, *piece.row(), now))
                if not piece.is_full:
                    tail.append((self._next_chunk, piece.copy()))
                self._next_chunk += 1
            tails.append((column, tail))
        if num_dropped:
            message = f"{num_dropped} points are missing: the disk took nothing and the buffer was full"
            events = [*events, ("points-dropped", message, None, now, to_json({"points": num_dropped}))]
        with self._connection as database:
            database.execute("BEGIN IMMEDIATE")
            database.executemany(
                "INSERT OR REPLACE INTO series VALUES (?, ?, ?, ?, ?, ?, ?)",
                [series_row(column.id, column.series, column.shape) for column in changed.values()],
            )
            database.executemany("DELETE FROM chunk WHERE id = ?", replaced)
            database.executemany("INSERT INTO chunk VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", written)
            database.executemany("INSERT INTO event (kind, message, step, time, data) VALUES (?, ?, ?, ?, ?)", events)
            database.executemany("INSERT OR IGNORE INTO finding VALUES (?, ?, ?, ?)", findings)
        return tails

    def _close_at_exit(self) -> None:
        try:
            self.close()
        except RecordError as loss:
            _warn(str(loss))

    def _abandon(self) -> None:
        """Leave the record to the parent process: called in a forked child."""
        self._is_open = False
        # A living child must not keep the lock of a parent that died.
        os.close(self._lock_descriptor)
        # SQLite must never close a connection inherited by fork: it would undo the parent's open transaction.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._connection))


_open_writers: "weakref.WeakSet[RecordWriter]" = weakref.WeakSet()


def _abandon_all() -> None:
    for writer in list(_open_writers):
        writer._abandon()


os.register_at_fork(after_in_child=_abandon_all)


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise RecordError(
            f"{path.parent} already holds a record ({path.name}); choose another run directory, or remove this one"
        )


def _create(path: Path) -> sqlite3.Connection:
    """A new record file that is whole from the moment at which it can be seen, opened for writing."""
    draft = path.with_suffix(".new")
    draft.unlink(missing_ok=True)
    mode = "wal" if locking.allows_wal(path.parent) else "delete"
    database = sqlite3.connect(draft)
    database.executescript(f"BEGIN; {SCHEMA} COMMIT;")  # one statement at a time goes to the disk each time
    (granted,) = database.execute(f"PRAGMA journal_mode = {mode}").fetchone()
    database.close()
    draft.rename(path)
    database = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
    database.execute(f"PRAGMA synchronous = {'NORMAL' if granted == 'wal' else 'FULL'}")
    return database


def _stand_alone(database: sqlite3.Connection) -> None:
    """Fold the write-ahead log into the file, which can then be copied alone and read anywhere."""
    try:
        database.execute("PRAGMA busy_timeout = 500")
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.execute("PRAGMA journal_mode = DELETE")
    except sqlite3.OperationalError:
        return  # a reader has it open at this moment: the record stays whole, with its log beside it


def _warn(message: str) -> None:
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    except RuntimeWarning:  # warnings made errors must end neither the run nor the writing thread
        print(f"dynascope: {message}", file=sys.stderr)
