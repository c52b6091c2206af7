"""Figures of `relift`: who moves which stratum, what it costs, and where questions went."""

from collections.abc import Sequence

import altair as alt
import numpy as np

from dynascope.report import Chart, draw
from dynascope.rl.tasks.difficulty import STRATA
from dynascope.studies.harness import Runs
from dynascope.studies.harness.curves import curves

SHOWN = {"rl": "RL", "sft": "fine-tuning", "relift": "ReLIFT"}
BASELINES = {
    **SHOWN,
    "random": "not the hardest",
    "all": "after every step",
    "uniform": "after every 8th",
    "rl-and-sft-loss": "one loss",
    "sft-then-rl": "then RL",
    "luffy": "LUFFY",
    "relift-lacking": "ReLIFT, hardest lack",
}


def figures(runs: Sequence[Runs]) -> list[Chart]:
    """The paper's analysis by difficulty, its transitions, its comparison, and the interval of fine-tuning."""
    return [by_stratum(runs), moves(runs), comparison(runs), fine_tuning(runs)]


def by_stratum(runs: Sequence[Runs]) -> Chart:
    """Accuracy and length over training, by the stratum in which questions began."""
    rows = []
    for what, name in (("accuracy", "difficulty/accuracy"), ("length (tokens)", "difficulty/length")):
        for arm, shown in SHOWN.items():
            values = np.stack([records[arm][name].values for records in runs])
            count = np.isfinite(values).sum(0)
            mean = np.where(count > 0, np.nansum(values, 0) / np.maximum(count, 1), np.nan)
            steps = runs[0][arm][name].step.values
            rows += [
                {"step": int(step), "value": float(mean[place, number]), "stratum": stratum, "arm": shown, "what": what}
                for place, step in enumerate(steps)
                for number, stratum in enumerate(STRATA)
            ]
    base = alt.Chart(width=150, height=130)
    chart = (
        base.mark_line(point=True, strokeWidth=1.5)
        .encode(
            x=alt.X("step:Q", title="step", axis=alt.Axis(tickCount=4)),
            y=alt.Y("value:Q", title=None),
            color=alt.Color("stratum:N", title="began", sort=list(STRATA)),
            column=alt.Column("arm:N", title=None, sort=list(SHOWN.values())),
            row=alt.Row("what:N", title=None),
        )
        .resolve_scale(y="independent")
    )
    told = "Means over seeds, by the stratum in which questions began."
    return draw("Which questions each way of training moves", told, rows, chart)


def moves(runs: Sequence[Runs]) -> Chart:
    """From the first stratum to the last."""
    rows = []
    for arm, shown in SHOWN.items():
        every = np.stack([records[arm]["difficulty/transitions"].values[-1] for records in runs])
        count = np.isfinite(every).sum(0)
        mean = np.where(count > 0, np.nansum(every, 0) / np.maximum(count, 1), np.nan)
        rows += [
            {"before": before, "after": after, "share": float(mean[row, column]), "arm": shown}
            for row, before in enumerate(STRATA)
            for column, after in enumerate(STRATA)
        ]
    order = list(STRATA)
    base = alt.Chart(width=150, height=130).encode(
        x=alt.X("after:N", title="at the end", sort=order, axis=alt.Axis(labelAngle=-30)),
        y=alt.Y("before:N", title="at the start", sort=order),
    )
    cells = base.mark_rect().encode(
        color=alt.Color("share:Q", title="share", scale=alt.Scale(scheme="blues", domain=[0, 1]))
    )
    text = base.mark_text(fontSize=10).encode(
        text=alt.Text("share:Q", format=".2f"),
        color=alt.condition("datum.share > 0.6", alt.value("white"), alt.value("black")),
    )
    chart = alt.layer(cells, text, data=alt.NamedData("rows")).facet(
        column=alt.Column("arm:N", title=None, sort=list(SHOWN.values()))
    )
    return draw("Where questions went", "Share of each first stratum, mean over seeds.", rows, chart)


def comparison(runs: Sequence[Runs]) -> Chart:
    """Accuracy at the end of every arm, against the demonstrations that it used."""
    rows = [
        {
            "arm": shown,
            "accuracy": float(records[arm]["validation/correct"].values[-1]),
            "used": float(np.max(records[arm]["demonstrations/used"].values))
            if "demonstrations/used" in records[arm]
            else None,
        }
        for records in runs
        for arm, shown in BASELINES.items()
        if arm in records
    ]
    order = list(BASELINES.values())
    base = alt.Chart(width=230, height=220)
    y = alt.Y("arm:N", title=None, sort=order)
    left = base.mark_point(filled=True, size=45, opacity=0.7).encode(
        x=alt.X("accuracy:Q", title="right answers at the end", scale=alt.Scale(zero=False)), y=y
    )
    right = base.mark_point(filled=True, size=45, opacity=0.7).encode(
        x=alt.X("used:Q", title="demonstrations used"),
        y=alt.Y("arm:N", title=None, sort=order, axis=alt.Axis(labels=False)),
    )
    told = "A point a seed; every use of a demonstration counts."
    return draw("What each way of joining the two is worth", told, rows, alt.hconcat(left, right))


def fine_tuning(runs: Sequence[Runs]) -> Chart:
    """Demonstrations used over training: ReLIFT's schedule adapts by itself."""
    rows = [
        row
        for arm in ("relift", "random", "all", "uniform", "luffy", "sft")
        for row in curves(runs, arm, {"demonstrations/used": BASELINES[arm]})
    ]
    chart = (
        alt.Chart(width=430, height=220)
        .mark_line(strokeWidth=1.3)
        .encode(
            x=alt.X("step:Q", title="step"),
            y=alt.Y("value:Q", title="demonstrations used"),
            color=alt.Color("what:N", title=None, sort=[*BASELINES.values()]),
            detail="seed:N",
        )
    )
    return draw("How many demonstrations are used", "One line a seed.", rows, chart)
