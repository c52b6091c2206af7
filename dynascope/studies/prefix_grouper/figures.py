"""Figures of `prefix-grouper`: what is saved over sizes, and how far both trainings are apart."""

from collections.abc import Sequence

import altair as alt
import numpy as np

from dynascope.report import Chart, draw
from dynascope.studies.harness import Runs
from dynascope.studies.harness.curves import Rows, curves

GROUP = alt.Color("group:N", title="completions a prompt", legend=alt.Legend(orient="top"))


def figures(runs: Sequence[Runs]) -> list[Chart]:
    """Speedup over the length of prompts, time against counted work, memory, and both trainings."""
    return [speedups(runs), against_flops(runs), memory(runs), apart(runs)]


def points(runs: Sequence[Runs]) -> Rows:
    """The grid of costs, speedups as medians over seeds."""
    records = [one["cost"] for one in runs if "cost" in one]
    if not records:
        return []
    first, speedup = records[0], np.median([one["speedup"].values[0] for one in records], 0)
    return [
        {
            "prompt": int(prompt),
            "completion": f"completions of {int(completion)}",
            "group": int(group),
            "speedup": float(speedup[i, j, k]),
            **{name: float(first[name].values[0, i, j, k]) for name in ("token_ratio", "flops_ratio", "kept_ratio")},
        }
        for i, prompt in enumerate(first["speedup"].prompt.values)
        for j, completion in enumerate(first["speedup"].completion.values)
        for k, group in enumerate(first["speedup"].group.values)
    ]


def speedups(runs: Sequence[Runs]) -> Chart:
    """Figure 2's axes, in time."""
    chart = alt.Chart().mark_line(point=True)
    x = alt.X("prompt:Q", title="tokens of the prompt", scale=alt.Scale(type="log", base=2))
    y = alt.Y("speedup:Q", title="times faster", scale=alt.Scale(type="log", base=2))
    dash = alt.StrokeDash("completion:N", title=None, legend=alt.Legend(symbolType="stroke"))
    drawn = chart.encode(x=x, y=y, color=GROUP, strokeDash=dash)
    return draw("Speedup", "Forward and backward, over repeated prompts; medians.", points(runs), drawn)


def against_flops(runs: Sequence[Runs]) -> Chart:
    """How much of what counting promises becomes time."""
    rows = [{**row, "promised": 1 / float(str(row["flops_ratio"]))} for row in points(runs)]
    scale = alt.Scale(type="log", base=2)
    x = alt.X("promised:Q", title="FLOPs saved (times)", scale=scale)
    y = alt.Y("speedup:Q", title="times faster", scale=scale)
    dots = alt.Chart().mark_circle(size=60).encode(x=x, y=y, color=GROUP)
    line = alt.Chart().mark_line(strokeDash=[4, 3], color="#8C8C8C").encode(x=x, y=alt.Y("promised:Q", scale=scale))
    return draw("Time against FLOPs", "On the dashed line all that is saved is time.", rows, line + dots)


def memory(runs: Sequence[Runs]) -> Chart:
    """Figure 3's axes: what autograd keeps."""
    x = alt.X("token_ratio:Q", title="tokens, shared over repeated")
    y = alt.Y("kept_ratio:Q", title="bytes kept")
    dots = alt.Chart().mark_circle(size=60).encode(x=x, y=y, color=GROUP)
    line = alt.Chart().mark_line(strokeDash=[4, 3], color="#8C8C8C").encode(x=x, y=alt.Y("token_ratio:Q"))
    return draw("Memory", "Kept for the backward pass, shared over repeated.", points(runs), line + dots)


def apart(runs: Sequence[Runs]) -> Chart:
    """Lemma 2.1 as it is in floating point."""
    names = {"loss_difference": "loss", "weight_difference": "weights"}
    rows = [row for arm in ("float32", "float64") for row in curves(runs, arm, names, precision=arm)]
    rows = [row for row in rows if float(str(row["value"])) > 0]
    y = alt.Y("value:Q", title="largest difference", scale=alt.Scale(type="log"), axis=alt.Axis(format=".0e"))
    told = {"color": alt.Color("precision:N", title=None), "strokeDash": alt.StrokeDash("what:N", title=None)}
    chart = alt.Chart().mark_line(opacity=0.7).encode(x=alt.X("step:Q"), y=y, detail="seed:N", **told)
    return draw("Two trainings", "With shared and with repeated prompts, on the same samples.", rows, chart)
