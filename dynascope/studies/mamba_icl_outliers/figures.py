"""Figures of `mamba-icl-outliers`: errors by share of outliers, the gate by distance, and where outliers hurt."""

from collections.abc import Sequence
from itertools import product

import altair as alt
import numpy as np

from dynascope.report import Chart, draw
from dynascope.studies.harness import Runs
from dynascope.theory.outlier_tolerance import majority_vote

RULES = ("flip", "target", "random")
MODELS = {"gated": "Mamba", "gated-two-lrs": "Mamba, gate faster", "linear": "linear transformer"}
VOTE = "majority vote"
DEEP = {"gated-deep": "Mamba, 3 layers", "linear-deep": "linear, 3 layers"}
PLACEMENTS = ("farthest", "random", "closest")


def figures(runs: Sequence[Runs]) -> list[Chart]:
    """The paper's figures and table."""
    return [tolerance(runs), training_share(runs), gates(runs), placements(runs)]


def tolerance(runs: Sequence[Runs]) -> Chart:
    """Test error against the share of outliers, a panel a label rule."""
    rows = [
        {"alpha": float(alpha), "error": float(value), "rule": rule, "model": model, "seed": seed}
        for seed, records in enumerate(runs)
        for arm, model in MODELS.items()
        for rule in RULES
        for alpha, value in zip(_alphas(records), records[arm][f"error/{rule}"].values[-1], strict=True)
    ]
    length = runs[0]["gated"]["mamba/gate_by_distance"].shape[-1]
    for rule, alpha in product(RULES, np.linspace(0, 0.8, length * 4 // 5 + 1)):
        vote = majority_vote(length, float(alpha), rule, attends="task")
        row = {"alpha": float(alpha), "error": vote.error + vote.ties / 2, "rule": rule, "model": VOTE, "seed": -1}
        rows.append(row)
    chart = _curves("model", [*MODELS.values(), VOTE]).properties(width=170, height=190)
    chart = chart.encode(column=alt.Column("rule:N", title="label of an outlier", sort=list(RULES)))
    told = "One line a seed. The vote is that of ideal linear attention, in closed form, with coins for ties."
    return draw("Mamba stands more outliers than linear attention", told, rows, chart)


def training_share(runs: Sequence[Runs]) -> Chart:
    """What the share of outliers in training is worth."""
    arms = {"gated-no-outliers": "none", "gated": "60 %", "gated-more-outliers": "80 %"}
    rows = [
        {"alpha": float(alpha), "error": float(value), "outliers": told, "seed": seed}
        for seed, records in enumerate(runs)
        for arm, told in arms.items()
        for alpha, value in zip(_alphas(records), records[arm]["error/flip"].values[-1], strict=True)
    ]
    chart = _curves("outliers", list(arms.values()), "in training").properties(width=430, height=220)
    return draw("Mamba must have met outliers in training", "Flipped labels. One line a seed.", rows, chart)


def gates(runs: Sequence[Runs]) -> Chart:
    """The trained gate by distance from the query, for clean examples and outliers."""
    arms = {"gated": "60 % outliers in training", "gated-no-outliers": "none in training"}
    rows = [
        {"distance": place + 1, "gate": float(value), "example": kind, "seed": seed, "training": told}
        for seed, records in enumerate(runs)
        for arm, told in arms.items()
        for kind, row in zip(("clean", "outlier"), records[arm]["mamba/gate_by_distance"].values[-1, 0], strict=True)
        for place, value in enumerate(row)
    ]
    chart = (
        alt.Chart()
        .mark_line(strokeWidth=1.4)
        .encode(
            x=alt.X("distance:Q", title="examples from the query"),
            y=alt.Y("gate:Q", scale=alt.Scale(type="log"), title="mean gate", axis=alt.Axis(format=".0e", tickCount=5)),
            color=alt.Color("example:N", title=None, sort=["clean", "outlier"]),
            detail="seed:N",
            column=alt.Column("training:N", title=None, sort=list(arms.values())),
        )
        .properties(width=230, height=200)
    )
    told = "Half of the examples are outliers. Trained without them, the gate treats them alike. One line a seed."
    return draw("The gate shuts outliers out and prefers what is near", told, rows, chart)


def placements(runs: Sequence[Runs]) -> Chart:
    """Accuracy by where the outliers stand."""
    arms = MODELS | DEEP
    rows = [
        {"placement": place, "accuracy": float(value), "model": model, "seed": seed}
        for seed, records in enumerate(runs)
        for arm, model in arms.items()
        for place, value in zip(PLACEMENTS, records[arm]["accuracy/placement"].values[-1], strict=True)
    ]
    chart = (
        alt.Chart()
        .mark_point(filled=True, size=45, opacity=0.8)
        .encode(
            x=alt.X("accuracy:Q", title="accuracy, half of the examples are outliers", scale=alt.Scale(domain=[0, 1])),
            y=alt.Y("placement:N", title=None, sort=list(PLACEMENTS)),
            color=alt.Color("placement:N", legend=None, sort=list(PLACEMENTS)),
            row=alt.Row(
                "model:N", title=None, sort=list(arms.values()), header=alt.Header(labelAngle=0, labelAlign="left")
            ),
        )
        .properties(width=360, height=50)
    )
    told = "Outliers stand farthest from the query, at random, or closest to it. One point a seed."
    return draw("Mamba is fragile where outliers stand next to the query", told, rows, chart)


def _alphas(records: Runs) -> list[float]:
    alphas: list[float] = records["gated"]["error/flip"]["alpha"].values.tolist()
    return alphas


def _curves(by: str, order: list[str], title: str | None = None) -> alt.Chart:
    """Errors against the share of outliers."""
    return (
        alt.Chart()
        .mark_line(strokeWidth=1.4, point=alt.OverlayMarkDef(size=22))
        .encode(
            x=alt.X("alpha:Q", title="share of outliers", scale=alt.Scale(domain=[0, 0.8])),
            y=alt.Y("error:Q", title="test error", scale=alt.Scale(domain=[0, 1])),
            color=alt.Color(f"{by}:N", title=title, sort=order),
            detail="seed:N",
        )
    )
