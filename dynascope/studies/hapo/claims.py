"""What `hapo` claims, and what is measured of its records to tell."""

from functools import partial

import numpy as np

from dynascope.record import Record
from dynascope.studies.harness import Claim, Runs
from dynascope.studies.harness.measures import last_mean

LAST = 2
"""Tests, which is those of the last 20 rollouts."""
PARTS = {
    "temperature": ("Hotter sampling of uncertain tokens", "48.85 % against 46.97 %"),
    "token-average": ("Comparison of rewards by tokens", "48.56 % against 46.97 %"),
    "redistribution": ("Redistribution of advantages by entropy", "48.28 % against 46.97 %"),
    "clip": ("A clip that follows entropy", "48.02 % against 46.97 %"),
}
AVERAGED = ("token-average", "hapo")


def entropy(record: Record) -> float:
    """Mean entropy of a token on the same problems for all arms, at the last tests, in nats."""
    return last_mean(record, "test/entropy", LAST)


def right(record: Record) -> float:
    """Pass@1 at the end."""
    return float(record["test/correct"].values[-1])


def lead(runs: Runs, arm: str) -> float:
    """Pass@1 over DAPO's."""
    return right(runs[arm]) - right(runs["dapo"])


def furthest(runs: Runs, name: str, target: float) -> float:
    """The largest distance from `target` over rollouts of both arms that compare by tokens."""
    return max(float(np.nanmax(np.abs(runs[arm][name].values - target))) for arm in AVERAGED)


def off_lengths(record: Record) -> float:
    """|weight ratio / length ratio − 1| of wrong to right, mean over rollouts."""
    weights, lengths = (record[f"weight/{name}wrong_over_right"].values for name in ("", "length_"))
    return float(np.nanmean(np.abs(weights / lengths - 1)))


def moved(record: Record) -> float:
    """Share of tokens outside the neutral zone, mean over rollouts."""
    return float(record["policy/redistribution/moved"].values.mean())


def clipped(record: Record) -> float:
    """Share of tokens whose gradient the clip took, mean over rollouts."""
    return float((record["policy/clip/low"].values + record["policy/clip/high"].values).mean())


CLAIMS = [
    Claim(
        id="C1-sum",
        statement="Compared by tokens, the advantages of a rollout's tokens cancel.",
        source="Section 3.2, equation 9; not where the released guard acts, which the equation has not",
        paper_value=0.0,
        quantity="largest |mean advantage of a token| of a rollout of token-average or hapo",
        measure=lambda runs: furthest(runs, "weight/token_mean", 0.0),
        op="<",
        threshold=1e-3,
    ),
    Claim(
        id="C1-ratio",
        statement="So wrong answers weigh as much as right ones.",
        source="Section 3.2; not where the released guard acts",
        paper_value=1.0,
        quantity="largest |weight of wrong over right tokens - 1| of a rollout of token-average or hapo",
        measure=lambda runs: furthest(runs, "weight/wrong_over_right", 1.0),
        op="<",
        threshold=1e-3,
    ),
    Claim(
        id="C1-dapo",
        statement="In DAPO wrong answers weigh as much more than right ones as they are longer.",
        source="Section 3.2; a weight that did not follow lengths would be off by their difference",
        paper_value=0.0,
        quantity="|weight of wrong over right tokens / their lengths within prompts - 1|, mean over rollouts, dapo",
        measure=lambda runs: off_lengths(runs["dapo"]),
        op="<",
        threshold=0.01,
    ),
    Claim(
        id="C2-entropy",
        statement="All parts together keep as much entropy as DAPO, or more.",
        source="Section 5, entropy over training",
        paper_value=None,
        quantity="entropy of hapo less that of dapo on the same problems, tests of the last 20 rollouts (nats)",
        measure=lambda runs: entropy(runs["hapo"]) - entropy(runs["dapo"]),
        op=">=",
        threshold=0.0,
    ),
    Claim(
        id="C3-pass-at-1",
        statement="They answer as well as DAPO, or better.",
        source="Table 1",
        paper_value="50.04 % against 46.97 % on six sets of mathematics",
        quantity="Pass@1 of hapo less that of dapo",
        measure=lambda runs: lead(runs, "hapo"),
        op=">=",
        threshold=-0.01,
    ),
    *(
        Claim(
            id=f"C4-{arm}",
            statement=f"{what} alone answers as well as DAPO, or better.",
            source="Table 4, ablation",
            paper_value=value,
            quantity=f"Pass@1 of {arm} less that of dapo",
            measure=partial(lead, arm=arm),
            op=">=",
            threshold=-0.01,
        )
        for arm, (what, value) in PARTS.items()
    ),
    Claim(
        id="C5-moved",
        statement="Ratios leave the neutral zone, so that redistribution has something to act on.",
        source="Section 3.3; the share is ours",
        paper_value=None,
        quantity="share of tokens outside the neutral zone, the smaller of redistribution and hapo",
        measure=lambda runs: min(moved(runs[arm]) for arm in ("redistribution", "hapo")),
        op=">=",
        threshold=0.02,
    ),
    Claim(
        id="C5-clipped",
        statement="Ratios reach the bounds that adaptive clipping moves.",
        source="Section 3.4; the share is ours",
        paper_value=None,
        quantity="share of tokens whose gradient the constant clip takes, dapo",
        measure=lambda runs: clipped(runs["dapo"]),
        op=">=",
        threshold=0.01,
    ),
]
