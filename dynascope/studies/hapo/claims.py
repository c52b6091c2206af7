"""What `hapo` claims, and what is measured of its records to tell."""

import numpy as np

from dynascope.record import Record
from dynascope.studies.harness import Claim

LAST = 20
PARTS = ("temperature", "token-average", "redistribution", "clip")
AVERAGED = ("token-average", "hapo")


def entropy(record: Record) -> float:
    """Mean entropy of a token over the last rollouts, in nats."""
    return float(record["policy/entropy"].values[-LAST:].mean())


def right(record: Record) -> float:
    """Pass@1 at the end."""
    return float(record["test/correct"].values[-1])


def furthest(record: Record, name: str, target: float) -> float:
    """The largest distance from `target` over rollouts."""
    return float(np.nanmax(np.abs(record[name].values - target)))


CLAIMS = [
    Claim(
        id="C1-sum",
        statement="Compared by tokens, the advantages of a rollout's tokens cancel.",
        source="Section 3.2, equation 9; not where the released guard acts, which the equation has not",
        paper_value=0.0,
        quantity="largest |mean advantage of a token| of a rollout, token-average and hapo",
        measure=lambda runs: [furthest(runs[arm], "weight/token_mean", 0.0) for arm in AVERAGED],
        op="<",
        threshold=1e-3,
    ),
    Claim(
        id="C1-ratio",
        statement="So wrong answers weigh as much as right ones.",
        source="Section 3.2; not where the released guard acts",
        paper_value=1.0,
        quantity="largest |weight of wrong over right tokens - 1| of a rollout, token-average and hapo",
        measure=lambda runs: [furthest(runs[arm], "weight/wrong_over_right", 1.0) for arm in AVERAGED],
        op="<",
        threshold=1e-3,
    ),
    Claim(
        id="C1-dapo",
        statement="In DAPO long wrong answers weigh more than right ones.",
        source="Section 3.2",
        paper_value=None,
        quantity="weight of wrong over right tokens, mean over rollouts, dapo",
        measure=lambda runs: float(np.nanmean(runs["dapo"]["weight/wrong_over_right"].values)),
        op=">",
        threshold=1.0,
    ),
    Claim(
        id="C2-entropy",
        statement="All parts together keep as much entropy as DAPO, or more.",
        source="Section 5, entropy over training",
        paper_value=None,
        quantity="entropy of hapo less that of dapo, last 20 rollouts (nats)",
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
        measure=lambda runs: right(runs["hapo"]) - right(runs["dapo"]),
        op=">=",
        threshold=-0.01,
    ),
    Claim(
        id="C4-parts",
        statement="So does each part alone.",
        source="Table 4, ablation",
        paper_value="48.02 to 48.85 % against 46.97 %",
        quantity="Pass@1 of a part less that of dapo, four parts",
        measure=lambda runs: [right(runs[arm]) - right(runs["dapo"]) for arm in PARTS],
        op=">=",
        threshold=-0.01,
    ),
]
