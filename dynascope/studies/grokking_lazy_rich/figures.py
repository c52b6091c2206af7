"""Figures of `grokking-lazy-rich`: losses with what explains them under them."""

from collections.abc import Sequence

import altair as alt

from dynascope.report import Chart, draw
from dynascope.studies.grokking_lazy_rich.claims import at
from dynascope.studies.grokking_lazy_rich.method import ALPHAS
from dynascope.studies.harness import Runs
from dynascope.studies.harness.curves import curves

STEP = alt.X(
    "step:Q", scale=alt.Scale(type="symlog", constant=1), title="step", axis=alt.Axis(format="~s", tickCount=6)
)


def figures(runs: Sequence[Runs]) -> list[Chart]:
    """Losses and alignment over laziness, the three parts of the test loss, mean-field theory, and the real tasks."""
    return [laziness(runs), parts(runs), examples(runs), theory(runs), real(runs)]


def laziness(runs: Sequence[Runs]) -> Chart:
    """Figure 2, with the kernel under it."""
    names = {
        "train/loss": "training",
        "test/loss": "test",
        "test/linearized": "test, linearized",
        "kernel/alignment": "kernel alignment",
    }
    rows = [row for alpha in ALPHAS for row in curves(runs, at(alpha), names, alpha=f"α = {alpha:g}")]
    base = alt.Chart(width=150, height=150).mark_line(strokeWidth=1.3)
    colour = alt.Color("what:N", title=None, sort=list(names.values()), legend=alt.Legend(orient="top"))
    column = alt.Column("alpha:N", title=None, sort=[f"α = {alpha:g}" for alpha in ALPHAS])
    losses = (
        base.transform_filter("datum.what != 'kernel alignment'")
        .encode(x=STEP, y=alt.Y("value:Q", title="loss"), color=colour, detail="seed:N", column=column)
        .properties(data=alt.NamedData("rows"))
    )
    alignment = (
        base.transform_filter("datum.what == 'kernel alignment'")
        .encode(x=STEP, y=alt.Y("value:Q", title="alignment"), color=colour, detail="seed:N", column=column)
        .properties(data=alt.NamedData("rows"))
    )
    told = "One line a seed. The lazier the network, the later it generalizes, and the less its kernel turns to the labels."
    return draw("From rich to lazy", told, rows, alt.vconcat(losses, alignment))


def parts(runs: Sequence[Runs]) -> Chart:
    """Figure 3: what the test loss is made of."""
    names = {
        "test/loss": "test loss",
        "test/linear": "linear functions",
        "test/misalignment": "misalignment",
        "test/scale": "scale",
    }
    rows = curves(runs[:1], at(1.0), names)
    chart = (
        alt.Chart(width=420, height=230)
        .mark_line()
        .encode(
            x=STEP,
            y=alt.Y("value:Q", title="loss"),
            color=alt.Color("what:N", title=None, sort=list(names.values())),
        )
    )
    told = "α = 1, first seed. Noise is fitted with linear functions first; then the weights turn to the teacher."
    return draw("The test loss in its three parts", told, rows, chart)


def examples(runs: Sequence[Runs]) -> Chart:
    """Numbers of examples side by side."""
    arms = {"few-examples": "60 examples", at(1.0): "200 examples", "many-examples": "800 examples"}
    names = {"train/loss": "training", "test/loss": "test"}
    rows = [row for arm, shown in arms.items() for row in curves(runs, arm, names, examples=shown)]
    chart = (
        alt.Chart(width=170, height=170)
        .mark_line(strokeWidth=1.3)
        .encode(
            x=STEP,
            y=alt.Y("value:Q", title="loss"),
            color=alt.Color("what:N", title=None, sort=["training", "test"], legend=alt.Legend(orient="top")),
            detail="seed:N",
            column=alt.Column("examples:N", title=None, sort=list(arms.values())),
        )
    )
    return draw("Never, late, at once", "One line a seed; 40 dimensions, α = 1.", rows, chart)


def theory(runs: Sequence[Runs]) -> Chart:
    """Mean-field theory against simulation."""
    rows = curves(runs, "mean-field", {"mean_field/test": "mean-field theory", "simulated/test": "600 dimensions"})
    chart = (
        alt.Chart(width=420, height=220)
        .mark_line()
        .encode(
            x=alt.X("step:Q", title="step"),
            y=alt.Y("value:Q", title="test loss", scale=alt.Scale(zero=False)),
            color=alt.Color("what:N", title=None),
            strokeDash=alt.StrokeDash("what:N", title=None),
            detail="seed:N",
        )
    )
    return draw("Mean-field theory", "Three neurons, five examples a dimension; one pair of lines a seed.", rows, chart)


def real(runs: Sequence[Runs]) -> Chart:
    """The dial on real digits and on modular addition."""
    names = {"train/loss": "training", "test/loss": "test"}
    arms = {
        f"digits-{at(0.1)}": "digits, α = 0.1",
        f"digits-{at(2.0)}": "digits, α = 2",
        f"modular-{at(0.3)}": "addition, α = 0.3",
        f"modular-{at(10.0)}": "addition, α = 10",
    }
    rows = [row for arm, shown in arms.items() for row in curves(runs, arm, names, task=shown)]
    chart = (
        alt.Chart(width=150, height=150)
        .mark_line(strokeWidth=1.3)
        .encode(
            x=STEP,
            y=alt.Y("value:Q", title="loss over the labels' variance"),
            color=alt.Color("what:N", title=None, sort=["training", "test"], legend=alt.Legend(orient="top")),
            detail="seed:N",
            column=alt.Column("task:N", title=None, sort=list(arms.values())),
        )
    )
    return draw("The output scale on other tasks", "One line a seed.", rows, chart)
