"""Figures of `simplerl-zoo`: the zoo's growth, formats, difficulties, cold starts, and the two bandits."""

from collections.abc import Mapping, Sequence

import altair as alt

from dynascope.report import Chart, draw
from dynascope.studies.harness import Runs
from dynascope.studies.harness.curves import Rows, curves
from dynascope.studies.simplerl_zoo.claims import ZOO, warnings

SERIES = {
    "benchmark/correct": "right answers",
    "rollout/length": "length (tokens)",
    "rollout/truncated": "truncated",
    "rollout/behaviours": "with a check",
    "rollout/formatted": "boxed",
}
FORMATS = {"weak": "right answers", "weak-strict": "strict format"}
LEVELS = {"weak-easy": "one digit", "weak": "two digits", "weak-hard": "three digits"}
STARTS = {"weak": "none", "cold-short": "short", "cold-long": "long"}


def figures(runs: Sequence[Runs]) -> list[Chart]:
    """The paper's figures of growth, pass@k, format, difficulty and cold start, and the bandits."""
    return [
        panels(runs, {arm: arm for arm in ZOO}, "base", "The same recipe on three base models", "A line a seed."),
        pass_at_k(runs),
        panels(runs, FORMATS, "reward", "A strict format", "Answers out of format cost 1, whatever they say."),
        panels(runs, LEVELS, "questions", "Difficulty of the questions", told_of(runs)),
        panels(runs, STARTS, "cold start", "Fine-tuning first", "On short, boxed chains without a check."),
        bandits(runs),
        difficulties(runs),
    ]


def panels(runs: Sequence[Runs], arms: Mapping[str, str], what: str, title: str, told: str) -> Chart:
    """Some arms by the monitors."""
    rows: Rows = [row for arm, shown in arms.items() for row in curves(runs, arm, SERIES, arm=shown)]
    base = alt.Chart(alt.NamedData("rows"), width=165, height=120).encode(
        x=alt.X("step:Q", title="step", axis=alt.Axis(tickCount=4)),
        y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False)),
        color=alt.Color("arm:N", title=what, sort=list(arms.values())),
    )
    lines = base.mark_line(strokeWidth=1.2, opacity=0.75).encode(detail="seed:N")
    chart = lines.facet(facet=alt.Facet("what:N", title=None, sort=list(SERIES.values())), columns=3).resolve_scale(
        y="independent"
    )
    return draw(title, told, rows, chart)


def told_of(runs: Sequence[Runs]) -> str:
    """What the monitors warned of, by difficulty."""
    found = {
        shown: sorted({warning for records in runs if arm in records for warning in warnings(records[arm])})
        for arm, shown in LEVELS.items()
    }
    parts = [f"{shown}: {', '.join(each) or 'nothing'}" for shown, each in found.items()]
    return f"A weak base, tested on two digits. Warned of with {'; '.join(parts)}."


def pass_at_k(runs: Sequence[Runs]) -> Chart:
    """pass@k before and after."""
    rows: Rows = []
    for seed, records in enumerate(runs):
        for arm in ZOO:
            if arm not in records:
                continue
            series = records[arm]["benchmark/pass_at_k"]
            for when, place in (("before", 0), ("after", -1)):
                rows += [
                    {"k": int(k), "value": float(value), "when": when, "base": arm, "seed": seed}
                    for k, value in zip(series.k.values, series.values[place], strict=True)
                ]
    chart = (
        alt.Chart(width=170, height=170)
        .mark_line(point=True, strokeWidth=1.3)
        .encode(
            x=alt.X("k:Q", scale=alt.Scale(type="log", base=2), title="k", axis=alt.Axis(values=[1, 2, 4, 8, 16, 32])),
            y=alt.Y("value:Q", title="pass@k"),
            color=alt.Color("when:N", title=None, sort=["before", "after"]),
            detail="seed:N",
            column=alt.Column("base:N", title=None, sort=list(ZOO)),
        )
    )
    return draw("What k tries can find", "Two-digit sums, a line a seed.", rows, chart)


def bandits(runs: Sequence[Runs]) -> Chart:
    """The format bandit."""
    arms = {"format-bandit": "right answers", "format-bandit-strict": "strict format"}
    rows = [row for arm, shown in arms.items() for row in curves(runs, arm, {"bandit/correct": shown})]
    chart = (
        alt.Chart(width=430, height=200)
        .mark_line(strokeWidth=1.3)
        .encode(
            x=alt.X("step:Q", title="step"),
            y=alt.Y("value:Q", title="P(right)"),
            color=alt.Color("what:N", title="reward", sort=list(arms.values())),
            detail="seed:N",
        )
    )
    told = "Two independent coins, right and formatted: the strict format delays, and does not lower, what is reached."
    return draw("A strict format as a bandit", told, rows, chart)


def difficulties(runs: Sequence[Runs]) -> Chart:
    """The difficulty bandit."""
    rows: Rows = []
    for seed, records in enumerate(runs):
        for arm, shown in (("difficulty-bandit-weak", "weak start"), ("difficulty-bandit-strong", "strong start")):
            if arm in records:
                series = records[arm]["bandit/gain"]
                rows += [
                    {"difficulty": float(d), "gain": float(value), "start": shown, "seed": seed}
                    for d, value in zip(series.difficulty.values, series.values[0], strict=True)
                ]
    chart = (
        alt.Chart(width=430, height=200)
        .mark_line(point=True, strokeWidth=1.3)
        .encode(
            x=alt.X("difficulty:Q", title="difficulty"),
            y=alt.Y("gain:Q", title="skill gained"),
            color=alt.Color("start:N", title=None),
            detail="seed:N",
        )
    )
    return draw("How much is learned from how hard a question", "P(right) = sigmoid(skill − difficulty).", rows, chart)
