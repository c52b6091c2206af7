"""What `riskpo` claims, and what is measured of its records to tell."""

import numpy as np

from dynascope.record import Record
from dynascope.studies.harness import Claim

LAST = 10


def entropy(record: Record) -> float:
    """Mean entropy of a token over the last rollouts, in nats."""
    return float(record["policy/entropy"].values[-LAST:].mean())


def pass_at(record: Record, k: int) -> float:
    """Pass@k at the end."""
    return float(record["test/pass_at_k"].sel(k=k).values[-1])


def miscalibration(record: Record) -> list[float]:
    """How far the shares of scores below the tracked quantiles are from the levels, after the first rollouts."""
    shares = {"risk/below_low": 0.2, "risk/below_high": 0.8}
    return [abs(float(record[name].values[LAST:].mean()) - level) for name, level in shares.items()]


CLAIMS = [
    Claim(
        id="C1-entropy",
        statement="The mixed value at risk keeps more entropy than the mean.",
        source="Theorem 2, Figure 2",
        paper_value="entropy stays up where that of GRPO collapses",
        quantity="entropy of riskpo less that of grpo-sequence, last 10 rollouts (nats)",
        measure=lambda runs: entropy(runs["riskpo"]) - entropy(runs["grpo-sequence"]),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C1-entropy-at-unit-size",
        statement="So it does where advantages are scaled to unit size.",
        source="Theorem 2; the scale is ours",
        paper_value=None,
        quantity="entropy of riskpo-unit less that of grpo-sequence, last 10 rollouts (nats)",
        measure=lambda runs: entropy(runs["riskpo-unit"]) - entropy(runs["grpo-sequence"]),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C2-pass-at-8",
        statement="It solves as many problems in eight tries.",
        source="Tables 1 and 2",
        paper_value="Pass@k grows where that of GRPO stands still",
        quantity="Pass@8 of riskpo less that of grpo-sequence",
        measure=lambda runs: pass_at(runs["riskpo"], 8) - pass_at(runs["grpo-sequence"], 8),
        op=">=",
        threshold=-0.02,
    ),
    Claim(
        id="C3-seeking",
        statement="Seeking risk keeps no more entropy than avoiding it.",
        source="Section 5.3, ablation of the risk preference",
        paper_value="entropy collapses quickly",
        quantity="entropy of seeking less that of riskpo, last 10 rollouts (nats)",
        measure=lambda runs: entropy(runs["seeking"]) - entropy(runs["riskpo"]),
        op="<=",
        threshold=0.0,
    ),
    Claim(
        id="C4-pass-at-1",
        statement="It does not cost single answers.",
        source="Tables 1 and 2",
        paper_value="46.65 % against 40.41 % on hard mathematics",
        quantity="Pass@1 of riskpo less that of grpo-sequence",
        measure=lambda runs: pass_at(runs["riskpo"], 1) - pass_at(runs["grpo-sequence"], 1),
        op=">=",
        threshold=-0.15,
    ),
    Claim(
        id="C5-covariance",
        statement="On the same rollouts its covariance with log-probabilities is below that of the mean.",
        source="Theorem 2",
        paper_value=None,
        quantity="covariance of riskpo's advantage less that of the mean's, over completions (nats)",
        measure=lambda runs: float(
            np.mean(runs["riskpo"]["covariance/risk"].values - runs["riskpo"]["covariance/mean"].values)
        ),
        op="<=",
        threshold=0.0,
    ),
    Claim(
        id="C6-tracker",
        statement="Tracked quantiles follow the policy's own distribution while it learns.",
        source="Section 3.3",
        paper_value=None,
        quantity="|share of scores below a tracked quantile - its level|, both quantiles",
        measure=lambda runs: miscalibration(runs["riskpo"]),
        op="<=",
        threshold=0.05,
    ),
]
