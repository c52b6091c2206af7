"""Figures of `hapo`: entropy and answers, by parts and against rivals, what the guard breaks, and where the clip acts."""

from collections.abc import Mapping, Sequence

import altair as alt
import numpy as np

from dynascope.report import Chart, draw
from dynascope.studies.hapo.claims import entropy, right
from dynascope.studies.harness import Runs
from dynascope.studies.harness.curves import mean_lines

ARMS = {
    "dapo": "DAPO",
    "temperature": "A: temperature",
    "token-average": "B: token average",
    "redistribution": "C: redistribution",
    "clip": "D: clip",
    "hapo": "all (HAPO)",
}
RIVALS = {
    "dapo": ARMS["dapo"],
    "two-parts": "A + B",
    "three-parts": "A + B + C",
    "hapo": ARMS["hapo"],
    "forking-tokens": "forking tokens",
    "archer": "Archer",
    "entropy-advantage": "entropy in the advantage",
    "edge-grpo": "EDGE-GRPO",
}
AVERAGED = {"token-average": ARMS["token-average"], "token-average-unguarded": "B, no guard", "hapo": ARMS["hapo"]}


def figures(runs: Sequence[Runs]) -> list[Chart]:
    """Entropy and answers part by part, part after part and against rivals, the guard, and the clip."""
    drawn = [entropies(runs), answers(runs), rivals(runs), guard(runs), clips(runs)]
    return [chart for chart in drawn if chart.data["rows"]]  # a short run may have found nothing to learn from


def entropies(runs: Sequence[Runs]) -> Chart:
    """Entropy of a token on the same problems, by parts."""
    title = "What each part leaves of the entropy"
    return mean_lines(runs, ARMS, "test/entropy", title=title, y="entropy of a token (nats)", points=True)


def answers(runs: Sequence[Runs]) -> Chart:
    """Pass@1 over training, by parts."""
    title = "What each part answers"
    return mean_lines(runs, ARMS, "test/correct", title=title, y="share of right answers", points=True)


def rivals(runs: Sequence[Runs]) -> Chart:
    """Entropy at the last tests against Pass@1 at the end."""
    rows = [
        {"entropy": entropy(records[arm]), "right": right(records[arm]), "what": shown}
        for records in runs
        for arm, shown in RIVALS.items()
        if arm in records
    ]
    chart = marks(
        RIVALS,
        x=alt.X("entropy:Q", title="entropy of a token (nats)", scale=alt.Scale(zero=False)),
        y=alt.Y("right:Q", title="share of right answers", scale=alt.Scale(zero=False)),
    )
    return draw("Part after part, and rivals", "At the end; one mark a seed.", rows, chart)


def marks(arms: Mapping[str, str], *, x: alt.X, y: alt.Y) -> alt.Chart:
    """A mark a row, told apart by colour and shape, which share a legend as their scales have the same domain."""
    scale = alt.Scale(domain=list(arms.values()))
    told = {
        "color": alt.Color("what:N", title=None, scale=scale),
        "shape": alt.Shape("what:N", title=None, scale=scale),
    }
    return alt.Chart(width=430, height=240).mark_point(size=40).encode(x=x, y=y, **told)


def guard(runs: Sequence[Runs]) -> Chart:
    """How far a rollout's advantages are from cancelling, against the share of tokens that the guard took."""
    rows = [
        {"guarded": 100 * float(share), "mean": abs(float(mean)), "what": shown}
        for records in runs
        for arm, shown in AVERAGED.items()
        if arm in records and "advantage/guarded" in records[arm]
        for share, mean in zip(
            records[arm]["advantage/guarded"].values, records[arm]["weight/token_mean"].values, strict=True
        )
    ]
    chart = marks(
        AVERAGED,
        x=alt.X("guarded:Q", title="tokens in groups that the guard compares by completions (%)"),
        y=alt.Y("mean:Q", title="|mean advantage of a token|"),
    )
    return draw("Only the guard keeps advantages from cancelling", "One mark a rollout, all seeds.", rows, chart)


def clips(runs: Sequence[Runs]) -> Chart:
    """Shares of clipped tokens by decile of entropy, with and without bounds that follow it."""
    sides = {"clip_by_entropy/low": "falls, clipped", "clip_by_entropy/high": "rises, clipped"}
    rows = [
        {"decile": int(decile), "share": float(value), "what": shown, "side": side}
        for arm, shown in ARMS.items()
        if arm in ("dapo", "clip", "hapo")
        for name, side in sides.items()
        for decile, value in zip(
            runs[0][arm][name].decile.values,
            np.nanmean([records[arm][name].values.mean(0) for records in runs if arm in records], axis=0),
            strict=True,
        )
    ]
    chart = (
        alt.Chart(width=210, height=220)
        .mark_line(point=True, strokeWidth=1.6)
        .encode(
            x=alt.X("decile:O", title="decile of entropy, from certain to uncertain", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("share:Q", title="share of tokens"),
            color=alt.Color("what:N", title=None, sort=list(ARMS.values())),
            column=alt.Column("side:N", title=None),
        )
    )
    told = "After the optimizer steps on a rollout; mean over tests and seeds."
    return draw("Which tokens the clip holds", told, rows, chart)
