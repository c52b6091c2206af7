"""Figures of `data-diet`: what pruning costs, what scores look like, and where training is decided."""

from collections.abc import Sequence
from dataclasses import replace

import altair as alt
import numpy as np
from scipy import stats

from dynascope.record import Record
from dynascope.report import Chart, draw
from dynascope.studies.data_diet.claims import agreement, epochs_of
from dynascope.studies.data_diet.method import ARMS, Config, digits, mean_scores, tenths
from dynascope.studies.harness import Runs
from dynascope.studies.harness.curves import Rows, curves

NUM_PICTURES = 12
"""Digits shown of each end."""
EPOCH = alt.X("step:Q", scale=alt.Scale(type="symlog", constant=1), title="epoch")


def figures(runs: Sequence[Runs]) -> list[Chart]:
    """The paper's figures 1, 2, 3, 5 and 6 on digits, and the digits themselves."""
    return [pruning(runs), histogram(runs), ends(runs), early(runs), barriers(runs), velocities(runs)]


def pruning(runs: Sequence[Runs]) -> Chart:
    """Accuracy against the share kept, by score and by chance, with intervals over seeds."""
    shown = {"el2n": "highest EL2N", "random": "random", "grand at init": "highest GraNd at initialisation"}
    rows: Rows = []
    for name, arm in ARMS.items():
        # The full set is where each curve begins.
        curves_of_arm = [arm.by] if arm.keep < 1 else ["el2n", "random"]
        if arm.task != "retrain" or arm.is_noisy or arm.width < 1 or arm.scores_of != "score-conv":
            continue
        samples = [float(records[name]["accuracy"].mean()) for records in runs if name in records]
        if not samples:
            continue
        mean, error = float(np.mean(samples)), stats.sem(samples) if len(samples) > 1 else np.nan
        reach = float(error * stats.t.ppf(0.975, max(1, len(samples) - 1)))
        rows += [
            {"kept": 100 * arm.keep, "accuracy": mean, "low": mean - reach, "high": mean + reach, "by": shown[by]}
            for by in curves_of_arm
        ]
    base = alt.Chart(width=400, height=240).encode(
        x=alt.X("kept:Q", title="examples kept (%)", scale=alt.Scale(domain=[15, 105])),
        color=alt.Color("by:N", title="kept by", sort=list(shown.values())),
    )
    y = {"title": "test accuracy (%)", "scale": alt.Scale(zero=False)}
    lines = base.mark_line(point=alt.OverlayMarkDef(size=45)).encode(y=alt.Y("accuracy:Q", **y))
    bars = base.mark_rule(strokeWidth=1.5).encode(y=alt.Y("low:Q", **y), y2="high:Q")
    told = "Mean over seeds with its 95 % interval; equal numbers of steps whatever is kept."
    return draw("What can be left out", told, rows, alt.layer(lines, bars))


def histogram(runs: Sequence[Runs]) -> Chart:
    """EL2N a quarter into training where a tenth of the labels is wrong, by class and by truth."""
    record = runs[0]["score-noisy"]
    scores = mean_scores(record, "el2n", epochs_of(runs[0])[-2])
    data = digits(config_of(record), is_noisy=True, seed=0)
    wrong = record["mislabelled"].values[-1] > 0
    edges = np.linspace(0, np.sqrt(2), 36)
    rows: Rows = []
    for digit in range(10):
        for is_wrong in (False, True):
            chosen = (data.labels.numpy() == digit) & (wrong == is_wrong)
            label = "wrong label" if is_wrong else "right label"
            rows += [
                {"score": float(left), "to": float(right), "examples": int(count), "digit": str(digit), "label": label}
                for left, right, count in zip(
                    edges[:-1], edges[1:], np.histogram(scores[chosen], edges)[0], strict=True
                )
            ]
    chart = (
        alt.Chart(width=400, height=110)
        .mark_bar(binSpacing=0)
        .encode(
            x=alt.X("score:Q", bin="binned", title="EL2N, mean over trainings"),
            x2="to:Q",
            y=alt.Y("examples:Q", title="examples"),
            color=alt.Color("digit:N", title="labelled", scale=alt.Scale(scheme="tableau10")),
            row=alt.Row("label:N", title=None, sort=["right label", "wrong label"]),
        )
        .resolve_scale(y="independent")
    )
    return draw("Wrong labels have high scores", "First seed, a tenth of the labels replaced.", rows, chart)


def ends(runs: Sequence[Runs]) -> Chart:
    """The digits of lowest and of highest score."""
    record = runs[0]["score-conv"]
    data = digits(config_of(record), is_noisy=False, seed=0)
    rows: Rows = []
    for end, chosen in zip(
        ("easiest", "hardest"), tenths(mean_scores(record, "el2n", epochs_of(runs[0])[-2])), strict=True
    ):
        for place, example in enumerate(chosen[:NUM_PICTURES]):
            label = str(int(data.labels[example]))
            rows += [
                {"x": x, "y": y, "ink": float(ink), "end": end, "place": place, "label": label}
                for (y, x), ink in np.ndenumerate(data.images[example, 0].numpy())
            ]
    axis = alt.Axis(labels=False, ticks=False, domain=False)
    base = alt.Chart(width=44, height=44).encode(
        x=alt.X("x:O", title=None, axis=axis), y=alt.Y("y:O", title=None, axis=axis)
    )
    pictures = base.mark_rect().encode(color=alt.Color("ink:Q", scale=alt.Scale(scheme="greys"), legend=None))
    labels = (
        base.transform_filter("datum.x == 7 && datum.y == 7")
        .mark_text(fontWeight="bold", color="crimson")
        .encode(text="label:N")
    )
    chart = alt.layer(pictures, labels, data=alt.NamedData("rows")).facet(
        column=alt.Column("place:O", title=None, header=alt.Header(labels=False)),
        row=alt.Row("end:N", title=None),
        spacing=4,
    )
    told = f"The {NUM_PICTURES} of lowest and of highest EL2N a quarter into training, first seed; their labels in red."
    return draw("The easiest and the hardest digits", told, rows, chart)


def early(runs: Sequence[Runs]) -> Chart:
    """How early scores tell what they will be at the end."""
    ways = {"el2n": "EL2N at the end", "forgetting": "forgetting"}
    rows = [
        {"step": epoch, "value": agreement(records, place, name), "what": shown, "seed": seed}
        for seed, records in enumerate(runs)
        for place, epoch in enumerate(epochs_of(records))
        for name, shown in ways.items()
    ]
    chart = (
        alt.Chart(width=400, height=220)
        .mark_line(point=True, strokeWidth=1.3)
        .encode(
            x=EPOCH,
            y=alt.Y("value:Q", title="Spearman correlation with EL2N then"),
            color=alt.Color("what:N", title=None),
            detail="seed:N",
        )
    )
    return draw("How early importance shows", "Mean scores of the trainings; one line a seed.", rows, chart)


def barriers(runs: Sequence[Runs]) -> Chart:
    """Error barriers of twins."""
    names = {"barrier/easiest": "easiest tenth", "barrier/hardest": "hardest tenth"}
    chart = (
        alt.Chart(width=400, height=220)
        .mark_line(point=True, strokeWidth=1.3)
        .encode(
            x=alt.X("step:Q", scale=alt.Scale(type="symlog", constant=1), title="epoch at which the twins part"),
            y=alt.Y("value:Q", title="error barrier"),
            color=alt.Color("what:N", title=None),
            detail="seed:N",
        )
    )
    told = "Error half way between two networks that part at an epoch, above that of the two; one line a seed."
    return draw("When the way is decided", told, curves(runs, "barrier", names), chart)


def velocities(runs: Sequence[Runs]) -> Chart:
    """How fast the kernel turns."""
    names = {"velocity/easiest": "easiest tenth", "velocity/hardest": "hardest tenth"}
    chart = (
        alt.Chart(width=400, height=220)
        .mark_line(strokeWidth=1.3)
        .encode(
            x=EPOCH,
            y=alt.Y(
                "value:Q",
                title="kernel velocity",
                scale=alt.Scale(type="symlog", constant=1e-3, domainMin=0, clamp=True),
            ),
            color=alt.Color("what:N", title=None),
            detail="seed:N",
        )
    )
    told = "1 − cosine of the tangent kernel on these examples with that an epoch before; one line a seed."
    return draw("Which examples move the kernel", told, curves(runs, "kernel", names), chart)


def config_of(record: Record) -> Config:
    """The settings that the data of a record was made with."""
    return replace(Config(), num_held_out=record.config["config"]["settings"]["num_held_out"])
