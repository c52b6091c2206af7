"""Figures of `mesa-optimization`: the product of the two scalars, what it is worth, and the matrices."""

from collections.abc import Sequence

import altair as alt
import numpy as np

from dynascope.report import Chart, draw
from dynascope.studies.harness import Runs

LAWS = {"gaussian-from-0": "Gaussian, start (0.1, 0.1)", "gaussian-from-1": "Gaussian, start (0.5, 1.5)"}
LAWS |= {"gaussian-from-2": "Gaussian, start (2, 2)", "sparse-1": "sparse", "ones-masked": "ones, masked"}


def figures(runs: Sequence[Runs]) -> list[Chart]:
    """The paper's figures 1 to 3."""
    return [products(runs), capability(runs), matrices(runs)]


def products(runs: Sequence[Runs]) -> Chart:
    """a·b over training, and its closed form."""
    rows = []
    for seed, records in enumerate(runs):
        for arm, law in LAWS.items():
            record = records[arm]
            ends = record["mesa/a"].values * record["mesa/b"].values / record["target"].values[0]
            rows += [
                {"step": int(step), "product": float(value), "law": law, "seed": seed}
                for step, value in zip(record["mesa/a"].step.values, ends, strict=True)
            ]
    chart = (
        alt.Chart(width=430, height=240)
        .mark_line(strokeWidth=1.4)
        .encode(
            x=alt.X("step:Q", scale=alt.Scale(type="symlog"), title="step of gradient descent"),
            y=alt.Y("product:Q", scale=alt.Scale(type="symlog", constant=0.1), title="a·b over its closed form"),
            color=alt.Color("law:N", title=None, sort=list(LAWS.values())),
            detail="seed:N",
        )
    )
    return draw("Training comes to the closed form from everywhere", "One line a seed.", rows, chart)


def capability(runs: Sequence[Runs]) -> Chart:
    """Prediction over truth, by position."""
    arms = {"sparse-0.5": "sparse", "sparse-1": "sparse", "sparse-2": "sparse"}
    arms |= {"gaussian-0.5": "Gaussian", "gaussian-from-1": "Gaussian", "gaussian-2": "Gaussian"}
    rows = [
        {"position": place + 3, "ratio": float(value), "law": law, "line": f"{arm} {seed}"}
        for seed, records in enumerate(runs)
        for arm, law in arms.items()
        for place, value in enumerate(records[arm]["capability/mean_ratio"].values[-1])
    ]
    chart = (
        alt.Chart(width=430, height=240)
        .mark_line(strokeWidth=1.2)
        .encode(
            x=alt.X("position:Q", title="position of the predicted token", scale=alt.Scale(zero=False)),
            y=alt.Y("ratio:Q", title="mean ratio of prediction and truth"),
            color=alt.Color("law:N", title="first token"),
            detail="line:N",
        )
    )
    told = "One line a seed and scale: sparse processes are recovered, of Gaussian ones a fifth."
    return draw("What the learner is able to do", told, rows, chart)


def matrices(runs: Sequence[Runs]) -> Chart:
    """The projection-value matrix where the structure is kept, and where it is lost."""
    shown = {"gaussian-from-1": "Gaussian", "sparse-1": "sparse", "ones": "ones"}
    rows = [
        {"row": int(i), "column": int(j), "size": float(value), "law": law}
        for arm, law in shown.items()
        for (i, j), value in np.ndenumerate(runs[0][arm]["pv"].values[-1] / np.abs(runs[0][arm]["pv"].values[-1]).max())
    ]
    chart = (
        alt.Chart(width=180, height=90)
        .mark_rect()
        .encode(
            x=alt.X("column:O", title="entry of the token (x_t; x_t−1)", axis=alt.Axis(labels=False)),
            y=alt.Y("row:O", title="prediction", axis=alt.Axis(labels=False)),
            color=alt.Color("size:Q", title="|weight|", scale=alt.Scale(scheme="viridis")),
            column=alt.Column("law:N", title=None, sort=list(shown.values())),
        )
    )
    told = "W_PV after training, over its largest entry, first seed. The law of ones puts weight off the diagonal."
    return draw("Where the structure is kept and where it is lost", told, rows, chart)
