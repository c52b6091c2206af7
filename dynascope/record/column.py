"""One series as the writer sees it: which values it admits, and what of it waits to be written."""

import math
from typing import Any

import numpy as np

from dynascope.record.chunk import Chunk, storage_dtype
from dynascope.record.model import RecordError, Series

INT64 = range(-(2**63), 2**63)
MAX_BYTES = 2**28  # SQLite holds no blob of 1 GB, and such a value is no measurement any more


class Column:
    """A declaration, the measurements that wait in memory, and the unfilled chunks that are on disk."""

    __slots__ = ("id", "last_step", "quick_type", "series", "shape", "steps", "tails", "values")

    def __init__(self, identity: int, series: Series) -> None:
        self.id = identity
        self.series = series
        self.shape: tuple[int, ...] | None = None
        self.quick_type: type | None = None  # values of this very type need no check
        self.last_step: float = -math.inf
        self.steps: list[int] = []
        self.values: list[Any] = []
        self.tails: list[tuple[int, Chunk]] = []  # (row, content), oldest first, each longer than the next

    @classmethod
    def of_value(cls, identity: int, name: str, value: Any) -> "Column":
        try:
            dims = tuple(f"dim_{axis}" for axis in range(np.ndim(_plain(value))))
        except ValueError as error:  # rows of different lengths
            raise RecordError(f"series {name!r}: {error}") from None
        return cls(identity, checked(Series(name, dims)))

    def admit(self, value: Any) -> Any:
        """The value as it will be kept: a Python or NumPy number, or an array of the writer's own."""
        try:
            if value.__class__ is int and value in INT64:
                shape: tuple[int, ...] = ()
            elif value.__class__ is not float:
                plain = np.asarray(_plain(value))
                value = plain.astype(storage_dtype(plain.dtype))
                shape = value.shape
                value = value if shape else value[()]
            else:
                shape = ()
            if math.prod(shape) * 8 > MAX_BYTES:
                raise RecordError(f"a value of shape {shape} is too large; record what summarises it instead")
        except (RecordError, ValueError, TypeError) as error:
            raise RecordError(f"series {self.series.name!r}: {error}") from None
        expected = self._expected_shape(shape)
        if shape != expected:
            raise RecordError(
                f"series {self.series.name!r} has shape {expected}, but a value of shape {shape} came; "
                "record values of another shape under another name"
            )
        return value

    def _expected_shape(self, shape: tuple[int, ...]) -> tuple[int | str, ...]:
        if self.shape is not None:
            return self.shape
        dims, coords = self.series.dims, self.series.coords
        if len(dims) != len(shape):
            return dims
        return tuple(len(coords[dim]) if dim in coords else size for dim, size in zip(dims, shape, strict=True))


def _plain(value: Any) -> Any:
    """A tensor as an array (NumPy has no bfloat16); anything else as it is."""
    if not hasattr(value, "detach"):
        return value
    tensor = value.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor).numpy()


def checked(series: Series) -> Series:
    """The declaration in plain tuples and lists; ValueError when it makes no sense."""
    dims = tuple(series.dims)
    coords = {dim: np.asarray(labels).tolist() for dim, labels in series.coords.items()}
    if not series.name:
        raise ValueError("a series needs a name that is not empty")
    if plain_text(series.name) != series.name:
        raise ValueError(f"series name {series.name!r} is not valid Unicode; leave out the surrogates")
    if len(set(dims)) != len(dims) or {"step", "rank", "value"} & set(dims):
        raise ValueError(
            f"series {series.name!r}: dims {dims} must differ from each other and from step, rank and value"
        )
    if not set(coords) <= set(dims):
        raise ValueError(f"series {series.name!r}: coords {sorted(coords)} label axes that are not among dims {dims}")
    return Series(series.name, dims, plain_text(series.unit), plain_text(series.description), coords)


def plain_text(text: str) -> str:
    """Text that UTF-8 can hold: messages of exceptions may carry surrogates of undecodable file names."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
