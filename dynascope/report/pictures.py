"""Charts as files: PNG and SVG one by one, or a PDF with a page a section."""

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import vl_convert

from dynascope.record import Record
from dynascope.report.charts import THEMES, Chart, Section
from dynascope.report.rows import findings_of
from dynascope.report.terminal import plain

SCALE = 2.0
"""PNG pixels a point."""
# The flags' colours, darker: as letters they would be too pale on white.
INK, QUIET, GOOD = "#1c2024", "#5d666f", "#00845f"
SEVERITY_INKS = {"critical": "#b34700", "warning": "#8a5c00", "info": "#1f6f9f"}


def write_folder(drawn: Sequence[Section], folder: Path) -> None:
    """One PNG and one SVG a chart, named after it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, chart in enumerate(chart for section in drawn for chart in section.charts):
        name = f"{number:02d}-{re.sub('[^a-z0-9]+', '-', chart.title.lower()).strip('-')[:60]}"
        (folder / f"{name}.png").write_bytes(png(chart))
        svg = vl_convert.vegalite_to_svg(chart.whole(), config=THEMES["light"])
        (folder / f"{name}.svg").write_text(svg, encoding="utf-8")


def png(chart: Chart) -> bytes:
    """A chart as a PNG file's content."""
    content: bytes = vl_convert.vegalite_to_png(chart.whole(), scale=SCALE, config=THEMES["light"])
    return content


def write_pdf(first_page: dict[str, Any], drawn: Sequence[Section], output: Path) -> None:
    """A first page, then a page a section."""
    from pypdf import PdfWriter

    book = PdfWriter()
    for spec in [first_page, *map(_section_page, drawn)]:
        book.append(io.BytesIO(vl_convert.vegalite_to_pdf(spec, config=THEMES["light"])))
    with output.open("wb") as file:
        book.write(file)


def _section_page(section: Section) -> dict[str, Any]:
    """A section's charts in two columns; their data sets keep apart by a prefix."""
    datasets: dict[str, Any] = {}
    charts = []
    for number, chart in enumerate(section.charts):
        whole = _renamed(chart.whole(), f"{number}-")
        datasets |= whole.pop("datasets")
        charts.append({key: value for key, value in whole.items() if key != "$schema"})
    return {
        "title": {"text": plain(section.title), "fontSize": 20, "anchor": "start", "offset": 16},
        "columns": 2,
        "spacing": 40,
        "concat": charts,
        "datasets": datasets,
        "resolve": {"scale": {"color": "independent", "strokeDash": "independent"}},
        "padding": 30,
    }


def _renamed(spec: Any, prefix: str) -> Any:
    """The specification with every data set's name prefixed."""
    if isinstance(spec, list):
        return [_renamed(part, prefix) for part in spec]
    if not isinstance(spec, dict):
        return spec
    renamed = {}
    for key, value in spec.items():
        if key == "data":
            renamed[key] = {**value, "name": prefix + value["name"]}
        elif key == "datasets":
            renamed[key] = {prefix + name: rows for name, rows in value.items()}
        else:
            renamed[key] = _renamed(value, prefix)
    return renamed


def findings_page(records: Mapping[str, Record]) -> dict[str, Any]:
    """The findings of all runs as a page of text."""
    page = TextPage("Findings")
    for run, record in records.items():
        page.add(f"{run}: last step {record.last_step()}")
    page.add("")
    found = findings_of(records)
    for number, (run, finding) in enumerate(found, 1):
        where = f"{run}, step" if len(records) > 1 else "step"
        page.add(f"{number}  {where} {finding.step}: {finding.message}", colour=SEVERITY_INKS[finding.severity])
        for line in finding.remedy.splitlines():
            page.add(line, 14, colour=QUIET)
    if not found:
        page.add("No findings: nothing looks unhealthy.", colour=GOOD)
    return page.spec()


class TextPage:
    """A page of lines for a PDF, wrapped and indented.

    >>> page = TextPage("Claims"); page.add("C1 holds", colour=GOOD); page.spec()
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._lines: list[dict[str, Any]] = []

    def add(self, text: str, indent: int = 0, colour: str = INK) -> None:
        """Add a paragraph."""
        for part in textwrap.wrap(plain(text), 110 - indent // 6) or [""]:
            self._lines.append({"text": part, "indent": indent, "line": len(self._lines), "colour": colour})

    def spec(self) -> dict[str, Any]:
        """The page as a chart."""
        return {
            "title": {"text": self._title, "fontSize": 20, "anchor": "start", "offset": 16},
            "data": {"values": self._lines},
            "width": 760,
            "height": 20 * len(self._lines),
            "padding": 30,
            "view": {"stroke": None},
            "mark": {"type": "text", "align": "left", "fontSize": 12},
            "encoding": {
                "x": {"field": "indent", "type": "quantitative", "scale": None, "axis": None},
                "y": {"field": "line", "type": "ordinal", "axis": None},
                "text": {"field": "text", "type": "nominal"},
                "color": {"field": "colour", "type": "nominal", "scale": None},
            },
        }
