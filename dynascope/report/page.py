"""The report: one page that works offline, a PDF, or a folder of pictures."""

import base64
import hashlib
import html
import json
import os
import re
import string
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from dynascope.record import Finding, Record, open_record
from dynascope.report.charts import THEMES, Section, sections
from dynascope.report.pictures import findings_page, write_folder, write_pdf
from dynascope.report.rows import findings_of
from dynascope.report.terminal import finding_as_json, state_of


def report(paths: Sequence[str | Path], output: str | Path) -> Path:
    """Write a report of one run, or a comparison of several, and return where it is.

    `output` says what: a `.html` file is self-contained and works offline; a `.pdf` has a page a section; any other
    name without a suffix is a folder for one PNG and one SVG a chart. Raises ValueError for another suffix, RecordError
    for a path that holds no record.

    >>> report(["runs/a", "runs/b"], "comparison.html")
    """
    check_output(output)
    records = labelled([open_record(path) for path in paths])
    drawn = sections(records)
    return write(output, drawn, page=lambda: document(records, drawn), first_page=lambda: findings_page(records))


def check_output(output: str | Path) -> None:
    """Raises ValueError for a suffix that no report has."""
    name = Path(output).name
    if Path(name).suffix not in (".html", ".pdf", ""):
        raise ValueError(f"a report is .html, .pdf or a folder; {name!r} is none of these")


def write(
    output: str | Path,
    drawn: Sequence[Section],
    *,
    page: Callable[[], str],
    first_page: Callable[[], dict[str, Any]],
) -> Path:
    """Charts as a page, a PDF behind its first page, or a folder of pictures, whichever `output` says."""
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".html":
        output.write_text(page(), encoding="utf-8")
    elif output.suffix == ".pdf":
        write_pdf(first_page(), drawn, output)
    else:
        write_folder(drawn, output)
    return output


def labelled(records: Sequence[Record]) -> dict[str, Record]:
    """Records by the shortest end of their paths that tells them apart."""
    for length in range(1, 1 + max(len(record.path.resolve().parts) for record in records)):
        labels = ["/".join(record.path.resolve().parts[-length:]) for record in records]
        if len(set(labels)) == len(labels):
            break
    else:
        raise ValueError("the same run is given twice; a comparison needs different runs")
    return dict(zip(labels, records, strict=True))


def document(records: Mapping[str, Record], drawn: Sequence[Section], stream: str = "") -> str:
    """The page of runs as HTML; with `stream`, an address on the same server, it follows the run."""
    lead = [f'<section id="findings">{findings_html(records)}</section>']
    if len(records) > 1:
        lead.append(_comparison(records))
    links = {"findings": "Findings"}
    return whole_page(" and ".join(records), _facts(records), lead, links, drawn, stream)


def whole_page(
    title: str,
    facts: str,
    lead: Sequence[str],
    links: Mapping[str, str],
    drawn: Sequence[Section],
    stream: str = "",
) -> str:
    """A page that works offline: `lead` is what stands before the charts, as HTML, and `links` its headings by id."""
    body = list(lead)
    anchors = [f'<a href="#{anchor}">{html.escape(heading)}</a>' for anchor, heading in links.items()]
    charts: list[dict[str, Any]] = []
    for number, section in enumerate(drawn):
        anchors.append(f'<a href="#section-{number}">{html.escape(section.title)}</a>')
        figures = []
        for chart in section.charts:
            caption = f"<h3>{html.escape(chart.title)}</h3><p>{html.escape(chart.subtitle)}</p>"
            name = html.escape(chart.title, quote=True)
            figures.append(
                f'<figure data-chart="{len(charts)}"><figcaption>{caption}</figcaption>'
                f'<div class="plot" role="img" aria-label="{name}"></div></figure>'
            )
            charts.append({"spec": chart.spec, "data": chart.data})
        heading = html.escape(section.title)
        body.append(
            f'<section><h2 id="section-{number}">{heading}</h2><div class="charts">{"".join(figures)}</div></section>'
        )
    if not drawn:
        body.append("<p>Nothing was measured yet.</p>")
    body.append("<footer>Made by Dynascope. ✕ marks values that are not finite.</footer>")
    library, script = vega(), asset("page.js")
    return string.Template(asset("page.html")).substitute(
        title=html.escape(title),
        policy=policy(library, script, connect=bool(stream)),
        style=asset("page.css"),
        stream=f' data-stream="{html.escape(stream, quote=True)}"' if stream else "",
        facts=facts,
        links="".join(anchors),
        body="\n".join(body),
        data=_packed({"charts": charts, "themes": THEMES}),
        library=library,
        script=script,
    )


def findings_html(records: Mapping[str, Record]) -> str:
    """The findings of all runs, worst first, every text in them escaped."""
    found = findings_of(records)
    if not found:
        return '<h2>Findings</h2><p class="healthy">No findings: nothing looks unhealthy.</p>'
    return "<h2>Findings</h2>" + "".join(
        _card(number, finding, run if len(records) > 1 else "") for number, (run, finding) in enumerate(found, 1)
    )


def _card(number: int, finding: Finding, run: str) -> str:
    told = finding_as_json(finding)
    evidence = ", ".join(f"{name.replace('_', ' ')} {_number(value)}" for name, value in told["evidence"].items())
    where = " · ".join(part for part in (run, finding.where, finding.series) if part)
    lines = [f"<h3><b>{number} · {finding.severity}</b> · step {finding.step} · {html.escape(finding.message)}</h3>"]
    lines += [
        f"<p>{html.escape(part)}</p>" for part in (where, f"{evidence} ({finding.source})" if evidence else "") if part
    ]
    if finding.remedy:
        remedy = html.escape(finding.remedy)
        lines.append(f'<div class="remedy"><pre>{remedy}</pre><button class="copy" type="button">copy</button></div>')
    return f'<article class="finding {finding.severity}">{"".join(lines)}</article>'


def _comparison(records: Mapping[str, Record]) -> str:
    heads = ("run", "last step", "last loss", "lowest loss", "median time a step (s)", "findings")
    rows = []
    for run, record in records.items():
        loss, seconds = _values(record, "loss"), _values(record, "time/step")
        finite = loss[np.isfinite(loss)]
        cells = [
            str(record.last_step()),
            _number(loss[-1]) if loss.size else "-",
            _number(finite.min()) if finite.size else "-",
            _number(np.median(seconds)) if seconds.size else "-",
            str(len(record.findings)),
        ]
        rows.append(f"<tr><td>{html.escape(run)}</td>{''.join(f'<td class=number>{cell}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th{' class=number' if place else ''}>{name}</th>" for place, name in enumerate(heads))
    return f'<section><h2 id="runs">Runs</h2><table><tr>{head}</tr>{"".join(rows)}</table></section>'


def _values(record: Record, name: str) -> np.ndarray:
    return record.series(name).values.ravel() if name in record else np.empty(0)


def _facts(records: Mapping[str, Record]) -> str:
    """How the run was started, where it stands; of a comparison only the number of runs."""
    if len(records) > 1:
        return f"<div><dt>comparison of</dt><dd>{len(records)} runs</dd></div>"
    record = next(iter(records.values()))
    config, events = record.config, record.events
    versions = {name: version for name, version in config.get("versions", {}).items() if version}
    facts = {
        "state": state_of(record),
        "command": " ".join(map(str, config.get("argv", []))),
        "model": next((event.message for event in events if event.kind == "model"), ""),
        "started": str(config.get("started", "")).replace("T", " ")[:16],
        "took": _duration(events[-1].time - events[0].time) if events and not record.is_live() else "",
        "with": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return "".join(
        f"<div><dt>{name}</dt><dd{' id=state' if name == 'state' else ''}>{html.escape(fact)}</dd></div>"
        for name, fact in facts.items()
        if fact
    )


def policy(*scripts: str, connect: bool = False) -> str:
    """A content policy under which only these scripts run and nothing is loaded from elsewhere.

    `connect` lets the page talk to the server that it came from.
    """
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{one}'" for one in hashes) or "'none'"
    more = "; connect-src 'self'" if connect else ""
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:{more}"


@cache
def vega() -> str:
    """The chart renderer's own code (Vega, Vega-Lite and Vega-Embed), for a page that works offline."""
    # Bundling takes a second and holds the interpreter's lock, under which the live page could answer nobody.
    command = "import sys, vl_convert; sys.stdout.write(vl_convert.javascript_bundle('window.vegaEmbed = vegaEmbed;'))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"}
    bundled = subprocess.run([sys.executable, "-c", command], capture_output=True, env=environment, check=True)
    # A script's end inside its text would end it for the browser too.
    return re.sub(r"</(?=script)", r"<\\/", bundled.stdout.decode(), flags=re.IGNORECASE)


@cache
def asset(name: str) -> str:
    """A template, style or script of the page."""
    return files("dynascope.report").joinpath("assets", name).read_text(encoding="utf-8").rstrip("\n")


def _packed(content: Any) -> str:
    """Content small and harmless inside a page, whatever names it holds."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode())).decode()


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float, np.number)) else str(value)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return time.strftime("%H:%M:%S" if seconds >= 3600 else "%M:%S", time.gmtime(seconds))
