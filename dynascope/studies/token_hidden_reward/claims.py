"""What `token-hidden-reward` claims, and what is measured of its records to tell."""

import numpy as np

from dynascope.record import Record
from dynascope.studies.harness import Claim, Runs

FIFTH = 3
"""The place of 20 % on the axis `top`."""


def directions(runs: Runs, moved: str) -> list[bool]:
    """Of every mixed prompt: did its right answers gain by the tokens with positive, and lose by those with negative?"""
    record = runs["neutral"]
    if f"mechanism/{moved}_plus" not in record:
        return []
    up, down = (record[f"mechanism/{moved}_{sign}"].values[0] for sign in ("plus", "minus"))
    return [*(up > 0).tolist(), *(down < 0).tolist()]


def last_entropy(record: Record) -> float:
    """Mean over the last ten steps, in nats."""
    return float(np.mean(record["policy/entropy"].values[-10:]))


def last(record: Record, name: str) -> float:
    """The last value; of an axis, its last place."""
    return float(np.ravel(record[name].values[-1])[-1])


CLAIMS = [
    Claim(
        id="C1-head",
        statement="A step on tokens with positive hidden reward makes right answers likelier, and on negative ones rarer.",
        source="Section 3 (definition; the unembedding moves alone)",
        paper_value=None,
        quantity="mixed prompts and signs in which a step of the unembedding goes the way it is told to",
        measure=lambda runs: directions(runs, "head"),
        op=">=",
        threshold=0.95,
        statistic="share",
    ),
    Claim(
        id="C1-all",
        statement="The same when all weights move.",
        source="Section 3",
        paper_value=None,
        quantity="mixed prompts and signs in which a step of all weights goes the way it is told to",
        measure=lambda runs: directions(runs, "all"),
        op=">=",
        threshold=0.80,
        statistic="share",
    ),
    Claim(
        id="C2",
        statement="A small part of the tokens carries the training.",
        source="Abstract",
        paper_value=None,
        quantity="share of all |THR| that the top fifth of tokens holds, at the start",
        measure=lambda runs: float(runs["neutral"]["thr/concentration"].values[0, FIFTH]),
        op=">=",
        threshold=0.60,
    ),
    Claim(
        id="C3-explore",
        statement="A negative p keeps more entropy than none.",
        source="Section 4",
        paper_value=None,
        quantity="entropy(p < 0) - entropy(p = 0), last ten steps (nats)",
        measure=lambda runs: last_entropy(runs["explore"]) - last_entropy(runs["neutral"]),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C3-exploit",
        statement="A positive p keeps less.",
        source="Section 4",
        paper_value=None,
        quantity="entropy(p = 0) - entropy(p > 0), last ten steps (nats)",
        measure=lambda runs: last_entropy(runs["neutral"]) - last_entropy(runs["exploit"]),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C4-greedy",
        statement="A positive p answers better than a negative one when the likeliest token is taken.",
        source="Abstract",
        paper_value="up to 4 points at pass@1 (7B)",
        quantity="greedy share of right answers, p > 0 less p < 0 (points)",
        measure=lambda runs: 100 * (last(runs["exploit"], "greedy/correct") - last(runs["explore"], "greedy/correct")),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C4-pass-at-16",
        statement="A negative p answers better than a positive one when sixteen tries count.",
        source="Abstract",
        paper_value=None,
        quantity="pass@16, p < 0 less p > 0 (points)",
        measure=lambda runs: 100 * (last(runs["explore"], "test/pass_at_k") - last(runs["exploit"], "test/pass_at_k")),
        op=">",
        threshold=0.0,
    ),
]
