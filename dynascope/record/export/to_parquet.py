"""Parquet: a folder with one tidy table a series, and `index.json`, which tells what is where.

A table has one row for each number: columns `step`, `rank` (when several processes wrote the record), one column of
labels for each dim, and `value`, in the dtype in which it was recorded. The file of `train/loss` is
`train%2Floss.parquet`: the name with what is not a letter, digit, `_`, `-`, `.` or space percent-encoded. Where that
would be too long, or differ from another only in case, it ends in a number, and `index.json` alone tells the name.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dynascope.record.chunk import Chunk
from dynascope.record.export.contents import contents
from dynascope.record.model import Series
from dynascope.record.rank_file import RankFile
from dynascope.record.reader import Record

_BATCH_BYTES = 8 * 2**20


def write(record: Record, output: Path, progress: Callable[[float], None]) -> None:
    """Write one table a series and the index."""
    output.mkdir()
    names = record.names()
    index, taken = [], set[str]()
    for number, name in enumerate(names):
        series = record.info(name)
        file_name = _file_name(name, taken)
        _write_series(record.files(), series, output / file_name)
        index.append(
            {
                "name": name,
                "file": file_name,
                "unit": series.unit,
                "description": series.description,
                "dims": series.dims,
            }
        )
        progress((number + 1) / len(names))
    (output / "index.json").write_text(json.dumps({"series": index, **contents(record)}, indent=1) + "\n")


def _file_name(name: str, taken: set[str]) -> str:
    stem = quote(name, safe=" ")[:200]
    candidate, number = stem, 1
    while candidate.lower() in taken or (number == 1 and len(quote(name, safe=" ")) > 200):
        number += 1
        candidate = f"{stem}~{number}"
    taken.add(candidate.lower())
    return f"{candidate}.parquet"


def _write_series(files: list[RankFile], series: Series, path: Path) -> None:
    holding = [file for file in files if file.find(series.name) is not None]
    dtype = np.result_type(*(file.dtype(series.name) for file in holding))
    labels = {dim: pa.array(list(series.coords[dim])) if dim in series.coords else None for dim in series.dims}
    schema = pa.schema(
        [
            *([("rank", pa.int32())] if len(files) > 1 else []),
            ("step", pa.int64()),
            *((dim, pa.int64() if column is None else column.type) for dim, column in labels.items()),
            ("value", pa.from_numpy_dtype(dtype)),
        ],
        metadata={"name": series.name, "unit": series.unit, "description": series.description},
    )
    with pq.ParquetWriter(path, schema) as writer:
        for file in holding:
            for chunk in _batches(file, series.name):
                count, shape = len(chunk.steps), chunk.values.shape[1:]
                row_length = int(np.prod(shape, dtype=np.int64))
                places = np.indices(shape).reshape(len(shape), row_length)
                columns = {
                    "rank": pa.array(np.full(count * row_length, file.rank, np.int32)),
                    "step": pa.array(np.repeat(chunk.steps, row_length)),
                    "value": pa.array(chunk.values.astype(dtype, copy=False).reshape(-1)),
                }
                for (dim, column), place in zip(labels.items(), places, strict=True):
                    index = pa.array(np.tile(place, count))
                    columns[dim] = index if column is None else column.take(index)
                writer.write_table(pa.table({field.name: columns[field.name] for field in schema}, schema))


def _batches(file: RankFile, name: str) -> Iterator[Chunk]:
    waiting: list[Chunk] = []
    for _, chunk in file.chunks(name):
        waiting.append(chunk)
        if sum(each.values.nbytes for each in waiting) >= _BATCH_BYTES:
            yield Chunk.joined(waiting)
            waiting = []
    if waiting:
        yield Chunk.joined(waiting)
