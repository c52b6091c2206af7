"""From a record's series and findings to the rows that a chart draws."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import xarray as xr

from dynascope.record import Finding, Record
from dynascope.report.terminal import by_severity, plain

Rows: TypeAlias = list[dict[str, Any]]

MAX_POINTS, MAX_COLUMNS = 1200, 160
MAX_PLACES_AS_LINES, MAX_PLACES, MAX_PANELS = 4, 105, 12
SEVERITY_COLOURS = {"critical": "#D55E00", "warning": "#E69F00", "info": "#56B4E9"}


def line_rows(records: Mapping[str, Record], name: str, since: int | None = None) -> dict[str, Rows]:
    """Rows of a series as lines, from step `since` on: values, and steps where there is no finite one.

    Of a series with several places all are lines when they are few and the run is alone; else the median is the line
    and the quartiles are its band.
    """
    lines: Rows = []
    broken: Rows = []
    alone = len(records) == 1
    for run, record in records.items():
        if name not in record:
            continue
        values = _merged_ranks(record.series(name, since=since, max_points=MAX_POINTS))
        for place, line, low, high in _as_lines(values, alone=alone):
            label = place if place is not None else plain(name if alone else run)
            for step, value, least, most in zip(values.step.values, line, low, high, strict=True):
                row = {"step": int(step), "line": label, "series": "" if alone else plain(name)}
                if math.isfinite(value):
                    lines.append({**row, "value": _short(value), "low": _short(least), "high": _short(most)})
                else:
                    broken.append({**row, "text": _not_finite(value)})
    return {"lines": lines, "broken": broken}


def heat_rows(records: Mapping[str, Record], name: str, since: int | None = None) -> dict[str, Rows]:
    """Rows of a heat map from step `since` on; of a series with three axes the middle one is averaged."""
    record = next(iter(records.values()))
    values = _merged_ranks(record.series(name, since=since, max_points=MAX_COLUMNS)).astype(np.float64)
    while values.ndim > 3:
        values = values.mean(str(values.dims[2]))
    panel_dim = values.dims[1] if values.ndim == 3 else None
    panels = _spread(values.sizes[panel_dim], MAX_PANELS) if panel_dim else [0]
    steps = values.step.values
    gap = int(np.median(np.diff(steps))) if len(steps) > 1 else 1 + int(steps[0]) - since if since and len(steps) else 1
    ends = np.append(steps[1:], steps[-1:] + gap)
    cells: Rows = []
    broken: Rows = []
    for index in panels:
        panel = values.isel({panel_dim: index}) if panel_dim else values
        place_dim = panel.dims[1]
        title = f"{panel_dim} {_label(values[panel_dim].values[index])}" if panel_dim else ""
        panel = panel.isel({place_dim: _spread(panel.sizes[place_dim], MAX_PLACES)})
        labels = [_label(label) for label in panel[place_dim].values]
        for step, end, row in zip(steps, ends, panel.values, strict=True):
            for label, value in zip(labels, row, strict=True):
                cell = {"panel": title, "place": label, "step": int(step), "end": int(end)}
                if math.isfinite(value):
                    cells.append({**cell, "value": _short(value)})
                else:
                    broken.append({**cell, "text": _not_finite(value)})
    return {"cells": cells, "broken": broken}


def sizes_of(record: Record, name: str) -> list[int]:
    """The lengths of a series' axes beside the steps, as last measured."""
    values = record.series(name, since=record.last_step(name))
    return [size for dim, size in values.sizes.items() if dim not in ("step", "rank")]


def left_out(record: Record, name: str) -> str:
    """Of a heat map whose places do not all find room, how many do; else nothing."""
    sizes = sizes_of(record, name)
    rows, panels = sizes[-1], sizes[0] if len(sizes) > 1 else 1
    shown = min(rows, MAX_PLACES) * min(panels, MAX_PANELS)
    return f"Of {rows * panels} places {shown} are shown, evenly spread." if shown < rows * panels else ""


def findings_of(records: Mapping[str, Record]) -> list[tuple[str, Finding]]:
    """(run, finding) of all runs, worst first: the order in which a report numbers them."""
    found = [(run, finding) for run, record in records.items() for finding in record.findings]
    order = {id(finding): place for place, finding in enumerate(by_severity([finding for _, finding in found]))}
    return sorted(found, key=lambda pair: order[id(pair[1])])


def finding_rows(records: Mapping[str, Record], names: Sequence[str]) -> Rows:
    """The findings that were read from these series; beside the loss stand all of them."""
    return [
        {
            "number": str(number),
            "step": finding.step,
            "text": _told(finding) if len(records) == 1 else f"{plain(run)}: {_told(finding)}",
            "severity": finding.severity,
            "colour": SEVERITY_COLOURS[finding.severity],
        }
        for number, (run, finding) in enumerate(findings_of(records), 1)
        if finding.series in names or "loss" in names
    ]


def _as_lines(values: xr.DataArray, *, alone: bool) -> list[tuple[str | None, np.ndarray, np.ndarray, np.ndarray]]:
    """(place, line, low, high) for every line of a series; `place` is None when it is the series' only line."""
    if not values.size:  # declared, and nothing measured yet
        return []
    dims = [dim for dim in values.dims if dim != "step"]
    table = values.astype(np.float64).transpose("step", *dims).values.reshape(len(values.step), -1)
    if not dims:
        return [(None, table[:, 0], table[:, 0], table[:, 0])]
    if alone and table.shape[1] <= MAX_PLACES_AS_LINES:
        places = values.stack(place=dims).place.values if len(dims) > 1 else values[dims[0]].values
        return [(_label(place), line, line, line) for place, line in zip(places, table.T, strict=True)]
    low, middle, high = np.quantile(table, [0.25, 0.5, 0.75], axis=1)
    return [(None, middle, low, high)]


def _merged_ranks(values: xr.DataArray) -> xr.DataArray:
    """Several ranks as their mean."""
    return values.mean("rank", skipna=True, keep_attrs=True) if "rank" in values.dims else values


def _spread(size: int, most: int) -> list[int]:
    """Indices of at most `most` of `size` places, evenly spread from the first to the last."""
    return sorted(set(np.linspace(0, size - 1, min(size, most)).round().astype(int).tolist()))


def _label(value: Any) -> str:
    return plain(", ".join(map(str, value)) if isinstance(value, tuple) else str(value))


def _short(value: float) -> float:
    """Six digits, which is more than a chart shows, in a third of the bytes."""
    return float(f"{value:.6g}")


def _not_finite(value: float) -> str:
    return "NaN" if math.isnan(value) else "+infinity" if value > 0 else "-infinity"


def _told(finding: Finding) -> str:
    return plain(f"{finding.message} ({finding.where})" if finding.where else finding.message)
