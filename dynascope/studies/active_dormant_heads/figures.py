"""Figures of `active-dormant-heads`: where heads look, how sinks, drains and peaks come, and what heads are worth."""

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from dynascope.report import Chart, draw
from dynascope.studies.harness import Runs

ARMS = {
    "softmax": "softmax",
    "relu": "ReLU",
    "deep-adam": "3 layers, Adam",
    "deep-relu": "3 layers, Adam, ReLU",
    "deep-sgd": "3 layers, SGD",
}
COLOR = alt.Color("arm:N", title=None, sort=list(ARMS.values()))


def figures(runs: Sequence[Runs]) -> list[Chart]:
    """The paper's key figures, from the records of every seed."""
    return [maps(runs), three_phenomena(runs), sink_logits(runs), remedies(runs), heads(runs)]


def maps(runs: Sequence[Runs]) -> Chart:
    """One sequence's attention with one layer, softmax and ReLU, first seed."""
    rows: list[dict[str, Any]] = []
    for arm in ("softmax", "relu"):
        record = runs[0][arm]
        weights = record["map/weights"].values[-1, 0]
        is_trigger = record["map/is_trigger"].values[-1]
        rows += [
            {
                "key": int(key),
                "query": int(query),
                "weight": float(weight),
                "kind": "trigger" if is_trigger[query] else "elsewhere",
                "arm": ARMS[arm],
            }
            for (query, key), weight in np.ndenumerate(weights / weights.max())
            if key <= query
        ]
    position = {"axis": alt.Axis(values=list(range(0, 256, 8)), labelAngle=0)}
    chart = (
        alt.Chart(width=210, height=210)
        .mark_rect()
        .encode(
            x=alt.X("key:O", title="key", **position),
            y=alt.Y("query:O", title="query", **position),
            color=alt.Color("kind:N", title="query", scale=alt.Scale(range=["#0072B2", "#D55E00"])),
            opacity=alt.Opacity("weight:Q", title="weight over the largest", scale=alt.Scale(range=[0.02, 1])),
            column=alt.Column("arm:N", title=None, sort=list(ARMS.values())),
        )
    )
    told = "One sequence, one layer, first seed. Triggers attend to the token before them; other softmax queries park on <s>."
    return draw("A head is active at triggers and dormant elsewhere", told, rows, chart)


def three_phenomena(runs: Sequence[Runs]) -> Chart:
    """Sink score, value drain and residual peak over steps, for every arm."""
    shown = {"sink score": "extreme/sink_score", "value drain": "extreme/value_drain"}
    shown |= {"residual peak": "extreme/peak_mean"}
    rows = []
    for seed, records in enumerate(runs):
        for arm, label in ARMS.items():
            strongest = int(records[arm]["extreme/sink_score"].values[-1, :, 0].argmax())
            for quantity, name in shown.items():
                if name not in records[arm] or not records[arm][name].size:
                    continue  # one block alone is no stack of blocks, and has no peak
                values = records[arm][name]
                # The layer whose sink is strongest at the end; for the peak the middle block, where the claims look.
                place = values.shape[1] // 2 if name == "extreme/peak_mean" else strongest
                ends = values.values[:, place].reshape(len(values))
                rows += [
                    {"step": int(step), "value": float(value), "quantity": quantity, "arm": label, "seed": seed}
                    for step, value in zip(values.step.values, ends, strict=True)
                ]
    chart = (
        alt.Chart(width=190, height=200)
        .mark_line(strokeWidth=1.3)
        .encode(
            x=alt.X("step:Q", scale=alt.Scale(type="symlog"), title="step", axis=alt.Axis(values=[1, 10, 100, 1000])),
            # Nearly even up to 1, where scores and drains are, and logarithmic beyond, where a peak may be 40.
            y=alt.Y("value:Q", title=None, scale=alt.Scale(type="symlog", constant=1)),
            color=COLOR,
            detail="seed:N",
            column=alt.Column("quantity:N", title=None, sort=list(shown)),
        )
        .resolve_scale(y="independent")
    )
    told = "Attention to <s> off triggers and norm of its value (layer of the strongest sink), norm of its state (middle block)."
    return draw("Sinks, drains and peaks over training", told, rows, chart)


def sink_logits(runs: Sequence[Runs]) -> Chart:
    """Sink logit of the one softmax layer against the log of the step, beside the theory's slope."""
    rows: list[dict[str, Any]] = []
    for seed, records in enumerate(runs):
        logit = records["softmax"]["extreme/sink_logit"]
        kept = logit.step.values > 0
        rows += [
            {"step": int(step), "logit": float(value), "line": f"seed {seed}", "what": "measured"}
            for step, value in zip(logit.step.values[kept], logit.values[kept, 0, 0], strict=True)
        ]
    logit = runs[0]["softmax"]["extreme/sink_logit"]
    end, height = (
        int(logit.step[-1]),
        float(np.mean([one["softmax"]["extreme/sink_logit"].values[-1, 0, 0] for one in runs])),
    )
    rows += [
        {"step": step, "logit": height + 0.5 * float(np.log(step / end)), "line": "theory", "what": "½ log t"}
        for step in (max(1, end // 20), end)
    ]
    chart = (
        alt.Chart(width=430, height=240)
        .mark_line(strokeWidth=1.6)
        .encode(
            x=alt.X(
                "step:Q",
                scale=alt.Scale(type="log", nice=False),
                title="step",
                axis=alt.Axis(values=[1, 10, 100, 1000, 10000]),
            ),
            y=alt.Y("logit:Q", title="logit of <s> less the others' mean"),
            color=alt.Color("what:N", title=None, sort=["measured", "½ log t"]),
            strokeDash=alt.StrokeDash("what:N", legend=None, sort=["measured", "½ log t"]),
            detail="line:N",
        )
    )
    return draw(
        "The sink logit against the log of time", "One layer, queries that are no triggers; a line a seed.", rows, chart
    )


def remedies(runs: Sequence[Runs]) -> Chart:
    """Quantization risk after each of three blocks at the end, with and without the remedies."""
    rows = [
        {"block": block + 1, "risk": float(value), "arm": label, "seed": seed}
        for seed, records in enumerate(runs)
        for arm, label in ARMS.items()
        if arm.startswith("deep")
        for block, value in enumerate(records[arm]["extreme/quantization_risk"].values[-1])
    ]
    chart = (
        alt.Chart(width=430, height=220)
        .mark_point(size=60, filled=True)
        .encode(
            x=alt.X("block:O", title="after block", axis=alt.Axis(labelAngle=0)),
            xOffset=alt.XOffset("arm:N", sort=list(ARMS.values())),
            y=alt.Y(
                "risk:Q",
                title="largest channel over the median magnitude",
                scale=alt.Scale(type="log", nice=False),
                axis=alt.Axis(values=[5, 10, 20, 50, 100, 200, 500, 1000]),
            ),
            color=COLOR,
        )
    )
    told = "How much of a quantizer's range one channel takes, at the end of training; a point a seed."
    return draw("What the remedies do for quantization", told, rows, chart)


def heads(runs: Sequence[Runs]) -> Chart:
    """Every head's attention to <s> against what its absence costs, at triggers and elsewhere."""
    rows = []
    for seed, records in enumerate(runs):
        for arm, label in ARMS.items():
            scores, changes = (records[arm][f"heads/{name}"].values[-1] for name in ("sink_score", "loss_change"))
            for head, place in np.ndindex(*scores.shape):
                rows.append(
                    {
                        "score": float(scores[head, place]),
                        "change": float(changes[head, place]),
                        "queries": ("elsewhere", "triggers")[place],
                        "arm": label,
                        "head": f"layer {head + 1}, seed {seed}",
                    }
                )
    chart = (
        alt.Chart(width=200, height=210)
        .mark_point(size=55, filled=True, opacity=0.8)
        .encode(
            x=alt.X("score:Q", title="attention to <s>", scale=alt.Scale(domain=[0, 1])),
            y=alt.Y(
                "change:Q",
                title="loss without the head (nats more)",
                scale=alt.Scale(type="symlog", constant=0.01, domain=[-0.02, 6]),
            ),
            color=COLOR,
            column=alt.Column("queries:N", title=None),
        )
    )
    told = "Each point is a head of one seed, zeroed. Elsewhere none is missed; at triggers those that copy are."
    return draw("Active and dormant heads, and what their absence costs", told, rows, chart)
