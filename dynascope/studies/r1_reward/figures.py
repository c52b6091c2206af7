"""Figures of `r1-reward`: accuracy of the arms, consistency, advantages of an easy world, and what a wrong record does."""

from collections.abc import Sequence

import altair as alt
import numpy as np

from dynascope.report import Chart, draw
from dynascope.studies.harness import Runs
from dynascope.studies.harness.curves import Rows, curves

ARMS = {
    "reinforce_pp": "REINFORCE++",
    "pre-clip": "+ Pre-CLIP",
    "filter": "+ filter",
    "both": "+ both",
    "consistency": "+ both and consistency",
    "cold": "both, no cold start",
    "hard": "both, hard pairs alone",
}
EASY = {"easy": "REINFORCE++", "easy-filter": "+ filter"}
DRIFT = {"drift": "REINFORCE++", "drift-pre-clip": "+ Pre-CLIP"}


def figures(runs: Sequence[Runs]) -> list[Chart]:
    """All of them."""
    return [training(runs), judgements(runs), outliers(runs), drift(runs)]


def training(runs: Sequence[Runs]) -> Chart:
    """Share of right judgements over training."""
    rows = [row for arm, shown in ARMS.items() for row in curves(runs, arm, {"rollout/correct": shown})]
    chart = (
        alt.Chart(width=190, height=140)
        .mark_line(strokeWidth=1.2)
        .encode(
            x=alt.X("step:Q", title="rollout"),
            y=alt.Y("value:Q", title="share of right judgements", scale=alt.Scale(zero=False)),
            color=alt.Color("seed:N", legend=None),
            facet=alt.Facet("what:N", title=None, columns=3, sort=list(ARMS.values())),
        )
    )
    return draw("Learning to judge", "From the rollouts of training. One line a seed.", rows, chart)


def judgements(runs: Sequence[Runs]) -> Chart:
    """What the judge can do before and after."""
    names = {
        "accuracy": "one judgement",
        "vote": "majority of five",
        "consistent": "right ones whose thought agrees",
    }
    rows: Rows = []
    for seed, records in enumerate(runs):
        for arm, shown in ARMS.items():
            for name, what in names.items():
                values = records[arm][f"judge/{name}"].values
                rows += [{"arm": shown, "share": float(values[-1]), "what": what, "seed": seed}]
                if arm == "reinforce_pp":
                    rows += [{"arm": "before", "share": float(values[0]), "what": what, "seed": seed}]
    chart = (
        alt.Chart(width=190, height=190)
        .mark_point(filled=True, size=45, opacity=0.8)
        .encode(
            x=alt.X("share:Q", title="share", scale=alt.Scale(domain=[0, 1])),
            y=alt.Y("arm:N", title=None, sort=["before", *ARMS.values()], axis=alt.Axis(labelLimit=200)),
            color=alt.Color("what:N", title=None, sort=list(names.values()), legend=None),
            column=alt.Column("what:N", title=None, sort=list(names.values())),
        )
    )
    return draw("Judgements, votes, and thoughts that agree", "After training. One dot a seed.", rows, chart)


def outliers(runs: Sequence[Runs]) -> Chart:
    """The largest advantage and the gradient norm where nearly all rewards are equal."""
    names = {"advantage/used_max_abs": "largest |advantage|", "gradient_norm": "gradient norm"}
    rows = [row for arm, shown in EASY.items() for row in curves(runs, arm, names, arm=shown)]
    chart = (
        alt.Chart(width=260, height=200)
        .mark_line(strokeWidth=1.3)
        .encode(
            x=alt.X("step:Q", title="rollout"),
            y=alt.Y("value:Q", title=None),
            color=alt.Color("arm:N", title=None, sort=list(EASY.values())),
            detail="seed:N",
            column=alt.Column("what:N", title=None, sort=list(names.values())),
        )
        .resolve_scale(y="independent")
    )
    return draw(
        "Nearly all rewards equal", "Pairs that are nearly always judged rightly. One line a seed.", rows, chart
    )


def drift(runs: Sequence[Runs]) -> Chart:
    """Up to which step training stayed finite, with one wrong record a rollout."""
    rows: Rows = [
        {"arm": shown, "steps": int(np.sum(records[arm]["finite"].values > 0)), "seed": f"seed {seed}"}
        for seed, records in enumerate(runs)
        for arm, shown in DRIFT.items()
        if arm in records
    ]
    chart = (
        alt.Chart(width=300, height=110)
        .mark_bar(height=8)
        .encode(
            x=alt.X("steps:Q", title="rollouts with a finite loss and gradient"),
            y=alt.Y("arm:N", title=None, sort=list(DRIFT.values())),
            yOffset="seed:N",
            color=alt.Color("seed:N", title=None),
        )
    )
    return draw("One log-ratio of 120 in every rollout", "Training ends where it breaks.", rows, chart)
