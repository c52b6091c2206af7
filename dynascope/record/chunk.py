"""Consecutive measurements of one series: the unit in which a record is written and read."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped

from dynascope.record.model import RecordError

CHUNK_BYTES = 16 * 1024  # large enough that a chunk's row costs little, small enough to be rewritten while it fills
_DTYPES = {"b": "|b1", "i": "<i8", "u": "<i8", "f": "<f8"}


@dataclass(frozen=True)
class Chunk:
    """Steps in ascending order, and one measurement for each of them."""

    steps: Int64[np.ndarray, " count"]
    values: Shaped[np.ndarray, "count ..."]

    @classmethod
    def of(cls, steps: Sequence[int], values: Sequence[Any]) -> "Chunk":
        """From what `RecordWriter.add` collected: numbers or arrays of one shape; mixed dtypes promoted."""
        stacked = np.stack(values) if np.ndim(values[0]) else np.array(values)
        return cls(np.array(steps, dtype=np.int64), stacked.astype(storage_dtype(stacked.dtype), copy=False))

    @classmethod
    def joined(cls, chunks: Sequence["Chunk"]) -> "Chunk":
        """Chunks that follow each other as one."""
        return cls(
            np.concatenate([chunk.steps for chunk in chunks]),
            np.concatenate([chunk.values for chunk in chunks]),
        )

    def copy(self) -> "Chunk":
        """The same measurements in arrays of their own, which keep no larger array alive."""
        return Chunk(self.steps.copy(), self.values.copy())

    def pieces(self) -> Iterator["Chunk"]:
        """The chunk cut into full ones and a rest."""
        row_bytes = max(1, self.values[:1].nbytes)
        rows = max(1, CHUNK_BYTES // row_bytes)
        for start in range(0, len(self.steps), rows):
            yield Chunk(self.steps[start : start + rows], self.values[start : start + rows])

    @property
    def is_full(self) -> bool:
        """Whether another row would make it longer than CHUNK_BYTES."""
        return self.values.nbytes + max(1, self.values[:1].nbytes) > CHUNK_BYTES

    def row(self) -> tuple[Any, ...]:
        """Columns first, last, count, stride, dtype, steps, data, checksum of table `chunk`.

        Evenly spaced steps are kept as first and stride alone.
        """
        gaps = np.diff(self.steps)
        stride = int(gaps[0]) if len(gaps) else 1
        is_regular = bool((gaps == stride).all())
        steps = None if is_regular else self.steps.astype("<i8", copy=False).tobytes()
        data = self.values.tobytes()
        head = (
            int(self.steps[0]),
            int(self.steps[-1]),
            len(self.steps),
            stride if is_regular else None,
            self.values.dtype.str,
        )
        return (*head, steps, data, _checksum(head, steps, data))

    @classmethod
    def from_row(cls, shape: tuple[int, ...], row: tuple[Any, ...]) -> "Chunk":
        """The inverse of `row`; RecordError when the bytes are not those that were written."""
        *head, steps, data, checksum = row
        first, _, count, stride, dtype = head
        if _checksum(tuple(head), steps, data) != checksum:
            raise RecordError(f"the measurements from step {first} on are damaged")
        if steps is None:
            decoded = np.arange(count, dtype=np.int64) * stride + first
        else:
            decoded = np.frombuffer(steps, "<i8").astype(np.int64, copy=False)
        return cls(decoded, np.frombuffer(data, dtype).reshape(count, *shape))


def storage_dtype(dtype: np.dtype[Any]) -> str:
    """The dtype in which values are kept: bool, int64, float32 (also for half precision) or float64.

    Raises RecordError for anything that is not a real number.
    """
    if dtype.kind == "f" and dtype.itemsize <= 4:
        return "<f4"
    if dtype.kind not in _DTYPES or dtype == np.uint64:
        raise RecordError(f"values of type {dtype} cannot be recorded; give real numbers (float, int64 or bool)")
    return _DTYPES[dtype.kind]


def _checksum(head: tuple[Any, ...], steps: bytes | None, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(steps or b"", zlib.crc32(repr(head).encode())))
