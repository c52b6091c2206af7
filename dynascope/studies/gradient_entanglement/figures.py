"""Figures of `gradient-entanglement`: log-probabilities over training, the condition, cosines, and the token map."""

from collections.abc import Sequence

import altair as alt
import numpy as np

from dynascope.report import Chart, draw
from dynascope.studies.gradient_entanglement.method import SUFFIXES
from dynascope.studies.harness import Runs

SUFFIX_NAMES = {f"dpo-{suffix}": f"{suffix} shared tokens" for suffix in SUFFIXES}
ZOO = {
    "dpo-8": "DPO", "hinge": "hinge", "rdpo": "R-DPO", "ipo": "IPO", "simpo": "SimPO", "slic": "SLiC", "cpo": "CPO",
    "rrhf": "RRHF", "orpo": "ORPO", "kto": "KTO", "sppo": "SPPO", "dpop": "DPOP", "normalized": "normalized",
    "disentangled": "disentangled", "diff": "diff mask", "sparse": "learnt mask",
}  # fmt: skip


def figures(runs: Sequence[Runs]) -> list[Chart]:
    """The sentiment task's panels, the loss zoo, the condition against what happened, and a token map."""
    return [courses(runs), cosines(runs), zoo(runs), condition(runs), heat_map(runs)]


def courses(runs: Sequence[Runs]) -> Chart:
    """Mean log-probabilities under DPO, by length of the suffix."""
    rows = [
        {
            "step": int(step),
            "change": float(value - record.values[0, side]),
            "side": name,
            "suffix": shown,
            "seed": seed,
        }
        for seed, records in enumerate(runs)
        for arm, shown in SUFFIX_NAMES.items()
        for record in [records[arm]["log_prob"]]
        for side, name in enumerate(("chosen", "rejected"))
        for step, value in zip(record.step.values, record.values[:, side], strict=True)
    ]
    chart = (
        alt.Chart(width=170, height=200)
        .mark_line(strokeWidth=1.4)
        .encode(
            x=alt.X("step:Q", title="update"),
            y=alt.Y("change:Q", title="change of the mean log-probability (nats)"),
            color=alt.Color("side:N", title=None),
            detail="seed:N",
            column=alt.Column("suffix:N", title=None, sort=list(SUFFIX_NAMES.values())),
        )
    )
    return draw("What DPO does to either response", "By how many tokens both share. One line a seed.", rows, chart)


def cosines(runs: Sequence[Runs]) -> Chart:
    """Cosine of the two gradients over training."""
    rows = []
    for seed, records in enumerate(runs):
        for arm, shown in SUFFIX_NAMES.items():
            every = records[arm]["cosine"].values[-1]
            width = max(1, len(every) // 32)
            for place, part in enumerate(np.array_split(every, -(-len(every) // width))):
                rows.append({"step": place * width, "cosine": float(part.mean()), "suffix": shown, "seed": seed})
    chart = (
        alt.Chart(width=430, height=220)
        .mark_line(strokeWidth=1.4)
        .encode(
            x=alt.X("step:Q", title="update"),
            y=alt.Y("cosine:Q", title="cosine of the two gradients", scale=alt.Scale(domain=[-1, 1])),
            color=alt.Color("suffix:N", title=None, sort=list(SUFFIX_NAMES.values())),
            detail="seed:N",
        )
    )
    return draw(
        "Shared tokens align the gradients", "DPO, means over consecutive updates. One line a seed.", rows, chart
    )


def zoo(runs: Sequence[Runs]) -> Chart:
    """Where each loss and each remedy leaves both responses."""
    rows = [
        {"loss": shown, "change": float(values[-1, side] - values[0, side]), "side": name, "seed": seed}
        for seed, records in enumerate(runs)
        for arm, shown in ZOO.items()
        for values in [records[arm]["log_prob"].values]
        for side, name in enumerate(("chosen", "rejected"))
    ]
    chart = (
        alt.Chart(width=430, height=280)
        .mark_point(filled=True, size=45, opacity=0.8)
        .encode(
            x=alt.X("change:Q", title="change of the mean log-probability over training (nats)"),
            y=alt.Y("loss:N", title=None, sort=list(ZOO.values())),
            color=alt.Color("side:N", title=None),
        )
    )
    told = "8 shared tokens; each loss's larger coefficient times its learning rate is the same at the start. One dot a seed."
    return draw("Losses and remedies", told, rows, chart)


def condition(runs: Sequence[Runs]) -> Chart:
    """Predicted against realised change of each update."""
    shown = {"dpo-8": "DPO", "ipo": "IPO", "simpo": "SimPO", "cpo": "CPO", "slic": "SLiC", "normalized": "normalized"}
    rows = []
    for arm, name in shown.items():
        predicted, realised = (runs[0][arm][one].values[-1] for one in ("predicted", "realised"))
        for update in range(0, len(predicted), max(1, len(predicted) // 64)):
            for side, told in enumerate(("chosen", "rejected")):
                rows.append(
                    {
                        "predicted": float(predicted[update, side]),
                        "realised": float(realised[update, side]),
                        "side": told,
                        "loss": name,
                    }
                )
    chart = (
        alt.Chart(width=150, height=150)
        .mark_point(size=12, opacity=0.7)
        .encode(
            x=alt.X("predicted:Q", title="predicted (nats)", axis=alt.Axis(tickCount=3)),
            y=alt.Y("realised:Q", title="realised (nats)", axis=alt.Axis(tickCount=3)),
            color=alt.Color("side:N", title=None),
            facet=alt.Facet("loss:N", title=None, columns=3, sort=list(shown.values())),
        )
        .resolve_scale(x="independent", y="independent")
    )
    told = "Change of a response by one update, to first order and measured. Some updates of the first seed."
    return draw("The condition against what happened", told, rows, chart)


def heat_map(runs: Sequence[Runs]) -> Chart:
    """Inner products of token gradients of one pair."""
    values = runs[0]["dpo-8"]["token_map"].values[-1]
    names = ["label", *(f"s{place}" for place in range(1, len(values)))]
    rows = [
        {"chosen": names[i], "rejected": names[j], "product": float(value / np.abs(values).max())}
        for (i, j), value in np.ndenumerate(values)
    ]
    chart = (
        alt.Chart(width=260, height=260)
        .mark_rect()
        .encode(
            x=alt.X("rejected:O", title="token of the rejected response", sort=names, axis=alt.Axis(labelAngle=0)),
            y=alt.Y("chosen:O", title="token of the chosen response", sort=names),
            color=alt.Color(
                "product:Q", title="product", scale=alt.Scale(scheme="redblue", domain=[-1, 1], reverse=True)
            ),
        )
    )
    told = "Inner products of token gradients in the last block and the head, over the largest; first pair, after DPO."
    return draw("Labels pull apart, shared tokens pull together", told, rows, chart)
