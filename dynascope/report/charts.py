"""One grammar of charts for the page, the live page, PNG, SVG and PDF.

A chart is a Vega-Lite specification whose data sets are named, and the rows of those data sets: so the live page
sends rows alone, and a file takes both.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import altair as alt

from dynascope.record import Record, Series
from dynascope.report import dataset_map
from dynascope.report.rows import MAX_PLACES_AS_LINES, Rows, finding_rows, heat_rows, left_out, line_rows, sizes_of
from dynascope.report.terminal import plain

WIDTH, HEIGHT, MAX_HEIGHT = 460, 190, 420

# Okabe and Ito's palette, which colour-blind readers tell apart and which shows on light and dark ground.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C8C", "#B8A800")
NOT_FINITE = "#D4003C"


def _theme(ink: str, quiet: str, line: str) -> dict[str, Any]:
    axis = {"labelColor": quiet, "titleColor": quiet, "domainColor": line, "tickColor": line, "gridColor": line}
    text = {"labelColor": ink, "titleColor": quiet, "titleFontWeight": "normal"}
    return {
        "background": None,
        "font": "system-ui, sans-serif",
        "view": {"stroke": None},
        "axis": {**axis, "titleFontWeight": "normal", "gridOpacity": 0.6},
        "legend": text,
        "title": {"color": ink, "subtitleColor": quiet, "fontSize": 13},
        "concat": {"spacing": 12},
        "header": {"labelColor": ink, "titleColor": quiet, "titleFontWeight": "normal"},
        "range": {"category": list(PALETTE)},
    }


THEMES = {
    "light": {**_theme("#1c2024", "#5d666f", "#dfe3e6"), "background": "#ffffff"},
    "dark": _theme("#e8ebed", "#a0a9b1", "#3a4147"),
}

# By the first part of a series' name, or by its whole name, which counts first.
SECTIONS: dict[str, tuple[str, ...]] = {
    "Loss and learning rate": ("loss", "eval", "val", "train", "test", "learning_rate"),
    "Gradients": ("gradients", "gradient_norm"),
    "Weights and updates": ("weights", "updates", "adam"),
    "Attention": ("attention", "scan", "circuits", "extreme"),
    "Activations and residual stream": ("activations", "residual"),
    "Curvature": ("curvature",),
    "Tangent kernel": ("kernel", "modes"),
    "Ensemble": ("ensemble",),
    "Learning in context": ("mesa", "mamba"),
    "Preferences": ("logps", "rewards", "entanglement"),
    "What the policy can do": (
        "test/correct",
        "test/pass_at_k",
        "test/chain",
        "test/length",
        "test/truncated",
        "test/kl_start",
        "difficulty",
        "reasoning",
        "prior",
        "bandit",
        "sft",
        "judge",
    ),
    "Rollouts": ("rollout", "behaviours"),
    "Policy updates": (
        "policy",
        "advantage",
        "demonstrations",
        "teacher",
        "thr",
        "risk",
        "weight",
        "clip_by_entropy",
        "covariance",
    ),
    "Time and memory": ("time", "throughput", "memory"),
}
OWN = "Logged by the run"

# Scalars that are read against each other share a chart.
TOGETHER: dict[str, tuple[str, ...]] = {
    "Loss": ("loss", "eval/loss", "val/loss", "test/loss"),
    "Sharpness and the edge of stability": ("curvature/sharpness", "curvature/edge"),
    "Gradient norm": ("gradients/total_norm_unclipped", "gradients/total_norm"),
    "Memory": ("memory/resident", "memory/device"),
    "Length of completions": (
        "rollout/length",
        "rollout/length_right",
        "rollout/length_wrong",
        "rollout/length_stopped",
    ),
    "Prompts by their answers": ("rollout/learnable", "rollout/solved", "rollout/unsolved"),
    "Clipped tokens": ("policy/clip/low", "policy/clip/high"),
    "Demonstrations": ("demonstrations/used", "demonstrations/distinct"),
}


@dataclass(frozen=True)
class Chart:
    """One chart: its specification without data, and its rows by data set."""

    title: str
    subtitle: str
    spec: dict[str, Any]
    data: dict[str, Rows] = field(repr=False)

    def whole(self) -> dict[str, Any]:
        """The specification complete with its title and its data, as a file wants it."""
        title = {"text": self.title, "subtitle": textwrap.wrap(self.subtitle, 90), "anchor": "start"}
        return {**self.spec, "title": title, "datasets": self.data}


@dataclass(frozen=True)
class Section:
    """Charts that belong together."""

    title: str
    charts: list[Chart]


def draw(title: str, subtitle: str, rows: Rows, chart: Any) -> Chart:
    """A chart of your own in the same look: an Altair chart without data, and the rows that it shows.

    Numbers that are not finite become gaps.

    >>> rows = [{"step": 1, "risk": 0.5}, {"step": 10, "risk": 0.2}]
    >>> draw("Risk", "Of the trained model.", rows, alt.Chart().mark_line().encode(x="step:Q", y="risk:Q"))
    """
    whole = chart.copy(deep=True)
    whole.data = alt.NamedData("rows")
    finite = [
        {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}
        for row in rows
    ]
    return Chart(plain(title), plain(subtitle), _finished(whole), {"rows": finite})


def sections(records: Mapping[str, Record]) -> list[Section]:
    """Every series of a run as charts; with several runs (by label) the same charts compare them.

    >>> [section.title for section in sections({"demo": dynascope.open("runs/demo")})]
    """
    drawn = [Section(title, [_drawn(records, one) for one in planned]) for title, planned in plan(records).items()]
    for record in records.values() if len(records) == 1 else ():
        if dataset_map.PREFIX + "id" in record:
            drawn.append(Section("Examples", _of_examples(record)))
    return drawn


@dataclass(frozen=True)
class Planned:
    """A chart before its data is read: the series that it shows, the first of which gives it its unit."""

    title: str
    names: tuple[str, ...]
    kind: Literal["lines", "heat"]

    def rows(self, records: Mapping[str, Record], since: Mapping[str, int] | None = None) -> dict[str, Rows]:
        """Its rows by data set; with `since`, those of the series named there, from their steps on."""
        names = [name for name in self.names if since is None or name in since]
        merged: dict[str, Rows] = {}
        for name in names:
            start = since[name] if since is not None else None
            made = heat_rows(records, name, start) if self.kind == "heat" else line_rows(records, name, start)
            for key, rows in made.items():
                merged.setdefault(key, []).extend(rows)
        return merged


def plan(records: Mapping[str, Record]) -> dict[str, list[Planned]]:
    """The charts of each section, without their data; sections with none are left out."""
    infos = _declarations(records)
    planned: dict[str, list[Planned]] = {title: [] for title in (*SECTIONS, OWN)}
    alone = next(iter(records.values())) if len(records) == 1 else None
    for title, names in _charts_of(infos):
        kind: Literal["lines", "heat"] = "heat" if alone is not None and _is_heat(alone, names[0]) else "lines"
        planned[_section_of(names[0])].append(Planned(title, names, kind))
    return {title: charts for title, charts in planned.items() if charts}


def _of_examples(record: Record) -> list[Chart]:
    rows = {"examples": dataset_map.example_rows(record)}
    told = "Each point is an example; those that are easy stand above, hard or mislabelled ones below on the left."
    return [
        Chart("Map of the dataset", told, dataset_map.map_spec(), rows),
        Chart(
            "How hard the examples are", "0 is right and sure, √2 wrong and sure.", dataset_map.hardness_spec(), rows
        ),
    ]


def _declarations(records: Mapping[str, Record]) -> dict[str, Series]:
    infos: dict[str, Series] = {}
    for record in records.values():
        new = [name for name in record.names() if name not in infos and not name.startswith(dataset_map.PREFIX)]
        infos |= {name: record.info(name) for name in new}
    return infos


def _drawn(records: Mapping[str, Record], planned: Planned) -> Chart:
    infos = [record.info(name) for name in planned.names for record in records.values() if name in record]
    data = planned.rows(records) | {"findings": finding_rows(records, planned.names)}
    spec = (
        _heat_spec(infos[0], data)
        if planned.kind == "heat"
        else _line_spec(infos[0], planned.names, data, num_runs=len(records))
    )
    told = [info.description for info in infos]
    if planned.kind == "heat":
        told.append(left_out(next(iter(records.values())), planned.names[0]))
    subtitle = " ".join(dict.fromkeys(filter(None, told)))
    return Chart(plain(planned.title), plain(subtitle), spec, data)


# Specifications


def _line_spec(info: Series, names: tuple[str, ...], data: dict[str, Rows], num_runs: int) -> dict[str, Any]:
    values = [end for row in data["lines"] for end in (row["low"], row["high"])]
    labels = list(dict.fromkeys(row["line"] for row in data["lines"] + data["broken"]))
    look = {"title": plain(info.unit) or None, "scale": _scale(values), "axis": _axis(values)}
    y = alt.Y("value:Q", **look)
    x = _step_axis()
    colour = alt.Color(
        "line:N",
        sort=None,
        title=None,
        scale=alt.Scale(
            domain=labels or ["none"], range=[PALETTE[i % len(PALETTE)] for i in range(max(1, len(labels)))]
        ),
        legend=alt.Legend(orient="top", labelLimit=320, columns=2, symbolType="stroke", symbolOpacity=1)
        if len(labels) > 1
        else None,
    )
    tooltip = [alt.Tooltip("line:N", title="series"), alt.Tooltip("step:Q"), alt.Tooltip("value:Q", format=".5g")]
    base = alt.Chart(alt.NamedData("lines"))
    layers: list[alt.Chart] = []
    if any(row["low"] != row["high"] for row in data["lines"]):
        layers.append(
            base.mark_area(opacity=0.18).encode(x=x, y=alt.Y("low:Q", **look), y2=alt.Y2("high:Q"), color=colour)
        )
    line = base.mark_line(strokeWidth=1.6, clip=True).encode(
        x=x, y=y, color=colour, detail=alt.Detail("series:N"), tooltip=tooltip
    )
    if num_runs > 1 and len(names) > 1:
        dash = alt.Scale(domain=[plain(name) for name in names], range=[[1, 0], [5, 3], [1, 3], [8, 3, 1, 3]])
        line = line.encode(
            strokeDash=alt.StrokeDash("series:N", title=None, scale=dash, legend=alt.Legend(orient="top"))
        )
    layers.append(line)
    if len({row["step"] for row in data["lines"]}) <= 30:
        layers.append(base.mark_point(size=22, filled=True).encode(x=x, y=y, color=colour, tooltip=tooltip))
    broken = alt.Chart(alt.NamedData("broken")).mark_text(text="✕", color=NOT_FINITE, fontSize=13, fontWeight="bold")
    layers.append(broken.encode(x=x, y=alt.YValue(16), tooltip=_told("text:N", "step:Q", "line:N")))
    return _finished(alt.layer(*layers, *_finding_layers(x), width=WIDTH, height=HEIGHT))


def _heat_spec(info: Series, data: dict[str, Rows]) -> dict[str, Any]:
    values = [row["value"] for row in data["cells"]]
    every = data["cells"] + data["broken"]
    places = list(dict.fromkeys(row["place"] for row in every))
    panels = list(dict.fromkeys(row["panel"] for row in every))
    num_columns = 1 if len(panels) == 1 else 2
    most = MAX_HEIGHT if num_columns == 1 else HEIGHT
    # Bands of whole pixels have no seams between them.
    height = min(most, max(60, len(places) * max(1, min(15, most // max(1, len(places))))))
    width = WIDTH if num_columns == 1 else WIDTH // 2 - 20
    x = _step_axis()
    limit = 200 if num_columns == 1 else 60
    axis = alt.Axis(labelLimit=limit, labelOverlap="parity", ticks=False, domain=False, labelFontSize=9)
    y = alt.Y("place:N", sort=None, scale=alt.Scale(domain=places), title=None, axis=axis)
    colour = alt.Color(
        "value:Q",
        title=plain(info.unit) or None,
        scale=_scale(values, scheme="viridis"),
        legend=alt.Legend(orient="right", gradientLength=min(height, 120), format=_legend_format(values)),
    )
    tooltip = [alt.Tooltip("place:N"), alt.Tooltip("step:Q"), alt.Tooltip("value:Q", format=".5g")]
    drawn = []
    for panel in panels:
        is_here = alt.datum.panel == panel
        cells = alt.Chart(alt.NamedData("cells")).transform_filter(is_here).mark_rect(clip=True, x2Offset=0.6)
        broken = (
            alt.Chart(alt.NamedData("broken"))
            .transform_filter(is_here)
            .mark_rect(color=NOT_FINITE, clip=True, x2Offset=0.6)
        )
        layers = [
            cells.encode(x=x, x2=alt.X2("end:Q"), y=y, color=colour, tooltip=tooltip),
            broken.encode(x=x, x2=alt.X2("end:Q"), y=y, tooltip=_told("place:N", "step:Q", "text:N")),
            *_finding_layers(x),
        ]
        heading = {"title": alt.Title(panel, fontSize=11, fontWeight="normal")} if panel else {}
        drawn.append(alt.layer(*layers, width=width, height=height, **heading))
    return _finished(drawn[0] if len(drawn) == 1 else alt.concat(*drawn, columns=num_columns))


def _finding_layers(x: alt.X) -> list[alt.Chart]:
    """Findings on the time axis: a rule through the chart, and a numbered flag that tells when pointed at."""
    severity = alt.Color("colour:N", scale=None)
    base = alt.Chart(alt.NamedData("findings")).encode(x=x, tooltip=_told("text:N", "step:Q"))
    rule = base.mark_rule(strokeDash=[4, 3], strokeWidth=1.2).encode(color=severity)
    flag = base.mark_point(shape="circle", size=150, filled=True, opacity=1).encode(y=alt.YValue(0), color=severity)
    number = base.mark_text(fontSize=9, fontWeight="bold", color="#14171a", dy=0.5).encode(
        y=alt.YValue(0), text=alt.Text("number:N")
    )
    return [rule, flag, number]


def _told(*fields: str) -> list[alt.Tooltip]:
    # Altair takes strings and `alt.value` too, and then spends most of its time on finding out what they are.
    return [alt.Tooltip(field) for field in fields]


def _finished(chart: Any) -> dict[str, Any]:
    """The specification as plain values, without a theme: page and file bring theirs."""
    spec: dict[str, Any] = chart.to_dict(validate=False)
    del spec["config"]
    return spec


def _step_axis() -> alt.X:
    # There is no step one and a half.
    whole = "datum.value == floor(datum.value) ? datum.label : ''"
    axis = alt.Axis(format="~s", tickCount=6, labelExpr=whole, grid=False)
    return alt.X("step:Q", title="step", axis=axis, scale=alt.Scale(nice=False, zero=False))


def _scale(values: Sequence[float], **more: Any) -> alt.Scale:
    if _is_log(values):
        return alt.Scale(type="log", nice=False, **more)
    return alt.Scale(zero=False, **more)


def _axis(values: Sequence[float]) -> alt.Axis:
    if _is_log(values):
        first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        # A run that is followed goes on beyond what is drawn now.
        return alt.Axis(format=".4~g", values=[10.0**power for power in range(first - 3, last + 4)])
    is_large = any(abs(value) >= 1e5 for value in values)
    return alt.Axis(format="~s" if is_large else ".4~g", tickCount=5)


def _legend_format(values: Sequence[float]) -> str:
    """As many digits as tell the ends of a legend apart."""
    most = max(map(abs, values), default=0.0)
    if most >= 1e5:
        return ".3~s"
    return ".3~g" if not values or max(values) - min(values) > 0.1 * most else ".4~g"


def _is_log(values: Sequence[float]) -> bool:
    """Whether the values are positive and span more than two decades."""
    return bool(values) and min(values) > 0 and max(values) > 100 * min(values)


# From series to charts


def _charts_of(infos: Mapping[str, Series]) -> list[tuple[str, tuple[str, ...]]]:
    """Which series share a chart, and its title."""
    charts = []
    taken: set[str] = set()
    for title, group in TOGETHER.items():
        names = tuple(name for name in group if name in infos and not infos[name].dims)
        if len(names) > 1:
            charts.append((title, names))
            taken |= set(names)
    return charts + [(name, (name,)) for name in infos if name not in taken]


def _section_of(name: str) -> str:
    parts = name.split("/")
    first = parts[1] if parts[0].startswith("optimizer") and len(parts) > 1 else parts[0]
    whole = next((title for title, names in SECTIONS.items() if name in names), None)
    return whole or next((title for title, firsts in SECTIONS.items() if first in firsts), OWN)


def _is_heat(record: Record, name: str) -> bool:
    """Whether a series has too many places for lines."""
    if name not in record or not record.info(name).dims:
        return False
    return math.prod(sizes_of(record, name)) > MAX_PLACES_AS_LINES
