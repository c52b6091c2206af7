"""NetCDF 4: one file with one group a series, so that `attention/entropy` is group `attention/entropy`.

A group holds `value` (attributes unit, description and series_name), `step`, and the labels of each dim. What NetCDF
does not allow in a name is percent-encoded, as `%` itself is; an empty part becomes a lone `%`, and a series whose
name begins that of others (`a` beside `a/b`) gets a `%` at its end. Group `%record` holds what run.json says, events
and findings as JSON. With several ranks a value that a rank lacks is NaN, for which numbers become float64.
NUL, which NetCDF's text cannot hold, is written as U+2400.

>>> xarray.open_dataset("record.nc", group="attention/entropy", engine="h5netcdf")  # doctest: +SKIP
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import h5netcdf
import h5py
import numpy as np

from dynascope.record.export.contents import contents
from dynascope.record.reader import Record

_WINDOW_BYTES = 8 * 2**20


def write(record: Record, output: Path, progress: Callable[[float], None]) -> None:
    """Write one group a series, a window of steps at a time."""
    names = record.names()
    with h5netcdf.File(output, "w") as file:
        about = file.create_group("%record")
        for key, value in contents(record).items():
            variable = about.create_variable(key, (), h5py.string_dtype())
            variable[...] = json.dumps(value)
        for number, name in enumerate(names):
            _write_series(record, name, file.create_group(group_of(name, names)))
            progress((number + 1) / len(names))


def group_of(name: str, names: list[str]) -> str:
    """The group of a series among all series of a record.

    >>> group_of("a b", ["a b", "a b/c"]), group_of("odd//50%", [])
    ('a b%', 'odd/%/50%25')
    """
    path = "/".join(_encoded(part) for part in name.split("/"))
    return f"{path}%" if any(other.startswith(f"{name}/") for other in names) else path


def _encoded(part: str) -> str:
    if part in ("", ".", ".."):
        return part.replace(".", "%2E") or "%"
    letters = (letter if letter.isalnum() or letter in "_-.+@= " else quote(letter, safe="") for letter in part)
    encoded = "".join(letters)
    return f"{encoded[:-1]}%20" if encoded.endswith(" ") else encoded


def _write_series(record: Record, name: str, group: Any) -> None:
    series = record.info(name)
    files = [file for file in record.files() if file.find(name) is not None]
    steps = np.unique(
        np.concatenate([np.empty(0, np.int64), *(chunk.steps for file in files for _, chunk in file.chunks(name))])
    )
    head = record.series(name, until=int(steps[0]) if len(steps) else 0)
    dtype = np.result_type(*(file.dtype(name) for file in files))
    if "rank" in head.dims and dtype.kind != "f":
        dtype = np.dtype(np.float64)

    sizes = {**head.sizes, "step": len(steps)}
    group.dimensions = {_encoded(str(dim)): size for dim, size in sizes.items()}
    for dim in head.dims:
        labels = steps if dim == "step" else head.coords[dim].values
        is_text = labels.dtype.kind in "UO"
        variable = group.create_variable(
            _encoded(str(dim)), (_encoded(str(dim)),), h5py.string_dtype() if is_text else labels.dtype
        )
        variable[...] = np.array([_text(str(label)) for label in labels], object) if is_text else labels
    # NetCDF has no booleans; this attribute is how xarray marks them.
    is_bool = dtype.kind == "b"
    value = group.create_variable("value", tuple(_encoded(str(dim)) for dim in head.dims), "i1" if is_bool else dtype)
    value.attrs.update(
        {
            "series_name": _text(name),
            "unit": _text(series.unit),
            "description": _text(series.description),
            **({"dtype": "bool"} if is_bool else {}),
        }
    )
    row_bytes = max(1, dtype.itemsize * int(np.prod([size for dim, size in sizes.items() if dim != "step"])))
    rows = max(1, _WINDOW_BYTES // row_bytes)
    for start in range(0, len(steps), rows):
        window = steps[start : start + rows]
        block = record.series(name, since=int(window[0]), until=int(window[-1]))
        place = (slice(None),) * block.dims.index("step") + (slice(start, start + len(window)),)
        value[place] = block.values.astype(value.dtype)


def _text(text: str) -> str:
    return text.replace("\0", "\u2400")
