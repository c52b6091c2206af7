"""Figures of `cot-pass-at-k`: curves over K before and after, training dynamics, the bandit, and the Logic Prior."""

import warnings
from collections.abc import Sequence

import altair as alt
import numpy as np

from dynascope.report import Chart, draw
from dynascope.studies.cot_pass_at_k.claims import curve
from dynascope.studies.cot_pass_at_k.method import SPREADS
from dynascope.studies.harness import Runs
from dynascope.studies.harness.curves import Rows, curves

SHOWN = {"pass_at_k": "Pass@K", "cot_pass_at_k": "CoT-Pass@K"}
WORLDS = {"grpo": "right reasoning pays", "shortcut": "a shortcut pays better"}
BANDITS = {"bandit-prior": "α = 0.9, β = 0.3", "bandit-equal": "α = β = 0.6", "bandit-violated": "α = 0.4, β = 0.7"}


def figures(runs: Sequence[Runs]) -> list[Chart]:
    """All of them."""
    return [over_k(runs), dynamics(runs), prompts(runs), checkpoints(runs), bandit(runs), prior(runs)]


def over_k(runs: Sequence[Runs]) -> Chart:
    """Pass@K and CoT-Pass@K over K, of the base model and after training."""
    rows: Rows = [
        {"k": int(k), "share": float(value), "what": shown, "when": when, "world": world, "seed": seed}
        for seed, records in enumerate(runs)
        for arm, world in WORLDS.items()
        if arm in records
        for name, shown in SHOWN.items()
        for place, when in ((0, "base model"), (-1, "after GRPO"))
        for k, value in zip(records[arm][f"test/{name}"].k.values, curve(records[arm], name, place), strict=True)
    ]
    chart = (
        alt.Chart(width=270, height=230)
        .mark_line(strokeWidth=1.4, point=alt.OverlayMarkDef(size=14))
        .encode(
            x=alt.X("k:Q", title="K", scale=alt.Scale(type="log", base=2)),
            y=alt.Y("share:Q", title=None, scale=alt.Scale(domain=[0, 1])),
            color=alt.Color("what:N", title=None, sort=list(SHOWN.values())),
            strokeDash=alt.StrokeDash("when:N", sort=["after GRPO", "base model"], legend=None),
            detail="seed:N",
            column=alt.Column("world:N", title=None, sort=list(WORLDS.values())),
        )
    )
    return draw(
        "Answers found, and answers reasoned out",
        "Dashed: the base model. Solid: after GRPO. One line a seed.",
        rows,
        chart,
    )


def dynamics(runs: Sequence[Runs]) -> Chart:
    """P(CA) and P(CC|CA) over training."""
    names = {
        "reasoning/answer_correct": "P(CA)",
        "reasoning/chain_correct": "P(CC|CA)",
        "reasoning/cohort_chain_correct": "P(CC|CA), prompts solved at first",
    }
    rows = [row for arm, world in WORLDS.items() for row in curves(runs, arm, names, world=world)]
    chart = (
        alt.Chart(width=270, height=230)
        .mark_line(strokeWidth=1.4)
        .encode(
            x=alt.X("step:Q", title="training step"),
            y=alt.Y("value:Q", title=None, scale=alt.Scale(domain=[0, 1])),
            color=alt.Color("what:N", title=None, sort=list(names.values())),
            detail="seed:N",
            column=alt.Column("world:N", title=None, sort=list(WORLDS.values())),
        )
    )
    return draw(
        "Right answers, and right reasoning among them", "From the rollouts of training. One line a seed.", rows, chart
    )


def prompts(runs: Sequence[Runs]) -> Chart:
    """How P(CA) and P(CC|CA) lie over prompts, at first and at last."""
    rows: Rows = [
        {"level": float(level), "share": float(share), "what": what, "when": when}
        for records in runs
        if "grpo" in records
        for name, what in SPREADS.items()
        for when, values in _first_and_last(records["grpo"][f"prompts/{name}"].values).items()
        for level, share in zip(records["grpo"][f"prompts/{name}"].level.values, values, strict=True)
    ]
    chart = (
        alt.Chart(width=190, height=200)
        .mark_line(point=True, strokeWidth=1.4)
        .encode(
            x=alt.X("level:Q", title=None),
            y=alt.Y("mean(share):Q", title="share of prompts"),
            color=alt.Color("when:N", title=None),
            column=alt.Column("what:N", title=None, sort=list(SPREADS.values()), header=alt.Header(labelLimit=220)),
        )
    )
    return draw("Prompt by prompt", "Rollouts of GRPO, first and last fifth of training; mean over seeds.", rows, chart)


def _first_and_last(values: np.ndarray) -> dict[str, np.ndarray]:
    fifth = max(1, len(values) // 5)
    with warnings.catch_warnings():
        # At first there may be no prompt of a kind, whose shares are then NaN, and so is their mean.
        warnings.simplefilter("ignore", RuntimeWarning)
        return {"first": np.nanmean(values[:fifth], 0), "last": np.nanmean(values[-fifth:], 0)}


def checkpoints(runs: Sequence[Runs]) -> Chart:
    """What the base model becomes when it is taught what a checkpoint wrote."""
    rows = curves(runs, "grpo", {"sft/correct": "right answers", "sft/chain": "right chains"})
    chart = (
        alt.Chart(width=300, height=220)
        .mark_line(strokeWidth=1.4, point=True)
        .encode(
            x=alt.X("step:Q", title="checkpoint (training step)"),
            y=alt.Y("value:Q", title="share after fine-tuning", scale=alt.Scale(domain=[0, 1])),
            color=alt.Color("what:N", title=None),
            detail="seed:N",
        )
    )
    told = "The base model, fine-tuned on a checkpoint's completions with right answers. One line a seed."
    return draw("Reasoning that can be taught on", told, rows, chart)


def bandit(runs: Sequence[Runs]) -> Chart:
    """The chance of right reasoning of the bandit over training."""
    rows: Rows = [
        {"step": int(step), "chance": float(value), "arm": shown, "line": f"{seed}-{run}"}
        for seed, records in enumerate(runs)
        for arm, shown in BANDITS.items()
        if arm in records
        for step, values in zip(
            records[arm]["bandit/chain_correct"].step.values, records[arm]["bandit/chain_correct"].values, strict=True
        )
        for run, value in enumerate(values)
    ]
    chart = (
        alt.Chart(width=430, height=220)
        .mark_line(strokeWidth=1, opacity=0.8)
        .encode(
            x=alt.X("step:Q", title="update"),
            y=alt.Y("chance:Q", title="chance of right reasoning", scale=alt.Scale(domain=[0, 1])),
            color=alt.Color("arm:N", title=None, sort=list(BANDITS.values())),
            detail="line:N",
        )
    )
    return draw("The theorem on a bandit", "Groups of 8, learning rate 0.3. One line a run.", rows, chart)


def prior(runs: Sequence[Runs]) -> Chart:
    """α and β, and the advantages of right and wrong chains."""
    names = {
        "prior/alpha": "α: right answer after a right chain",
        "prior/beta": "β: after a wrong one",
        "advantage/right_chain": "advantage of right chains",
        "advantage/wrong_chain": "advantage of wrong chains",
    }
    rows = [row for arm, world in WORLDS.items() for row in curves(runs, arm, names, world=world)]
    chart = (
        alt.Chart(width=270, height=230)
        .mark_line(strokeWidth=1.2)
        .encode(
            x=alt.X("step:Q", title="training step"),
            y=alt.Y("value:Q", title=None),
            color=alt.Color("what:N", title=None, sort=list(names.values()), legend=alt.Legend(labelLimit=260)),
            detail="seed:N",
            column=alt.Column("world:N", title=None, sort=list(WORLDS.values())),
        )
    )
    return draw(
        "The Logic Prior and what it does to advantages", "From the rollouts of training. One line a seed.", rows, chart
    )
