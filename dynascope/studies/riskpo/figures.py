"""Figures of `riskpo`: entropy and the lower tail over training, what several tries solve, and the tracked quantiles."""

from collections.abc import Sequence

import altair as alt

from dynascope.report import Chart, draw
from dynascope.studies.harness import Runs
from dynascope.studies.harness.curves import mean_lines, tries_chart

ARMS = {
    "grpo-sequence": "GRPO, sequence ratio",
    "grpo": "GRPO, token ratio",
    "riskpo": "RiskPO",
    "riskpo-centred": "RiskPO, centred",
    "riskpo-unit": "RiskPO, unit size",
    "riskpo-single": "RiskPO, no bundles",
    "seeking": "risk-seeking",
}


def figures(runs: Sequence[Runs]) -> list[Chart]:
    """Entropy, Pass@k and the lower tail against GRPO, and the tracker."""
    return [entropies(runs), solved(runs), tails(runs), quantiles(runs)]


def entropies(runs: Sequence[Runs]) -> Chart:
    """Entropy of a token, by objective."""
    title = "What each objective leaves of the entropy"
    return mean_lines(runs, ARMS, "policy/entropy", title=title, y="entropy of a token (nats)")


def solved(runs: Sequence[Runs]) -> Chart:
    """Pass@k at the end, by objective."""
    return tries_chart(runs, ARMS, title="What several tries solve")


def tails(runs: Sequence[Runs]) -> Chart:
    """The worst bundles, by objective."""
    title = "The worst fifth of bundles"
    bundled = {arm: shown for arm, shown in ARMS.items() if arm != "riskpo-single"}  # one answer is no bundle
    return mean_lines(runs, bundled, "risk/cvar", title=title, y="right answers in a bundle, worst fifth")


def quantiles(runs: Sequence[Runs]) -> Chart:
    """Tracked quantiles of bundle scores, first seed."""
    series = runs[0]["riskpo"]["risk/quantile"]
    rows = [
        {"step": int(step), "level": float(level), "score": float(value)}
        for step, values in zip(series.step.values, series.values, strict=True)
        for level, value in zip(series.level.values, values, strict=True)
        if round(100 * float(level)) in (5, 20, 35, 50, 65, 80, 95)
    ]
    chart = (
        alt.Chart(width=430, height=260)
        .mark_line(strokeWidth=1.4)
        .encode(
            x=alt.X("step:Q", title="rollout"),
            y=alt.Y("score:Q", title="right answers in a bundle", scale=alt.Scale(zero=False)),
            color=alt.Color("level:O", title="level", scale=alt.Scale(scheme="viridis")),
        )
    )
    return draw("Quantiles of bundle scores, as they are tracked", "RiskPO, first seed.", rows, chart)
