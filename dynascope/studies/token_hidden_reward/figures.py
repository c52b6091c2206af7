"""Figures of `token-hidden-reward`: how concentrated it is, what steps do, what the tilt does to training, and others."""

from collections.abc import Callable, Sequence

import altair as alt

from dynascope.record import Record
from dynascope.report import Chart, draw
from dynascope.studies.harness import Runs
from dynascope.studies.harness.curves import curves, mean_lines, tries
from dynascope.studies.token_hidden_reward.claims import SWEEP, last, last_entropy
from dynascope.studies.token_hidden_reward.method import ARMS as TILTS
from dynascope.studies.token_hidden_reward.method import P

ARMS = {"exploit": f"p = {P}", "neutral": "p = 0 (GRPO)", "explore": f"p = -{P}"}
ALL = ARMS | {
    "turning": "p from below to above 0",
    "holding": "p holds the entropy",
    "dominant-half": "|THR| above τ/2 only",
    "dominant": "dominant tokens only",
    "dominant-twice": "|THR| above 2τ only",
    "gspo": "GSPO",
    "gspo-exploit": f"GSPO, p = {P}",
    "gspo-explore": f"GSPO, p = -{P}",
    "positive-only": "positive advantages only",
    "random-tokens": "a fifth of tokens dropped",
    "relief": "NTHR",
    "clip-higher": "clip higher",
    "top-entropy": "uncertain tokens only",
    "pass-at-k": "Pass@k mixed",
    "kl-cov": "KL-Cov",
}
MEASURES: dict[str, Callable[[Record], float]] = {
    "greedy": lambda record: last(record, "greedy/correct"),
    "pass@16": lambda record: last(record, "test/pass_at_k"),
    "entropy (nats)": last_entropy,
}


def figures(runs: Sequence[Runs]) -> list[Chart]:
    """Mechanism, concentration, entropy, right answers' likelihood, answers, the sweep, and what it is compared with."""
    return [
        mechanism(runs),
        concentration(runs),
        entropy(runs),
        displacement(runs),
        answers(runs),
        sweep(runs),
        compared(runs),
    ]


def mechanism(runs: Sequence[Runs]) -> Chart:
    """What one step on tokens of one sign does to the right answers of the prompt."""
    moved = {"head": "the unembedding moves", "all": "all weights move"}
    signs = {"plus": "positive THR", "minus": "negative THR"}
    rows = [
        {"change": float(value), "tokens": told, "moved": what, "seed": seed}
        for seed, records in enumerate(runs)
        if "neutral" in records
        for one, what in moved.items()
        for sign, told in signs.items()
        if f"mechanism/{one}_{sign}" in records["neutral"]
        for value in records["neutral"][f"mechanism/{one}_{sign}"].values[0]
    ]
    chart = (
        alt.Chart(width=200, height=200)
        .mark_tick(opacity=0.5, thickness=1.5)
        .encode(
            x=alt.X("tokens:N", title=None, sort=list(signs.values()), axis=alt.Axis(labelAngle=0)),
            y=alt.Y("change:Q", title="change of Σ log π, right answers (nats)"),
            color=alt.Color("tokens:N", legend=None, sort=list(signs.values())),
            column=alt.Column("moved:N", title=None, sort=list(moved.values())),
        )
        .resolve_scale(y="independent")
    )
    return draw("A token does what its hidden reward says", "One mark a prompt, steps of equal length.", rows, chart)


def concentration(runs: Sequence[Runs]) -> Chart:
    """How much of all |THR| the strongest tokens hold."""
    rows = [
        {"top": str(top), "held": float(value), "seed": seed}
        for seed, records in enumerate(runs)
        if "neutral" in records
        for top, value in zip(
            records["neutral"]["thr/concentration"].top.values,
            records["neutral"]["thr/concentration"].values[0],
            strict=True,
        )
    ]
    chart = (
        alt.Chart(width=430, height=220)
        .mark_line(point=True, strokeWidth=1.2)
        .encode(
            x=alt.X("top:O", title="strongest tokens", sort=None, axis=alt.Axis(labelAngle=0)),
            y=alt.Y("held:Q", title="share of all |THR|", scale=alt.Scale(domain=[0, 1])),
            detail="seed:N",
        )
    )
    return draw("Few tokens carry the training", "Of prompts with right and wrong answers; a line a seed.", rows, chart)


def entropy(runs: Sequence[Runs]) -> Chart:
    """Entropy over training, by the tilt."""
    rows = [row for arm, what in ARMS.items() for row in curves(runs, arm, {"policy/entropy": what})]
    chart = (
        alt.Chart(width=430, height=240)
        .mark_line(strokeWidth=1.2)
        .encode(
            x=alt.X("step:Q", title="step"),
            y=alt.Y("value:Q", title="entropy (nats)", scale=alt.Scale(zero=False)),
            color=alt.Color("what:N", title=None, sort=list(ARMS.values())),
            detail="seed:N",
        )
    )
    return draw("The tilt and the entropy", "Of the next token; one line a seed.", rows, chart)


def displacement(runs: Sequence[Runs]) -> Chart:
    """What each step does to the right answers of its rollout."""
    title, y = "Each step makes right answers likelier", "change of log π of right answers (nats)"
    return mean_lines(runs, ARMS, "thr/displacement", title=title, y=y, points=True)


def sweep(runs: Sequence[Runs]) -> Chart:
    """Every p at the end: greedy, pass@16 and entropy."""
    rows = [
        {"p": TILTS[arm].p, "value": float(measure(records[arm])), "measure": name, "seed": seed}
        for seed, records in enumerate(runs)
        for arm in SWEEP
        if arm in records
        for name, measure in MEASURES.items()
    ]
    chart = (
        alt.Chart(width=150, height=180)
        .mark_line(point=True, strokeWidth=1.2)
        .encode(
            x=alt.X("p:Q"),
            y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False)),
            detail="seed:N",
            column=alt.Column("measure:N", title=None, sort=list(MEASURES)),
        )
        .resolve_scale(y="independent")
    )
    return draw("How far to tilt", "At the end of training; one line a seed.", rows, chart)


def answers(runs: Sequence[Runs]) -> Chart:
    """pass@k at the end, mean over seeds."""
    chart = (
        alt.Chart(width=430, height=240)
        .mark_line(point=True)
        .encode(
            x=alt.X("k:Q", scale=alt.Scale(type="log", base=2), title="answers (k)"),
            y=alt.Y("mean(value):Q", title="pass@k", scale=alt.Scale(zero=False)),
            color=alt.Color("what:N", title=None, sort=list(ARMS.values())),
        )
    )
    return draw(
        "What the tilt is worth",
        "Chance that one of k answers is right, at the end; mean of seeds.",
        tries(runs, ARMS),
        chart,
    )


def compared(runs: Sequence[Runs]) -> Chart:
    """Every arm at the end: greedy, pass@16 and entropy."""
    rows = [
        {"what": what, "value": float(measure(records[arm])), "measure": name}
        for records in runs
        for arm, what in ALL.items()
        if arm in records
        for name, measure in MEASURES.items()
    ]
    chart = (
        alt.Chart(width=150, height=240)
        .mark_point(size=40)
        .encode(
            x=alt.X("value:Q", title=None, scale=alt.Scale(zero=False)),
            y=alt.Y("what:N", title=None, sort=list(ALL.values())),
            column=alt.Column("measure:N", title=None, sort=list(MEASURES)),
        )
        .resolve_scale(x="independent")
    )
    return draw("What it is compared with", "At the end of training; one mark a seed.", rows, chart)
