"""What `riskpo` claims, and what is measured of its records to tell."""

from dynascope.record import Record
from dynascope.studies.harness import Claim, Runs
from dynascope.studies.harness.measures import last_mean

LAST = 10


def entropy(record: Record) -> float:
    """Mean entropy of a token over the last rollouts, in nats."""
    return last_mean(record, "policy/entropy", LAST)


def pass_at(record: Record, k: int) -> float:
    """Pass@k at the end."""
    return float(record["test/pass_at_k"].sel(k=k).values[-1])


def greedy(record: Record) -> float:
    """Share of right answers of the likeliest tokens, at the end."""
    return float(record["greedy/correct"].values[-1])


def lead(runs: Runs, arm: str, other: str = "grpo-sequence") -> float:
    """Pass@1 over another arm's."""
    return pass_at(runs[arm], 1) - pass_at(runs[other], 1)


def over_rollouts(record: Record, name: str) -> float:
    """Mean of a series."""
    return float(record[name].values.mean())


def miscalibration(record: Record) -> float:
    """How far the share of scores below a tracked quantile is from its level after the first rollouts, the worse of two."""
    shares = {"risk/below_low": 0.2, "risk/below_high": 0.8}
    return max(abs(float(record[name].values[LAST:].mean()) - level) for name, level in shares.items())


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
        statement="It answers better in one try.",
        source="Tables 1 and 2",
        paper_value="46.65 % against 40.41 % on hard mathematics",
        quantity="Pass@1 of riskpo less that of grpo-sequence",
        measure=lambda runs: lead(runs, "riskpo"),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C4-cost",
        statement="At the same learning rate it costs at most 15 points of single answers.",
        source="Tables 1 and 2; the bound, below which the paper would be refuted here, is ours",
        paper_value="46.65 % against 40.41 % on hard mathematics",
        quantity="Pass@1 of riskpo less that of grpo-sequence",
        measure=lambda runs: lead(runs, "riskpo"),
        op=">=",
        threshold=-0.15,
    ),
    Claim(
        id="C4-greedy",
        statement="It answers better where the likeliest token is taken.",
        source="Tables 1 and 2; greedy answers are ours",
        paper_value=None,
        quantity="greedy share of right answers, riskpo less grpo-sequence",
        measure=lambda runs: greedy(runs["riskpo"]) - greedy(runs["grpo-sequence"]),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C5-premise",
        statement="Completions are likelier the further their bundle's score lies beyond either quantile.",
        source="Theorem 2, its premise that log-probabilities are monotone in both tails",
        paper_value=None,
        quantity="covariance of log-probabilities with the excess beyond a tracked quantile, the lower of the two (nats)",
        measure=lambda runs: min(over_rollouts(runs["riskpo"], f"covariance/{end}_tail") for end in ("upper", "lower")),
        op=">=",
        threshold=0.0,
    ),
    Claim(
        id="C5-covariance",
        statement="On the same rollouts its covariance with log-probabilities is below that of the mean.",
        source="Theorem 2, which says it where C5-premise holds",
        paper_value=None,
        quantity="covariance of riskpo's advantage less that of the mean's, over completions (nats)",
        measure=lambda runs: (
            over_rollouts(runs["riskpo"], "covariance/risk") - over_rollouts(runs["riskpo"], "covariance/mean")
        ),
        op="<=",
        threshold=0.0,
    ),
    Claim(
        id="C6-tracker",
        statement="Tracked quantiles follow the policy's own distribution while it learns.",
        source="Section 3.3",
        paper_value=None,
        quantity="|share of scores below a tracked quantile - its level|, the larger of the two",
        measure=lambda runs: miscalibration(runs["riskpo"]),
        op="<=",
        threshold=0.05,
    ),
    Claim(
        id="C7-bundles",
        statement="Bundles of questions answer better than questions by themselves.",
        source="Section 5.3, ablation of the size of bundles",
        paper_value="68.25 % with five against 65.80 % with one on easy mathematics",
        quantity="Pass@1 of riskpo less that of riskpo-single",
        measure=lambda runs: lead(runs, "riskpo", "riskpo-single"),
        op=">",
        threshold=0.0,
    ),
]
