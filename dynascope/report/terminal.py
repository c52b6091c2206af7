"""A run in the terminal: its series with sparklines, its findings with their remedies."""

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dynascope.record import Finding, Record

_BLOCKS = "▁▂▃▄▅▆▇█"
_STYLES = {"critical": "bold red", "warning": "yellow", "info": "cyan"}
_SIGNS = {"critical": "✖", "warning": "▲", "info": "●"}
_SPARK_WIDTH, _MIN_SPARK_WIDTH = 20, 8
_MIN_NAME_WIDTH = 12
_REST_WIDTH = 66
"""Columns for the longest usual name and three numbers."""


def show(record: Record, console: Console) -> None:
    """Print a run: how it was started, every series, and its findings.

    >>> show(dynascope.open("runs/demo"), Console())
    """
    console.print(Text(plain(str(record.path)), style="bold").append("  ").append_text(_headline(record)))
    # Numbers are never cut: the courses and then the names make room for them.
    spark_width = min(_SPARK_WIDTH, max(_MIN_SPARK_WIDTH, console.width - _REST_WIDTH))
    rows = []
    for name in record.names():
        info = record.info(name)
        values = _course(record.series(name, max_points=8 * _SPARK_WIDTH))
        label = Text(plain(name)).append(f"  {plain(info.unit)}", style="dim")
        course = Text(sparkline(values, spark_width), style="cyan")
        rows.append((label, course, [f"{value:.4g}" for value in _summary(values)]))
    number_width = max([len(number) for *_, numbers in rows for number in numbers], default=0)
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="dim")
    room = console.width - spark_width - 3 * number_width - 4
    table.add_column("series", overflow="ellipsis", no_wrap=True, max_width=max(_MIN_NAME_WIDTH, room))
    table.add_column("course", width=spark_width, no_wrap=True)
    for column in ("last", "min", "max"):
        table.add_column(column, justify="right", width=max(len(column), number_width), no_wrap=True)
    for label, course, numbers in rows:
        table.add_row(label, course, *map(Text, numbers))
    console.print(table)
    if any(record.info(name).dims for name in record.names()):
        console.print(Text("Of series with places (layers, heads, parameters) the median is shown.", style="dim"))
    console.print()
    print_findings(record, console)


def print_findings(record: Record, console: Console) -> None:
    """Print a run's findings, worst first, each with the line of code that helps; or that there are none."""
    findings = by_severity(record.findings)
    if not findings:
        console.print(Text("No findings: nothing in this run looks unhealthy.", style="green"))
        return
    for finding in findings:
        style = _STYLES[finding.severity]
        line = Text(f"{_SIGNS[finding.severity]} step {finding.step}  ", style=style)
        console.print(line.append(plain(finding.message), style="default"))
        if finding.remedy:
            remedy = "\n".join(map(plain, finding.remedy.splitlines()))
            console.print(Padding(Text(remedy, style="dim"), (0, 0, 0, 4)))


def show_json(record: Record) -> dict[str, Any]:
    """A run as one JSON object: its start, the last value and range of every series, events and findings.

    Numbers that JSON cannot hold (NaN, infinities) are given as strings.
    """
    series = {}
    for name in record.names():
        info, values = record.info(name), _course(record[name])
        last, least, most = (_json_number(value) for value in _summary(values))
        steps = record.last_step(name)
        series[name] = {
            "unit": info.unit,
            "dims": list(info.dims),
            "description": info.description,
            "last_step": steps,
            "last": last,
            "min": least,
            "max": most,
        }
    return {
        "run": str(record.path),
        "live": record.is_live(),
        "last_step": record.last_step(),
        "config": record.config,
        "series": series,
        "findings": [finding_as_json(finding) for finding in by_severity(record.findings)],
        "events": [{"kind": e.kind, "step": e.step, "time": e.time, "message": e.message} for e in record.events],
    }


def finding_as_json(finding: Finding) -> dict[str, Any]:
    """A finding as plain values."""
    evidence = {name: _json_number(value) for name, value in finding.evidence.items()}
    return {
        "id": finding.id,
        "severity": finding.severity,
        "step": finding.step,
        "message": finding.message,
        "evidence": evidence,
        "remedy": finding.remedy,
        "source": finding.source,
        "series": finding.series,
        "where": finding.where,
    }


def by_severity(findings: Sequence[Finding]) -> list[Finding]:
    """Worst first, and within one severity in the order of steps."""
    return sorted(findings, key=lambda finding: (list(_STYLES).index(finding.severity), finding.step))


def sparkline(values: Float[np.ndarray, " steps"], width: int) -> str:
    """A course as block characters, `width` at most; a value that is no finite number shows as `!`.

    >>> sparkline(np.array([0.0, 1.0, 2.0, 3.0]), width=4)
    '▁▃▆█'
    """
    if not values.size:
        return ""
    parts = np.array_split(values, min(width, values.size))
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    line = ""
    for part in parts:
        good = part[np.isfinite(part)]
        if good.size < part.size:
            line += "!"
        else:
            share = (good.mean() - low) / (high - low) if high > low else 0.0
            line += _BLOCKS[round(share * (len(_BLOCKS) - 1))]
    return line


def plain(text: str) -> str:
    """Text without control characters, so that a name can neither colour, move nor clear a terminal."""
    return "".join("�" if unicodedata.category(character).startswith("C") else character for character in text)


def _course(series: xr.DataArray) -> Float[np.ndarray, " steps"]:
    """One number a step: the median over places, where a series has places."""
    others = [dim for dim in series.dims if dim != "step"]
    values = series.astype(np.float64)
    return np.asarray(values.median(others) if others else values)


def _summary(values: Float[np.ndarray, " steps"]) -> tuple[float, float, float]:
    if not values.size:
        return np.nan, np.nan, np.nan
    finite = values[np.isfinite(values)]
    least, most = (float(finite.min()), float(finite.max())) if finite.size else (np.nan, np.nan)
    return float(values[-1]), least, most


def state_of(record: Record) -> str:
    """Running, ended, failed or broken off, and the last step."""
    ends = {event.kind: event.message for event in record.events if event.kind in ("start", "exception", "end")}
    if record.is_live():
        state = "running"
    elif "exception" in ends:
        state = f"failed: {ends['exception']}"
    else:
        # A watch notes its end; one that was killed could not.
        state = "broken off" if "start" in ends and "end" not in ends else "ended"
    step = record.last_step()
    return plain(f"{state}, last step {step}" if step is not None else f"{state}, nothing measured yet")


def _headline(record: Record) -> Text:
    models = [plain(event.message) for event in record.events if event.kind == "model"]
    return Text(" · ".join([state_of(record), *models]), style="dim")


def _json_number(value: Any) -> Any:
    if isinstance(value, (bool, str)) or value is None:
        return value
    if isinstance(value, (int, float, np.number)):
        return float(value) if np.isfinite(value) else str(float(value))
    return str(value)
