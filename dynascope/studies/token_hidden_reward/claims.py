"""What `token-hidden-reward` claims, and what is measured of its records to tell."""

from collections.abc import Callable

import numpy as np

from dynascope.record import Record
from dynascope.studies.harness import Claim, Runs
from dynascope.studies.token_hidden_reward.method import ARMS

FIFTH = 3
"""The place of 20 % on the axis `top`."""
SWEEP = ("explore-0.5", "explore", "explore-0.1", "neutral", "exploit-0.1", "exploit", "exploit-0.5")
RIVALS = ("pass-at-k", "kl-cov")


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


def slope(runs: Runs, measure: Callable[[Record], float]) -> float:
    """Of what is measured of the arms that differ in p alone, by least squares."""
    tilted = {arm: ARMS[arm].p for arm in SWEEP}
    return float(np.polyfit(list(tilted.values()), [measure(runs[arm]) for arm in tilted], 1)[0])


def displaced(record: Record) -> float:
    """Mean over the looks, in nats."""
    return float(np.nanmean(record["thr/displacement"].values))


def points(runs: Runs, arm: str, other: str, name: str) -> float:
    """By how many points one arm ends above another."""
    return 100 * (last(runs[arm], name) - last(runs[other], name))


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
        id="C3-sweep",
        statement="The larger p is, the less entropy is left.",
        source="Section 4",
        paper_value=None,
        quantity="slope of the entropy of the last ten steps in p, from -0.5 to 0.5 (nats)",
        measure=lambda runs: slope(runs, last_entropy),
        op="<",
        threshold=0.0,
    ),
    Claim(
        id="C4-greedy",
        statement="A positive p answers better than GRPO when the likeliest token is taken.",
        source="Abstract",
        paper_value="up to 4 points at pass@1 (7B)",
        quantity="greedy share of right answers, p > 0 less p = 0 (points)",
        measure=lambda runs: points(runs, "exploit", "neutral", "greedy/correct"),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C4-pass-at-16",
        statement="A negative p answers better than GRPO when sixteen tries count.",
        source="Abstract",
        paper_value=None,
        quantity="pass@16, p < 0 less p = 0 (points)",
        measure=lambda runs: points(runs, "explore", "neutral", "test/pass_at_k"),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C5-dominant",
        statement="Training on dominant tokens alone is comparable to GRPO.",
        source="Section 4",
        paper_value="comparable",
        quantity="greedy share of right answers, dominant tokens less all (points)",
        measure=lambda runs: points(runs, "dominant", "neutral", "greedy/correct"),
        op=">=",
        threshold=-4.0,
    ),
    Claim(
        id="C6-rivals",
        statement="When sixteen tries count, a negative p answers better than other ways to explore.",
        source="Section 4",
        paper_value=None,
        quantity="pass@16, p < 0 less the mean of Pass@k mixed and KL-Cov (points)",
        measure=lambda runs: float(np.mean([points(runs, "explore", one, "test/pass_at_k") for one in RIVALS])),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C7-gspo-greedy",
        statement="A positive p helps the likeliest answer of GSPO too.",
        source="Abstract",
        paper_value=None,
        quantity="greedy share of right answers on GSPO, p > 0 less p = 0 (points)",
        measure=lambda runs: points(runs, "gspo-exploit", "gspo", "greedy/correct"),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C7-gspo-pass-at-16",
        statement="A negative p helps sixteen tries of GSPO too.",
        source="Abstract",
        paper_value=None,
        quantity="pass@16 on GSPO, p < 0 less p = 0 (points)",
        measure=lambda runs: points(runs, "gspo-explore", "gspo", "test/pass_at_k"),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C8-displacement",
        statement="Training with a positive p raises the likelihood of right answers more than with a negative one.",
        source="Section 3",
        paper_value=None,
        quantity="mean change of the log-probability of right answers in a step, p > 0 less p < 0 (nats)",
        measure=lambda runs: displaced(runs["exploit"]) - displaced(runs["explore"]),
        op=">",
        threshold=0.0,
    ),
]
