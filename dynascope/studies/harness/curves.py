"""Series of a study's records as the rows of a chart."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import altair as alt

from dynascope.report import Chart, draw
from dynascope.studies.harness import Runs
from dynascope.studies.harness.verdict import student_interval

Rows: TypeAlias = list[dict[str, object]]


def curves(runs: Sequence[Runs], arm: str, names: Mapping[str, str], /, **told: object) -> Rows:
    """Scalar series of an arm over steps, one row a seed, series and step; `names` say what each is called in the chart.

    Rows have "step", "value", "what" and "seed", and what else is told. Seeds in which the arm failed are left out, and series
    that a record does not have, as one from before they were measured.

    >>> curves(runs, "baseline", {"train/loss": "training"}, alpha="1")
    """
    return [
        {"step": int(step), "value": float(value), "what": shown, "seed": seed, **told}
        for seed, records in enumerate(runs)
        if arm in records
        for name, shown in names.items()
        if name in records[arm]
        for step, value in zip(records[arm][name].step.values, records[arm][name].values, strict=True)
    ]


def tries(runs: Sequence[Runs], arms: Mapping[str, str], place: int = -1) -> Rows:
    """Pass@k of arms, by the names that the chart calls them, at a test (the last): one row a seed and k.

    Rows have "k", "value", "what" and "seed".

    >>> tries(runs, {"grpo": "GRPO"})
    """
    return [
        {"k": int(k), "value": float(value), "what": shown, "seed": seed}
        for seed, records in enumerate(runs)
        for arm, shown in arms.items()
        if arm in records
        for k, value in zip(
            records[arm]["test/pass_at_k"].k.values, records[arm]["test/pass_at_k"].values[place], strict=True
        )
    ]


def with_intervals(rows: Rows, x: str) -> Rows:
    """Means over seeds with their 95 % intervals (Student's t): a row a value of `x` and line, with "mean", "low" and "high".

    One seed has no interval: both ends are then the mean. What is not finite is left out.

    >>> with_intervals(curves(runs, "grpo", {"rollout/reward": "GRPO"}), "step")
    """
    found: dict[tuple[Any, Any], list[float]] = {}
    for row in rows:
        found.setdefault((row[x], row["what"]), []).append(float(str(row["value"])))
    told: Rows = []
    for (place, what), values in found.items():
        known = [one for one in values if math.isfinite(one)]
        if known:
            low, high = student_interval(known) if len(known) > 1 else (known[0], known[0])
            told.append({x: place, "what": what, "mean": sum(known) / len(known), "low": low, "high": high})
    return told


def tries_chart(runs: Sequence[Runs], arms: Mapping[str, str], *, title: str) -> Chart:
    """Pass@k at the end, means over seeds, a line an arm.

    >>> tries_chart(runs, {"grpo": "GRPO"}, title="What several tries solve")
    """
    chart = (
        alt.Chart(width=430, height=260)
        .mark_line(point=True, strokeWidth=1.6)
        .encode(
            x=alt.X("k:Q", scale=alt.Scale(type="log", base=2), title="tries k"),
            y=alt.Y("mean(value):Q", title="Pass@k after training", scale=alt.Scale(zero=False)),
            color=alt.Color("what:N", title=None, sort=list(arms.values())),
        )
    )
    told = "Chance that one of k answers is right, at the end; mean over seeds."
    return draw(title, told, tries(runs, arms), chart)


def mean_lines(
    runs: Sequence[Runs], arms: Mapping[str, str], series: str, *, title: str, y: str, points: bool = False
) -> Chart:
    """Means over seeds of a series, a line an arm.

    >>> mean_lines(runs, {"grpo": "GRPO"}, "policy/entropy", title="Entropy", y="entropy of a token (nats)")
    """
    rows = [row for arm, shown in arms.items() for row in curves(runs, arm, {series: shown})]
    chart = (
        alt.Chart(width=430, height=260)
        .mark_line(strokeWidth=1.6, point=points)
        .encode(
            x=alt.X("step:Q", title="rollout"),
            y=alt.Y("mean(value):Q", title=y, scale=alt.Scale(zero=False)),
            color=alt.Color("what:N", title=None, sort=list(arms.values())),
        )
    )
    return draw(title, "Mean over seeds.", rows, chart)
