"""How a record lies on disk: one SQLite file a process, marked so that other files are told apart."""

import json
import re
from pathlib import Path
from typing import Any

from dynascope.record.model import Series

APPLICATION_ID = 0x44594E41  # "DYNA": tells our files from any other SQLite database
FORMAT_VERSION = 1
RUN_FILE = "run.json"
ARTIFACTS = "artifacts"

SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {FORMAT_VERSION};
CREATE TABLE series (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, dims TEXT NOT NULL, coords TEXT NOT NULL,
    unit TEXT NOT NULL, description TEXT NOT NULL, shape TEXT
);
CREATE TABLE chunk (
    id INTEGER PRIMARY KEY, series INTEGER NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
    count INTEGER NOT NULL, stride INTEGER, dtype TEXT NOT NULL, steps BLOB, data BLOB NOT NULL,
    checksum INTEGER NOT NULL, written REAL NOT NULL
);
CREATE INDEX chunk_by_step ON chunk (series, last, first);
CREATE TABLE event (
    id INTEGER PRIMARY KEY, kind TEXT NOT NULL, message TEXT NOT NULL, step INTEGER, time REAL NOT NULL,
    data TEXT NOT NULL
);
CREATE TABLE finding (
    id TEXT NOT NULL, place TEXT NOT NULL, step INTEGER NOT NULL, content TEXT NOT NULL,
    UNIQUE (id, place, step)
);
"""


def rank_path(folder: Path, rank: int) -> Path:
    """Where the process of this rank writes."""
    return folder / f"rank-{rank:05d}.sqlite"


def rank_of(path: Path) -> int:
    """The rank that a file's name tells; 0 for a file that was renamed."""
    match = re.fullmatch(r"rank-(\d+)\.sqlite", path.name)
    return int(match[1]) if match else 0


def lock_path(path: Path) -> Path:
    """The file whose lock the writer of `path` holds for as long as it lives."""
    return path.with_suffix(".lock")


def to_json(value: Any) -> str:
    """JSON of values that may hold NumPy scalars and arrays; NaN and infinities stay as they are."""
    return json.dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def series_row(identity: int, series: Series, shape: tuple[int, ...] | None) -> tuple[Any, ...]:
    """A declaration as a row of table `series`."""
    return (
        identity,
        series.name,
        to_json(series.dims),
        to_json(series.coords),
        series.unit,
        series.description,
        None if shape is None else to_json(shape),
    )


def series_from_row(
    name: str, dims: str, coords: str, unit: str, description: str, shape: str | None
) -> tuple[Series, tuple[int, ...] | None]:
    """The inverse of `series_row`, without the identity."""
    declared = Series(name, tuple(json.loads(dims)), unit, description, json.loads(coords))
    return declared, None if shape is None else tuple(json.loads(shape))
