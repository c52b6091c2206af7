"""Figures of `kdrl`: what each way of teaching comes to, how it gets there, how near the teacher, and what that says."""

from collections.abc import Sequence

import altair as alt
import numpy as np

from dynascope.report import Chart, draw
from dynascope.studies.harness import Runs
from dynascope.studies.harness.curves import curves, mean_lines

ARMS = {
    "grpo": "rewards (GRPO)",
    "kd-k1": "teacher, k1",
    "kd-k2": "teacher, k2 (KD-RKL)",
    "sft": "teacher's samples (SFT)",
    "kdrl": "both, k2 (KDRL)",
    "kdrl-k3": "both, k3",
    "kdrl-top": "both, student's top 4",
    "kdrl-annealed": "both, annealed",
    "kdrl-response": "both, wrong answers only",
    "kdrl-group": "both, unsolved prompts only",
    "weak-grpo": "weak start, rewards",
    "weak-kdrl": "weak start, both",
}


def figures(runs: Sequence[Runs]) -> list[Chart]:
    """Ends, curves, the exact divergence, and the histogram of R."""
    return [ends(runs), learning(runs), distances(runs), gaps(runs)]


def ends(runs: Sequence[Runs]) -> Chart:
    """Right answers at the start and at the end, every arm."""
    rows = [
        {"what": what, "right": float(records[arm]["test/correct"].values[place]), "when": when}
        for records in runs
        for arm, what in ARMS.items()
        if arm in records
        for place, when in ((0, "start"), (-1, "end"))
    ]
    chart = (
        alt.Chart(width=380, height=280)
        .mark_point(size=45)
        .encode(
            x=alt.X("right:Q", title="share of right answers"),
            y=alt.Y("what:N", title=None, sort=list(ARMS.values())),
            color=alt.Color("when:N", title=None, sort=["start", "end"]),
        )
    )
    return draw("What each way of teaching comes to", "One mark a seed.", rows, chart)


def learning(runs: Sequence[Runs]) -> Chart:
    """Rewards of rollouts over training."""
    shown = ("grpo", "kd-k1", "kd-k2", "kdrl", "kdrl-annealed")
    rows = [row for arm in shown for row in curves(runs, arm, {"rollout/correct": ARMS[arm]})]
    chart = (
        alt.Chart(width=430, height=240)
        .mark_line(strokeWidth=1.2)
        .encode(
            x=alt.X("step:Q", title="step"),
            y=alt.Y("mean(value):Q", title="right in the rollout"),
            color=alt.Color("what:N", title=None, sort=[ARMS[arm] for arm in shown]),
        )
    )
    return draw("How it gets there", "Mean of seeds.", rows, chart)


def distances(runs: Sequence[Runs]) -> Chart:
    """The divergence from the teacher, summed over the vocabulary."""
    shown = ("grpo", "kd-k1", "kd-k2", "kdrl", "kdrl-k3", "kdrl-top")
    title = "How far the student is from the teacher"
    arms = {arm: ARMS[arm] for arm in shown}
    return mean_lines(runs, arms, "teacher/kl_exact", title=title, y="KL(π ‖ teacher) of a token (nats)", points=True)


def gaps(runs: Sequence[Runs]) -> Chart:
    """The histogram of R at the first and the last look."""
    rows = []
    told = [records["kdrl"]["teacher/gap_histogram"] for records in runs if "kdrl" in records]
    if told:
        for when, place in (("first step", 0), ("last look", -1)):
            shares = np.mean([one.values[place] for one in told], 0)
            rows += [
                {"gap": str(gap), "share": float(share), "when": when}
                for gap, share in zip(told[0].gap.values, shares, strict=True)
            ]
    chart = (
        alt.Chart(width=430, height=220)
        .mark_bar()
        .encode(
            x=alt.X("gap:N", title="R = log π_teacher − log π (nats)", sort=None, axis=alt.Axis(labelAngle=-40)),
            y=alt.Y("share:Q", title="share of tokens"),
            color=alt.Color("when:N", title=None),
            xOffset="when:N",
        )
    )
    return draw("What the teacher says of the student's tokens", "KDRL, mean of seeds.", rows, chart)
