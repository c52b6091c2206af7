"""Figures of `scan-and-snap`: attention over training, the snap, both learning rates, and real text."""

from collections.abc import Sequence

import altair as alt
import numpy as np

from dynascope.findings.scan_snap import detect_snap
from dynascope.report import Chart, draw
from dynascope.studies.harness import Runs
from dynascope.studies.scan_and_snap.claims import MODELS
from dynascope.studies.scan_and_snap.synthetic import RATES, RATIOS

TEXTS = MODELS | {"yz-stack": "the paper's model, two blocks"}
SHOWN = 30
"""Tokens of the map: ten common ones, then the ten distinct ones of each class."""


def figures(runs: Sequence[Runs]) -> list[Chart]:
    """The paper's attention map and entropy panels, the mass over training, and the same on text."""
    return [attention_map(runs), masses(runs), panels(runs), text_entropy(runs), text_words(runs)]


def attention_map(runs: Sequence[Runs]) -> Chart:
    """Attention of both classes, token by token, over the first hundred steps."""
    mixture = runs[0]["scan"]["mixture"]
    mixture = mixture[mixture.step <= 100]
    mixture = mixture[np.unique(np.linspace(0, len(mixture) - 1, 51).round().astype(int))]
    ends = np.append(mixture.step.values[1:], mixture.step.values[-1] + 2)
    rows = [
        {
            "token": token,
            "next token": token + 1,
            "step": int(step),
            "end": int(end) + 0.3,  # under the next cell, so that the ground does not show between them
            "attention": float(f"{value:.4g}"),
            "class": f"sequences of class {place + 1}",
        }
        for step, end, table in zip(mixture.step.values, ends, mixture.values, strict=True)
        for place, row in enumerate(table)
        for token, value in enumerate(row[:SHOWN])
    ]
    chart = (
        alt.Chart(width=230, height=300)
        .mark_rect()
        .encode(
            x=alt.X("step:Q", title="step", scale=alt.Scale(nice=False)),
            x2="end:Q",
            y=alt.Y(
                "token:Q",
                title="token: 0–9 common, 10–19 distinct of class 1, 20–29 of class 2",
                scale=alt.Scale(reverse=True, nice=False, domain=[0, SHOWN]),
            ),
            y2="next token:Q",
            color=alt.Color("attention:Q", title="attention", scale=alt.Scale(scheme="viridis")),
            column=alt.Column("class:N", title=None),
        )
    )
    told = "Common tokens fade, distinct ones gain in the order of their frequency. First repetition of the first seed."
    return draw("What attention is made of while it scans", told, rows, chart)


def masses(runs: Sequence[Runs]) -> Chart:
    """Common mass and entropy over log step, with the snap."""
    names = {"common_mass": "attention on common tokens", "entropy": "entropy of attention (nats)"}
    sampled = "SGD on sampled sequences"
    rows = []
    for seed, records in enumerate(runs):
        for name, what in names.items():
            mean = records["scan"][name].mean("dim_1")
            for repetition, curve in enumerate(mean.values.T):
                rows += _curve(mean.step.values, curve, what, sampled, f"{seed} {repetition}")
    limits = {"momentum": "infinite length, momentum 0.9", "flow": "infinite length, no momentum, ten times the rates"}
    for name, who in limits.items():
        for part, what in names.items():
            series = runs[0]["population"][f"{name}/{part}"].mean("dim_0")
            rows += _curve(series.step.values, series.values, what, who, "")
    report = detect_snap(runs[0]["scan"]["common_mass"].mean(("dim_0", "dim_1")))
    snaps = [] if report is None else [report.step]
    rows += [{"snap": step + 1, "what": what, "who": sampled} for step in snaps for what in names.values()]
    x = alt.X("place:Q", scale=alt.Scale(type="log", nice=False), title="1 + step")
    base = alt.Chart(width=250, height=220)
    colour = alt.Color("who:N", title=None, legend=alt.Legend(orient="bottom", columns=1, labelLimit=300))
    lines = (
        base.transform_filter("isValid(datum.place)")
        .mark_line(strokeWidth=1.2, opacity=0.7)
        .encode(x=x, y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False)), color=colour, detail="line:N")
    )
    rule = base.transform_filter("isValid(datum.snap)").mark_rule(strokeDash=[4, 3]).encode(x="snap:Q")
    chart = (
        alt.layer(lines, rule, data=alt.NamedData("rows"))
        .facet(column=alt.Column("what:N", title=None))
        .resolve_scale(y="independent")
    )
    at = f"Dashed: the snap that `detect_snap` tells, step {snaps[0]}." if snaps else "`detect_snap` tells no snap."
    return draw("Attention scans, then snaps", f"One line a repetition. {at}", rows, chart)


def panels(runs: Sequence[Runs]) -> Chart:
    """Entropy over the ratio of the rates, for every number of queries."""
    rows, falls = [], []
    for arm in (name for name in runs[0] if name.startswith("grid-")):
        entropy = np.concatenate([records[arm]["entropy"].values[-1] for records in runs])
        mean, error = entropy.mean(0), entropy.std(0)
        queries = int(arm.removeprefix("grid-"))
        falls.append(np.diff(mean, axis=1) < 0)
        rows += [
            {
                "ratio": ratio,
                "entropy": float(mean[i, j]),
                "low": float(mean[i, j] - error[i, j]),
                "high": float(mean[i, j] + error[i, j]),
                "rate": f"{rate:g}",
                "queries": queries,
            }
            for i, rate in enumerate(RATES)
            for j, ratio in enumerate(RATIOS)
        ]
    base = alt.Chart(width=170, height=200)
    x = alt.X("ratio:Q", scale=alt.Scale(type="log", nice=False), title="decoder's rate over attention's")
    x = x.axis(values=list(RATIOS))
    colour = alt.Color("rate:N", title="attention's rate", legend=alt.Legend(orient="bottom"))
    scale = alt.Scale(zero=False)
    lines = base.mark_line(point=True).encode(
        x=x, y=alt.Y("entropy:Q", scale=scale, title="entropy of attention (nats)"), color=colour
    )
    bars = base.mark_rule().encode(x=x, y=alt.Y("low:Q", scale=scale), y2="high:Q", color=colour)
    chart = alt.layer(lines, bars, data=alt.NamedData("rows")).facet(
        facet=alt.Facet("queries:O", title="queries"), columns=2
    )
    told = (
        "After 100 steps; bars are one standard deviation over repetitions. From one ratio to the next entropy rises in "
        f"{np.size(falls) - np.sum(falls)} of {np.size(falls)} places and falls in {np.sum(falls)}."
    )
    return draw("Both learning rates decide how sparse attention becomes", told, rows, chart)


def text_entropy(runs: Sequence[Runs]) -> Chart:
    """Normalised entropy on text over log step."""
    rows = []
    for seed, records in enumerate(runs):
        for model, who in TEXTS.items():
            entropy = records[f"text-{model}"]["scan/entropy"].mean("head")
            for layer, values in enumerate(entropy.values.T):
                told = f"{who}: block {layer + 1}" if entropy.sizes["layer"] > 1 else who
                rows += _curve(entropy.step.values, values, "entropy", told, f"{model} {seed}")
    chart = (
        alt.Chart(width=430, height=230)
        .mark_line(strokeWidth=1.4)
        .encode(
            x=alt.X("place:Q", scale=alt.Scale(type="log", nice=False), title="1 + step"),
            y=alt.Y("value:Q", title="entropy over log of visible words", scale=alt.Scale(zero=False)),
            color=alt.Color("who:N", title=None, legend=alt.Legend(orient="bottom", columns=2, labelLimit=300)),
            detail="line:N",
        )
    )
    told = "One line a seed; 1 is uniform attention. Last tenth of the text."
    return draw("Entropy of attention on real text", told, rows, chart)


def text_words(runs: Sequence[Runs]) -> Chart:
    """Change of attention on each word against how common it is."""
    rows = []
    for model, who in TEXTS.items():
        record = runs[0][f"text-{model}"]
        commonness, change = (record[name].values[-1] for name in ("commonness", "attention_change"))
        known = np.flatnonzero(np.isfinite(commonness) & np.isfinite(change))
        rows += [{"common": float(commonness[i]), "change": float(change[i]), "who": who} for i in known]
    chart = (
        alt.Chart(width=190, height=220)
        .mark_circle(size=9, opacity=0.5)
        .encode(
            x=alt.X("common:Q", title="commonness of the word", scale=alt.Scale(zero=False)),
            y=alt.Y("change:Q", title="change of ln(attention over uniform)"),
            column=alt.Column("who:N", title=None, sort=list(TEXTS.values())),
        )
    )
    return draw("Words that attention turns to", "One point a word, first seed.", rows, chart)


def _curve(steps: np.ndarray, values: np.ndarray, what: str, who: str, line: str) -> list[dict[str, object]]:
    return [
        {"place": int(step) + 1, "value": float(f"{value:.5g}"), "what": what, "who": who, "line": f"{who} {line}"}
        for step, value in zip(steps, values, strict=True)
    ]
