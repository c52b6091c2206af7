"""A comparison in the terminal and as one page: a table with intervals, and what happened on the way."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
from rich.console import Console
from rich.table import Table

from dynascope.report import Chart, draw
from dynascope.report.charts import PALETTE, Section
from dynascope.report.page import check_output, whole_page, write
from dynascope.report.pictures import QUIET, TextPage
from dynascope.studies.comparison.measures import Comparison, Estimate
from dynascope.studies.harness.curves import Rows, curves, tries, with_intervals

COLUMNS = {
    "reward": "reward",
    "correct": "right",
    "pass_at_most": "pass@most",
    "chain": "chains",
    "length": "tokens",
    "kl_start": "KL",
    "entropy": "entropy",
    "clipped": "clipped",
    "demonstrations": "shown",
    "tokens_per_second": "tokens/s",
}
EXPLAINED = (
    "reward: of the last tenth of the rollouts; right: share of right answers at the end; pass@most: chance that one of the "
    "most tries is right; chains: share whose every step is right; KL to the start model and entropy in nats a token; shown: "
    "demonstrations used; ±: half the 95 % interval over seeds (Student's t), of so many seeds where some have no number; "
    "leads are of right answers over the first objective, paired by seeds"
)

BANDS = "Means over seeds; bands are their 95 % intervals."

CURVES = {
    "Reward": ("Learning", "rollout/reward", "Of a rollout."),
    "Loss": ("Learning", "loss", "Of the pairs of a step; losses of different objectives are no rivals."),
    "Right answers": ("Learning", "test/correct", "Share, on problems that are always the same."),
    "Right chains": ("Learning", "test/chain", "Share of answers whose every step is right."),
    "Entropy": ("Health", "policy/entropy", "Of the next token, in nats."),
    "Length": ("Health", "test/length", "Mean tokens of a completion."),
    "At the length limit": ("Health", "test/truncated", "Share of completions; healthy below 0.05."),
    "KL to the start model": ("Health", "test/kl_start", "A token, in nats."),
    "Clipped from above": ("Health", "policy/clip/high", "Share of tokens whose gradient the clip took."),
    "Clipped from below": ("Health", "policy/clip/low", "Share of tokens whose gradient the clip took."),
    "Demonstrations": ("Learning", "demonstrations/used", "Used so far; the others learn from rewards alone."),
    "Gradient norm": ("Health", "gradient_norm", "Before it is clipped."),
    "Chosen answers": ("Pairs", "logps/chosen", "Log-probability, in nats; a loss of pairs may lower both sides."),
    "Rejected answers": ("Pairs", "logps/rejected", "Log-probability, in nats."),
    "Tokens a second": ("Speed", "rollout/tokens_per_second", "Whole steps; runs side by side share the machine."),
}
"""Titles of the charts over steps: section, series, subtitle."""


def print_comparison(comparison: Comparison, console: Console) -> None:
    """The table, what failed, and where the records are."""
    console.print(f"[bold]{comparison.task}[/], preset {comparison.preset}, {len(comparison.runs)} seeds")
    if any(comparison.runs):
        console.print(f"right answers before training: {comparison.start:.3f}\n", highlight=False)
    table = Table(
        "objective", *_shown(comparison).values(), "lead", box=None, header_style="bold", padding=(0, 1, 0, 0)
    )
    for row in _rows(comparison):
        table.add_row(*row)
    console.print(table, highlight=False)
    console.print(EXPLAINED, style="dim", highlight=False)
    for unit, why in comparison.failures.items():
        console.print(f"{unit} failed: {why}", style="red", markup=False)


def _shown(comparison: Comparison) -> dict[str, str]:
    """The columns that at least one objective has a number for."""
    return {
        measure: title
        for measure, title in COLUMNS.items()
        if any(comparison.measure(name, measure) for name in comparison.objectives)
    }


def _rows(comparison: Comparison) -> list[list[str]]:
    columns, first = _shown(comparison), comparison.objectives[0]
    return [
        [
            name,
            *(_told(comparison.measure(name, measure), len(comparison.runs)) for measure in columns),
            "" if name == first else _told(comparison.lead(name), len(comparison.runs), sign="+"),
        ]
        for name in comparison.objectives
    ]


def _told(estimate: Estimate | None, seeds: int, sign: str = "") -> str:
    if estimate is None:
        return "–"
    told = _short(estimate.mean, sign)
    if estimate.ci95 is not None:
        told += f"±{_short((estimate.ci95[1] - estimate.ci95[0]) / 2)}"
    return told if estimate.num_samples == seeds else f"{told} ({estimate.num_samples} of {seeds})"


def _short(value: float, sign: str = "") -> str:
    """Few characters: 0.031 as .031, and 10315 as 10.3k."""
    if abs(value) >= 1000:
        return f"{value / 1000:{sign}.3g}k"
    return f"{value:{sign}.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:{sign}.3g}"


def write_comparison(comparison: Comparison, output: str | Path) -> Path:
    """The page as .html or .pdf, or its pictures into a folder. Raises ValueError for another suffix.

    >>> write_comparison(Comparison.load("runs/compare/arithmetic/small-1a2b3c4d"), "comparison.html")
    """
    check_output(output)
    drawn = figures(comparison)
    title = f"{', '.join(comparison.objectives)} on {comparison.task}"
    return write(
        output,
        drawn,
        page=lambda: whole_page(title, _facts(comparison), [_table(comparison)], {"result": "Result"}, drawn),
        first_page=lambda: _first_page(title, comparison),
    )


def figures(comparison: Comparison) -> list[Section]:
    """Every chart that there is something to draw in."""
    sections: dict[str, list[Chart]] = {}
    for title, (section, series, subtitle) in CURVES.items():
        rows = _over_steps(comparison, series)
        if rows:
            sections.setdefault(section, []).append(
                draw(title, f"{subtitle} {BANDS}", with_intervals(rows, "step"), _lines(comparison))
            )
    if any(comparison.runs):
        sections["Learning"].append(_pass_at_k(comparison))
    return [Section(title, charts) for title, charts in sections.items()]


def _over_steps(comparison: Comparison, series: str) -> Rows:
    """A series of every objective that has it."""
    return [
        row
        for name in comparison.objectives
        for row in curves([one for one in comparison.runs if name in one and series in one[name]], name, {series: name})
    ]


def _colour(names: Sequence[str]) -> dict[str, Any]:
    """A colour an objective, and dashes where there are more objectives than colours."""
    legend = alt.Legend(orient="top", columns=4, symbolOpacity=1, symbolType="stroke")
    colours = [PALETTE[place % len(PALETTE)] for place in range(len(names))]
    dashes = [[1, 0] if place < len(PALETTE) else [4, 2] for place in range(len(names))]
    return {
        "color": alt.Color("what:N", title=None, legend=legend, scale=alt.Scale(domain=names, range=colours)),
        "strokeDash": alt.StrokeDash("what:N", title=None, legend=None, scale=alt.Scale(domain=names, range=dashes)),
    }


def _lines(comparison: Comparison) -> alt.LayerChart:
    return _banded(alt.X("step:Q", title="step"), _colour(comparison.objectives))


def _banded(x: alt.X, told: dict[str, Any], **line: Any) -> alt.LayerChart:
    band = alt.Chart().mark_area(opacity=0.12).encode(x=x, y="low:Q", y2="high:Q", color=told["color"])
    means = alt.Y("mean:Q", title=None, scale=alt.Scale(zero=False))
    return band + alt.Chart().mark_line(**line).encode(x=x, y=means, **told)


def _pass_at_k(comparison: Comparison) -> Chart:
    """pass@k at the end, and before training."""
    names = {name: name for name in comparison.objectives}
    # All start alike, so that any one tells of a seed's time before.
    before = tries(comparison.runs, dict.fromkeys(names, "before training"), place=0)
    rows = tries(comparison.runs, names) + list({(row["k"], row["seed"]): row for row in before}.values())
    ks = sorted({int(str(row["k"])) for row in rows})
    x = alt.X("k:Q", scale=alt.Scale(type="log", base=2), title="answers (k)", axis=alt.Axis(values=ks, format="d"))
    chart = _banded(x, _colour([*comparison.objectives, "before training"]), point=True)
    subtitle = f"Chance that one of k answers is right, at the end. {BANDS}"
    return draw("pass@k", subtitle, with_intervals(rows, "k"), chart)


def _facts(comparison: Comparison) -> str:
    facts = {
        "task": comparison.task,
        "preset": comparison.preset,
        "seeds": str(len(comparison.runs)),
        "right before training": f"{comparison.start:.3f}" if any(comparison.runs) else "unknown",
        "took": f"{comparison.wall_seconds:.0f} s",
    }
    return "".join(f"<div><dt>{name}</dt><dd>{html.escape(fact)}</dd></div>" for name, fact in facts.items())


def _table(comparison: Comparison) -> str:
    heads = ["objective", *_shown(comparison).values(), "lead"]
    rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in _rows(comparison)]
    failed = "".join(f"<p>{html.escape(f'{unit} failed: {why}')}</p>" for unit, why in comparison.failures.items())
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    told = f"<p>{html.escape(EXPLAINED)}.</p>"
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<section id="result"><h2>Result</h2>{told}<table><tr>{head}</tr>{body}</table>{failed}</section>'


def _first_page(title: str, comparison: Comparison) -> dict[str, Any]:
    page = TextPage(title)
    page.add(f"preset {comparison.preset}, {len(comparison.runs)} seeds", colour=QUIET)
    heads = [*_shown(comparison).values(), "lead"]
    for name, *cells in _rows(comparison):
        page.add("")
        page.add(name)
        page.add(
            "; ".join(f"{head}: {cell}" for head, cell in zip(heads, cells, strict=True) if cell), 14, colour=QUIET
        )
    return page.spec()
