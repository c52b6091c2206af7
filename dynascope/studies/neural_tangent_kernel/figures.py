"""Figures of `neural-tangent-kernel`: kernels and functions over widths, and the order in which modes are learnt."""

import math
from collections.abc import Sequence

import altair as alt
import numpy as np
import torch

from dynascope.kernels import limit_kernels
from dynascope.kernels.limits import Relu
from dynascope.report import Chart, draw
from dynascope.studies.harness import Runs
from dynascope.studies.neural_tangent_kernel.claims import half_lives
from dynascope.studies.neural_tangent_kernel.method import DEPTH, WIDTHS, infinite, on_circle


def figures(runs: Sequence[Runs]) -> list[Chart]:
    """The paper's figures 1 and 2, and the rates behind them."""
    angles = np.linspace(-math.pi, math.pi, 65)
    limit = limit_kernels(infinite(DEPTH, Relu()), on_circle(torch.zeros(1)).double(), on_circle(torch.tensor(angles)))[
        1
    ]
    kernels = [
        {"angle": float(angle), "kernel": float(value), "width": str(width), "when": when, "seed": seed}
        for seed, records in enumerate(runs)
        for width in WIDTHS
        for when, at in (("at the start", 0), ("after training", -1))
        for angle, value in zip(angles, records[f"circle-{width}"]["circle/kernel"].values[at], strict=True)
    ]
    kernels += [
        {"angle": float(angle), "kernel": float(value), "width": "infinite", "when": when, "seed": 0}
        for when in ("at the start", "after training")
        for angle, value in zip(angles, limit[0].tolist(), strict=True)
    ]
    kernel_chart = (
        alt.Chart(width=230, height=200)
        .mark_line(strokeWidth=1.4)
        .encode(
            x=alt.X("angle:Q", title="angle between the inputs (rad)"),
            y=alt.Y("kernel:Q", title="tangent kernel", scale=alt.Scale(zero=False)),
            color=alt.Color("width:N", sort=[*map(str, WIDTHS), "infinite"], title="width"),
            detail="seed:N",
            column=alt.Column("when:N", sort=["at the start", "after training"], title=None),
        )
    )
    rates = [
        {"width": width, "distance": float(records[f"circle-{width}"][name].values[-1]), "what": what, "seed": seed}
        for seed, records in enumerate(runs)
        for width in WIDTHS
        for name, what in (("limit/error", "from the limit, at the start"), ("kernel/distance", "moved by training"))
    ]
    rate_chart = (
        alt.Chart(width=400, height=220)
        .mark_line(point=True)
        .encode(
            x=alt.X("width:Q", scale=alt.Scale(type="log", base=4), title="width"),
            y=alt.Y("distance:Q", scale=alt.Scale(type="log"), title="relative distance of kernels"),
            color=alt.Color("what:N", title=None),
            detail="seed:N",
        )
    )
    first = runs[0]["ensemble"]
    functions = [
        {
            "angle": float(angle),
            "mean": float(mean),
            "low": float(mean - 1.28 * std),
            "high": float(mean + 1.28 * std),
            "output": float(value),
            "network": number,
        }
        for number, outputs in enumerate(first["ensemble/outputs"].values[0][:20])
        for angle, value, mean, std in zip(
            np.linspace(-math.pi, math.pi, 33)[:-1],
            outputs,
            first["predicted/mean"].values[0],
            first["predicted/std"].values[0],
            strict=True,
        )
    ]
    angle_axis = alt.X("angle:Q", title="angle of the input (rad)")
    base = alt.Chart(width=400, height=240)
    band = base.mark_area(opacity=0.25).encode(x=angle_axis, y=alt.Y("low:Q", title="output"), y2="high:Q")
    lines = base.mark_line(strokeWidth=0.7, opacity=0.6, color="#8C8C8C").encode(
        x=angle_axis, y="output:Q", detail="network:N"
    )
    centre = base.mark_line(strokeWidth=2.5, strokeDash=[6, 3]).encode(x=angle_axis, y="mean:Q")
    modes = [
        {"mode": mode + 1, "steps": float(value), "what": what, "seed": seed}
        for seed, records in enumerate(runs)
        for what, of_modes in zip(("measured", "predicted"), half_lives(records, "digits-4096"), strict=True)
        for mode, value in enumerate(of_modes)
    ]
    mode_chart = (
        alt.Chart(width=400, height=220)
        .mark_point(filled=True, size=45)
        .encode(
            x=alt.X("mode:O", title="eigenvector of the kernel, top first"),
            y=alt.Y("steps:Q", scale=alt.Scale(type="log"), title="steps to half of the error"),
            color=alt.Color("what:N", title=None),
            shape=alt.Shape("what:N", title=None),
        )
    )
    return [
        draw(
            "Wide kernels agree, and stand still", "One line a seed; four layers on the circle.", kernels, kernel_chart
        ),
        draw("Both distances fall with width", "One line a seed.", rates, rate_chart),
        draw(
            "Trained networks are draws from a Gaussian",
            "Grey: 20 trained networks. Dashed and shaded: predicted mean and 10 to 90 % range.",
            functions,
            band + lines + centre,
        ),
        draw("Top eigenvectors are learnt first", "Odd against even digits, width 4096.", modes, mode_chart),
    ]
