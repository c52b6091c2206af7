"""Figures of `sigma-reparam`: entropy beside the loss, the rates that train, and how maps grow."""

import math
from collections.abc import Sequence

import altair as alt
import numpy as np

from dynascope.report import Chart, draw
from dynascope.studies.harness import Runs
from dynascope.studies.harness.curves import Rows, curves
from dynascope.studies.sigma_reparam.claims import final_loss, query_key_growth
from dynascope.studies.sigma_reparam.method import LR_FACTORS, TEXT_ARMS, at

NAMES = {"pre-ln": "pre-LN", "post-ln": "post-LN", "qk-norm": "query-key norm", "sigma": "σReparam, no norms"}
COLOUR = alt.Color("arm:N", title=None, sort=list(NAMES.values()), legend=alt.Legend(orient="top"))


def figures(runs: Sequence[Runs]) -> list[Chart]:
    """The paper's figures 1 and 2, the range of learning rates, the growth of maps, and the intervention."""
    return [collapse(runs), rates(runs), growth(runs), heated(runs)]


def factor_name(factor: float) -> str:
    """What a learning rate is called in the figures."""
    return f"lr × {factor:g}"


def collapse(runs: Sequence[Runs]) -> Chart:
    """Figure 1: the lowest head's entropy, and the loss under it."""
    rows: Rows = []
    for name in TEXT_ARMS:
        for factor in LR_FACTORS:
            told = {"arm": NAMES[name], "lr": factor_name(factor)}
            rows += curves(runs[:1], at(name, factor), {"loss": "loss"}, **told)
            entropy = runs[0][at(name, factor)]["attention/entropy_normalized"].min(("layer", "head"))
            rows += [
                {"step": int(step), "value": float(value), "what": "entropy", "seed": 0, **told}
                for step, value in zip(entropy.step.values, entropy.values, strict=True)
            ]
    column = alt.Column("lr:N", title=None, sort=[factor_name(factor) for factor in LR_FACTORS])
    base = alt.Chart(width=150, height=130).encode(x=alt.X("step:Q", title="step"), color=COLOUR, column=column)
    entropy_chart = (
        base.transform_filter("datum.what == 'entropy'")
        .mark_line(strokeWidth=1.4)
        .encode(y=alt.Y("value:Q", title="entropy of the lowest head", scale=alt.Scale(domain=[0, 1])))
    )
    loss_chart = (
        base.transform_filter("datum.what == 'loss'")
        .mark_line(strokeWidth=1.0)
        .encode(y=alt.Y("value:Q", title="loss (nats a byte)", scale=alt.Scale(domain=[2, 8], clamp=True)))
    )
    charts = [chart.properties(data=alt.NamedData("rows")) for chart in (entropy_chart, loss_chart)]
    about = "Entropy over that of uniform attention; first seed, no warmup."
    return draw("Attention entropy and loss over learning rates", about, rows, alt.vconcat(*charts))


def rates(runs: Sequence[Runs]) -> Chart:
    """Which learning rates train."""
    rows: Rows = [
        {
            "lr": 1e-3 * factor,
            "loss": final_loss(records[at(name, factor)]),
            "arm": NAMES[name],
            "seed": seed,
        }
        for seed, records in enumerate(runs)
        for name in TEXT_ARMS
        for factor in LR_FACTORS
    ]
    chart = (
        alt.Chart(width=420, height=240)
        .mark_line(point=True, strokeWidth=1.2)
        .encode(
            x=alt.X("lr:Q", scale=alt.Scale(type="log"), title="learning rate of AdamW"),
            y=alt.Y("loss:Q", title="loss over the last tenth", scale=alt.Scale(zero=False)),
            color=COLOUR,
            detail="seed:N",
        )
    )
    return draw("The range of learning rates that train", "One line a seed; a gap is a run that diverged.", rows, chart)


def growth(runs: Sequence[Runs]) -> Chart:
    """How much the maps of queries and keys grow."""
    rows: Rows = [
        {
            "layer": str(layer + 1),
            "growth": float(value),
            "arm": NAMES[name],
            "lr": factor_name(factor),
            "seed": seed,
        }
        for seed, records in enumerate(runs)
        for name in TEXT_ARMS
        for factor in LR_FACTORS[:3]
        for layer, value in enumerate(np.exp(np.log(query_key_growth(records[at(name, factor)])).mean(1)))
        if math.isfinite(value)
    ]
    chart = (
        alt.Chart(width=170, height=190)
        .mark_point(filled=True, size=40, opacity=0.7)
        .encode(
            x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("growth:Q", title="spectral norm, end over start", scale=alt.Scale(type="log")),
            color=COLOUR,
            xOffset=alt.XOffset("arm:N", sort=list(NAMES.values())),
            column=alt.Column("lr:N", title=None, sort=[factor_name(factor) for factor in LR_FACTORS]),
        )
    )
    return draw("Growth of the query and key maps", "Geometric mean of the two maps; one point a seed.", rows, chart)


def heated(runs: Sequence[Runs]) -> Chart:
    """The intervention on a healthy run."""
    arms = {at("pre-ln", 1.0): "left alone", "heated": "logits times 8 from half way"}
    rows: Rows = []
    for arm, shown in arms.items():
        for seed, records in enumerate(runs):
            for what, series in (
                ("entropy", records[arm]["attention/entropy_normalized"].mean(("layer", "head"))),
                ("loss (nats a byte)", records[arm]["loss"]),
            ):
                rows += [
                    {"step": int(step), "value": float(value), "what": what, "run": shown, "seed": seed}
                    for step, value in zip(series.step.values, series.values, strict=True)
                ]
    chart = (
        alt.Chart(width=240, height=200)
        .mark_line(strokeWidth=1.2)
        .encode(
            x=alt.X("step:Q", title="step"),
            y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False)),
            color=alt.Color("run:N", title=None, legend=alt.Legend(orient="top", labelLimit=300)),
            detail="seed:N",
            column=alt.Column("what:N", title=None),
        )
        .resolve_scale(y="independent")
    )
    return draw("Colder attention by force", "Pre-LN at the lowest learning rate; one line a seed.", rows, chart)
