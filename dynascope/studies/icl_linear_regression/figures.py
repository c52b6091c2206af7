"""Figures of `icl-linear-regression`: the circuits, how heads come to them, and what they are worth."""

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import torch

from dynascope.data.in_context.linear_regression import toeplitz_covariance
from dynascope.nn.circuits import Circuits
from dynascope.probes.circuits import task_head_allocation
from dynascope.report import Chart, draw
from dynascope.studies.harness import Runs
from dynascope.studies.icl_linear_regression.claims import last, networks, risk_at, setting, trained_preconditioners
from dynascope.studies.icl_linear_regression.method import RHO, TASKS
from dynascope.theory.in_context_regression import (
    bayes_risk_asymptotic,
    best_step,
    debiased_gd_risk,
    gd_risk,
    head_phases,
    preconditioner,
    simulate_head_flow,
)

SIGNED = alt.Scale(scheme="redblue", domainMid=0, reverse=True)
HEADS = (1, 2, 3, 4)


def figures(runs: Sequence[Runs]) -> list[Chart]:
    """What heads compare and pass on, risk by heads and by length, training, preconditioning, and the division of tasks."""
    drawn = [comparing, passing_on, by_heads, by_length, training, flow, preconditioning, tasks]
    return [one(runs) for one in drawn]


def comparing(runs: Sequence[Runs]) -> Chart:
    """KQ of every head of two networks."""
    rows = [
        {"key": int(i) + 1, "query": int(j) + 1, "weight": float(weight), "head": f"{count} heads, head {head + 1}"}
        for count in (2, 4)
        for head, kq in enumerate(networks(runs[0], f"heads-{count}")[0][0])
        for (i, j), weight in np.ndenumerate(kq[:, :-1])
    ]
    chart = (
        alt.Chart(width=130, height=130)
        .mark_rect()
        .encode(
            x=alt.X("query:O", title="query's coordinate", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("key:O", title="key's coordinate"),
            color=alt.Color("weight:Q", title="KQ", scale=SIGNED),
            facet=alt.Facet("head:N", title=None, columns=3),
        )
    )
    told = (
        "KQ after training, first seed and network. The last key coordinate is the label, of which the query has none."
    )
    return draw("Heads compare inputs by a multiple of the identity", told, rows, chart)


def passing_on(runs: Sequence[Runs]) -> Chart:
    """OV of every head."""
    rows = [
        {"coordinate": place + 1, "weight": float(weight), "head": head + 1, "network": _named(count)}
        for count in HEADS
        for head, ov in enumerate(networks(runs[0], f"heads-{count}")[0][1])
        for place, weight in enumerate(ov[0])
    ]
    chart = (
        alt.Chart(width=170, height=130)
        .mark_bar()
        .encode(
            x=alt.X("coordinate:O", title="coordinate of the token", axis=alt.Axis(labelAngle=0)),
            xOffset="head:N",
            y=alt.Y("weight:Q", title="OV"),
            color=alt.Color("head:N", title="head"),
            facet=alt.Facet("network:N", title=None, columns=2),
        )
    )
    told = (
        "OV after training, first seed and network. The last coordinate is the label; "
        "over heads of both signs it adds up to nothing."
    )
    return draw("Heads pass on labels, and cancel", told, rows, chart)


def _named(heads: int) -> str:
    return "1 head" if heads == 1 else f"{heads} heads"


def by_heads(runs: Sequence[Runs]) -> Chart:
    """Risk against the number of heads."""
    dim, length, noise = setting(runs[0])
    rows: list[dict[str, Any]] = [
        {"heads": count, "risk": float(risk), "what": "trained network"}
        for records in runs
        for count in HEADS
        for risk in risk_at(records, f"heads-{count}")
    ]
    levels = {
        "best step of gradient descent": gd_risk(best_step(dim, length, noise, debiased=False), dim, length, noise),
        "ridge regression (limit)": bayes_risk_asymptotic(dim / length, noise),
    }
    rows += [{"level": risk, "what": what} for what, risk in levels.items()]
    base = alt.Chart().encode(color=alt.Color("what:N", title=None))
    points = base.mark_point(filled=True, size=45, opacity=0.7).encode(
        x=alt.X("heads:O", title="heads", axis=alt.Axis(labelAngle=0), scale=alt.Scale(domain=list(HEADS))),
        y=alt.Y("risk:Q", title="risk", scale=alt.Scale(domainMin=0)),
    )
    lines = base.mark_rule(strokeDash=[5, 3], strokeWidth=1.5).encode(y="level:Q")
    chart = alt.layer(points, lines).properties(width=300, height=220)
    told = f"Mean squared error on {length} examples, one point a network. Heads of one sign do as one head does."
    return draw("Two heads do what one cannot, and more add nothing", told, rows, chart)


def by_length(runs: Sequence[Runs]) -> Chart:
    """Risk against the number of examples."""
    dim, trained, noise = setting(runs[0])
    lengths = [int(length) for length in last(runs[0], "heads-2", "lengths")]
    shown = {"heads-1": "one softmax head", "heads-2": "two softmax heads", "linear": "one linear head"}
    rows: list[dict[str, Any]] = [
        {
            "length": length,
            "risk": float(np.median(risk_at(records, arm, length))),
            "what": what,
            "line": f"{what} {seed}",
        }
        for seed, records in enumerate(runs)
        for arm, what in shown.items()
        for length in lengths
    ]
    step = best_step(dim, trained, noise)
    for length in lengths:
        levels = {
            "debiased descent, closed form": debiased_gd_risk(step, dim, length, noise),
            "ridge regression (limit)": bayes_risk_asymptotic(dim / length, noise),
        }
        rows += [{"length": length, "risk": risk, "what": what, "line": what} for what, risk in levels.items()]
    order = [*shown.values(), "debiased descent, closed form", "ridge regression (limit)"]
    chart = (
        alt.Chart(width=430, height=240)
        .mark_line(strokeWidth=1.5, point=alt.OverlayMarkDef(size=20))
        .encode(
            x=alt.X("length:Q", title="examples in the prompt"),
            y=alt.Y("risk:Q", title="risk", scale=alt.Scale(type="log")),
            color=alt.Color("what:N", title=None, sort=order, legend=alt.Legend(labelLimit=250)),
            detail="line:N",
        )
    )
    told = f"Trained at {trained} examples, weights left as they are; one line a seed, its middle network."
    return draw("Softmax knows how long a prompt is", told, rows, chart)


def training(runs: Sequence[Runs]) -> Chart:
    """ω and μ of one network over training, and its phases."""
    record = runs[0]["heads-4"]
    omega, mu = (torch.tensor(record[f"circuits/{name}"].values[:, 0]) for name in ("omega", "mu"))
    steps = record["circuits/omega"].step.values
    told = f"Four heads, first seed. Phases: {_phases(omega, mu, steps, 'step {:.0f}')}."
    return _two_numbers("How four heads come to the pattern", told, omega, mu, steps, "training step")


def flow(runs: Sequence[Runs]) -> Chart:
    """The same two numbers under the gradient flow of the reduced model."""
    generator = torch.Generator().manual_seed(0)
    omega, mu = (0.05 * torch.randn(4, generator=generator) for _ in range(2))
    found = simulate_head_flow(omega, mu, *setting(runs[0]), times=torch.logspace(-1, 4, 80))
    times = found.times.numpy()
    phases = _phases(found.omega, found.mu, times, "t = {:.1f}")
    told = f"Gradient flow of the closed-form loss, four heads from a small start. Phases: {phases}."
    return _two_numbers("How theory has it", told, found.omega, found.mu, times, "time (learning rate times steps)")


def _phases(omega: torch.Tensor, mu: torch.Tensor, times: np.ndarray, at: str) -> str:
    phases = head_phases(omega, mu)
    return ", ".join(f"{phase} from {at.format(times[phases.index(phase)])}" for phase in dict.fromkeys(phases))


def _two_numbers(title: str, told: str, omega: torch.Tensor, mu: torch.Tensor, times: np.ndarray, axis: str) -> Chart:
    rows = [
        {"time": float(time), "value": float(value), "head": head + 1, "number": number}
        for number, values in (("ω (compares)", omega), ("μ (passes on)", mu))
        for time, row in zip(times, values, strict=True)
        for head, value in enumerate(row)
    ]
    chart = (
        alt.Chart(width=250, height=200)
        .mark_line(strokeWidth=1.5)
        .encode(
            x=alt.X(
                "time:Q",
                scale=alt.Scale(type="symlog", constant=0.1 if times[0] else 1),
                axis=alt.Axis(values=[0, 1, 10, 100, 1000, 10_000, 100_000], title=axis),
            ),
            y=alt.Y("value:Q", title=None),
            color=alt.Color("head:N", title="head"),
            column=alt.Column("number:N", title=None, sort=["ω (compares)", "μ (passes on)"]),
        )
        .resolve_scale(y="independent")
    )
    return draw(title, told, rows, chart)


def preconditioning(runs: Sequence[Runs]) -> Chart:
    """The trained preconditioner beside the best one."""
    dim, length, noise = setting(runs[0])
    best = preconditioner(toeplitz_covariance(dim, RHO), length, noise).numpy()
    shown = {"trained, Σ μ KQ": trained_preconditioners(runs[0])[0], "best, closed form": best}
    largest = max(float(np.abs(matrix).max()) for matrix in shown.values())
    rows = [
        {"row": int(i) + 1, "column": int(j) + 1, "weight": float(weight), "which": which}
        for which, matrix in shown.items()
        for (i, j), weight in np.ndenumerate(matrix)
    ]
    chart = (
        alt.Chart(width=150, height=150)
        .mark_rect()
        .encode(
            x=alt.X("column:O", title="input", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("row:O", title="input"),
            color=alt.Color(
                "weight:Q", title="weight", scale=alt.Scale(scheme="redblue", domain=[-largest, largest], reverse=True)
            ),
            column=alt.Column("which:N", title=None, sort=list(shown)),
        )
    )
    plain = float(np.trace(best) / (np.linalg.norm(best) * dim**0.5))
    told = f"Two heads, first seed and network; correlation {RHO:g} of neighbours. Cosine of identity with best: {plain:.2f}."
    return draw("Correlated inputs are preconditioned", told, rows, chart)


def tasks(runs: Sequence[Runs]) -> Chart:
    """Which head does which task."""
    rows, regimes = [], []
    for count in (4, 3, 2):
        found = [
            task_head_allocation(Circuits(torch.tensor(kq), torch.tensor(ov)), TASKS)
            for records in runs
            for kq, ov in networks(records, f"tasks-{count}")
        ]
        names = [one.regime for one in found]
        regimes.append(f"{count} heads: " + ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names)))
        rows += [
            {"head": head + 1, "task": task + 1, "share": float(share), "network": f"{count} heads"}
            for (head, task), share in np.ndenumerate(found[0].share.numpy())
        ]
    chart = (
        alt.Chart(width=110, height=110)
        .mark_rect()
        .encode(
            x=alt.X("task:O", title="task", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("head:O", title="head"),
            color=alt.Color("share:Q", title="share of the task", scale=alt.Scale(scheme="blues", domainMin=0)),
            column=alt.Column("network:N", title=None, sort=["4 heads", "3 heads", "2 heads"]),
        )
        .resolve_scale(y="independent")
    )
    told = f"First seed and network. All networks: {'; '.join(regimes)}."
    return draw("Heads divide two tasks among them", told, rows, chart)
