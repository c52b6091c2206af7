"""Reading one process's file of a record: read-only, in short transactions, never in the writer's way."""

import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from dynascope.record.chunk import Chunk
from dynascope.record.model import Event, Finding, RecordError, Series
from dynascope.record.schema import APPLICATION_ID, FORMAT_VERSION, rank_of, series_from_row


@dataclass(frozen=True)
class RankFile:
    """One `rank-NNNNN.sqlite`; every method asks the file anew, so a growing record is followed."""

    path: Path

    @property
    def rank(self) -> int:
        """The rank that wrote it."""
        return rank_of(self.path)

    def check(self) -> None:
        """RecordError when this is no record, one of a newer Dynascope, or damaged at its head."""
        with self._open() as database:
            database.execute("SELECT count(*) FROM series").fetchone()

    def series(self) -> dict[str, Series]:
        """All declared series by name, in the order of declaration."""
        with self._open() as database:
            rows = database.execute(
                "SELECT name, dims, coords, unit, description, shape FROM series ORDER BY id"
            ).fetchall()
            return {row[0]: series_from_row(*row)[0] for row in rows}

    def find(self, name: str) -> tuple[int, Series, tuple[int, ...] | None] | None:
        """Identity, declaration and shape of one series; the shape is None before its first value."""
        with self._open() as database:
            row = database.execute(
                "SELECT id, name, dims, coords, unit, description, shape FROM series WHERE name = ?", (name,)
            ).fetchone()
            return None if row is None else (row[0], *series_from_row(*row[1:]))

    def last_step(self, name: str | None = None) -> int | None:
        """The last step of one series, or of all."""
        query = "SELECT max(last) FROM chunk"
        if name is not None:
            query += " WHERE series = (SELECT id FROM series WHERE name = ?)"
        with self._open() as database:
            (last,) = database.execute(query, () if name is None else (name,)).fetchone()
        return None if last is None else int(last)

    def chunks(self, name: str, since: int | None = None, until: int | None = None) -> Iterator[tuple[float, Chunk]]:
        """Chunks of a series in the order of steps, each with the wall time at which it was written.

        Only chunks that hold steps of [since, until] are read.
        Raises RecordError, naming the file, when a chunk is damaged.
        """
        conditions, limits = ["series = ?"], []
        if since is not None:
            conditions.append("last >= ?")
            limits.append(since)
        if until is not None:
            conditions.append("first <= ?")
            limits.append(until)
        found = self.find(name)
        identity, _, shape = found if found is not None else (0, None, None)
        if shape is None:
            return
        with self._open() as database:
            rows = database.execute(
                "SELECT written, first, last, count, stride, dtype, steps, data, checksum FROM chunk "
                f"WHERE {' AND '.join(conditions)} ORDER BY last",
                (identity, *limits),
            )
            for written, *row in rows:
                try:
                    yield written, Chunk.from_row(shape, tuple(row))
                except RecordError as error:
                    raise RecordError(
                        f"{self.path}: series {name!r}: {error}; copy the record again from its source"
                    ) from None

    def dtype(self, name: str) -> np.dtype[Any]:
        """The dtype that holds all values of a series; float64 before the first one."""
        with self._open() as database:
            rows = database.execute(
                "SELECT DISTINCT dtype FROM chunk WHERE series = (SELECT id FROM series WHERE name = ?)", (name,)
            )
            dtypes = [np.dtype(dtype) for (dtype,) in rows]
        return np.result_type(*dtypes) if dtypes else np.dtype(np.float64)

    def windows(self, num_bytes: int) -> list[tuple[int, int]]:
        """Ranges of steps, both ends included, that follow each other and hold about `num_bytes` of values each."""
        with self._open() as database:
            (first,) = database.execute("SELECT min(first) FROM chunk").fetchone()
            rows = database.execute("SELECT last, length(data) FROM chunk ORDER BY last").fetchall()
        ranges, size = [], 0
        for position, (last, length) in enumerate(rows):
            size += length
            if (size >= num_bytes or position == len(rows) - 1) and last >= first:
                ranges.append((first, last))
                first, size = last + 1, 0
        return ranges

    def events(self) -> list[Event]:
        """All events in the order in which they were recorded."""
        with self._open() as database:
            rows = database.execute("SELECT kind, message, step, time, data FROM event ORDER BY id")
            return [Event(kind, text, step, time, self.rank, json.loads(data)) for kind, text, step, time, data in rows]

    def findings(self) -> list[Finding]:
        """All findings in the order in which they were recorded."""
        with self._open() as database:
            rows = database.execute("SELECT content FROM finding ORDER BY rowid")
            return [Finding(**json.loads(content)) for (content,) in rows]

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A read-only connection for one question; SQLite's complaints become a sentence naming the file."""
        try:
            with _connected(self.path) as database:
                _check_format(self.path, database)
                yield database
        except (sqlite3.Error, ValueError, TypeError) as error:  # the latter two: JSON or numbers overwritten
            if not self.path.exists():
                raise RecordError(f"{self.path} has been removed; open the record again") from None
            raise RecordError(
                f"{self.path} cannot be read as a record ({error}); "
                "if it is a copy, copy it again together with its -wal file"
            ) from None


def _check_format(path: Path, database: sqlite3.Connection) -> None:
    (application,) = database.execute("PRAGMA application_id").fetchone()
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION_ID:
        raise RecordError(f"{path} is not a record of Dynascope; give a run directory, or its rank-*.sqlite file")
    if version > FORMAT_VERSION:
        raise RecordError(
            f"{path} was written by a newer Dynascope (format {version}, here {FORMAT_VERSION}); "
            "update with: pip install --upgrade dynascope"
        )


@contextmanager
def _connected(path: Path) -> Iterator[sqlite3.Connection]:
    """A read-only connection, also where SQLite cannot make the side files that its write-ahead log wants."""
    with closing(_connect(path, "mode=ro")) as database:
        if not _needs_side_files(database):
            yield database
            return
    # The log of a writer that lives or was killed, and the journal of one that was killed as it began or ended.
    beside = [path.with_name(f"{path.name}-{kind}") for kind in ("wal", "journal")]
    unfinished = [file for file in beside if file.exists() and file.stat().st_size]
    if not unfinished:
        with closing(_connect(path, "mode=ro&immutable=1")) as database:
            yield database
        return
    with tempfile.TemporaryDirectory(prefix="dynascope-") as folder:
        copied = Path(shutil.copy(path, folder))
        for file in unfinished:
            shutil.copy(file, folder)
        with closing(_connect(copied, "mode=rw")) as database:
            yield database


def _connect(path: Path, options: str) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(path.resolve()))}?{options}", uri=True, timeout=30)


def _needs_side_files(database: sqlite3.Connection) -> bool:
    try:
        database.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode in (
            sqlite3.SQLITE_CANTOPEN,
            sqlite3.SQLITE_READONLY_CANTINIT,
            sqlite3.SQLITE_READONLY_DIRECTORY,
            sqlite3.SQLITE_READONLY_RECOVERY,
            sqlite3.SQLITE_READONLY_ROLLBACK,
        ):
            return True
        raise
    return False
