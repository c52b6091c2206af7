"""What `r1-reward` claims, and what is measured of its records to tell."""

import numpy as np

from dynascope.record import Record
from dynascope.rl.advantage_filter import TOLERANCE
from dynascope.studies.harness import Claim


def broke(record: Record) -> bool:
    """Whether a loss or a gradient was not finite at some step."""
    return bool((record["finite"].values < 1).any())


def largest(record: Record) -> float:
    """The largest |normalized advantage| in use."""
    return float(np.nanmax(record["advantage/used_max_abs"].values))


def beyond(record: Record, bound: float) -> float:
    """Share of rollouts whose largest |normalized advantage| in use exceeds a bound."""
    return float((record["advantage/used_max_abs"].values > bound).mean())


def high_norm(record: Record) -> float:
    """The 99th percentile of gradient norms."""
    return float(np.nanquantile(record["gradient_norm"].values, 0.99))


def final(record: Record, name: str) -> float:
    """What the judge can do at the end; NaN where training broke."""
    values = record[f"judge/{name}"].values
    return float(values[-1]) if len(values) > 1 else float("nan")


CLAIMS = [
    Claim(
        id="C1-broken",
        statement="A log-ratio of 120 breaks REINFORCE++.",
        source="Section 3, Pre-CLIP",
        paper_value="instability of the loss",
        quantity="seeds with a loss or gradient that is not finite",
        measure=lambda runs: float(broke(runs["drift"])),
        op=">=",
        threshold=0.8,
    ),
    Claim(
        id="C1-held",
        statement="With Pre-CLIP it breaks nothing.",
        source="Section 3, Pre-CLIP",
        paper_value=None,
        quantity="seeds with a loss or gradient that is not finite",
        measure=lambda runs: float(broke(runs["drift-pre-clip"])),
        op="<=",
        threshold=0.0,
    ),
    Claim(
        id="C2-outliers",
        statement="Where nearly all rewards are equal, a few advantages are huge.",
        source="Section 3, Advantage Filter",
        paper_value=None,
        quantity="largest |normalized advantage| without the filter",
        measure=lambda runs: largest(runs["easy"]),
        op=">",
        threshold=5.0,
    ),
    Claim(
        id="C2-filtered",
        statement="With the filter none is beyond three.",
        source="Section 3, Advantage Filter",
        paper_value=None,
        quantity="share of rollouts with a |normalized advantage| above 3 (and a rounding error) with the filter",
        measure=lambda runs: beyond(runs["easy-filter"], 3 + TOLERANCE),
        op="<=",
        threshold=0.0,
    ),
    Claim(
        id="C2-norm",
        statement="And gradients are shorter.",
        source="Section 3, Advantage Filter",
        paper_value=None,
        quantity="99th percentile of gradient norms with the filter over that without",
        measure=lambda runs: high_norm(runs["easy-filter"]) / high_norm(runs["easy"]),
        op="<",
        threshold=1.0,
    ),
    Claim(
        id="C3-consistent",
        statement="Paying for consistency makes right answers follow from the reasoning more often.",
        source="Section 3, Consistency Reward",
        paper_value=None,
        quantity="share of right answers whose thought says the same, with the reward minus without",
        measure=lambda runs: final(runs["consistency"], "consistent") - final(runs["both"], "consistent"),
        op=">=",
        threshold=0.05,
    ),
    Claim(
        id="C3-accuracy",
        statement="At little cost in accuracy.",
        source="Section 3, Consistency Reward",
        paper_value=None,
        quantity="accuracy with the consistency reward minus without",
        measure=lambda runs: final(runs["consistency"], "accuracy") - final(runs["both"], "accuracy"),
        op=">=",
        threshold=-0.02,
    ),
    Claim(
        id="C4",
        statement="Pre-CLIP and filter cost no accuracy.",
        source="Section 5, ablations",
        paper_value=None,
        quantity="accuracy of both minus that of REINFORCE++",
        measure=lambda runs: final(runs["both"], "accuracy") - final(runs["reinforce_pp"], "accuracy"),
        op=">=",
        threshold=-0.01,
    ),
    Claim(
        id="C5",
        statement="A vote of five judgements is at least as good as one.",
        source="Section 5, test-time voting",
        paper_value="from about 71 to about 85 %",
        quantity="accuracy of the majority of 5 minus that of single judgements",
        measure=lambda runs: final(runs["consistency"], "vote") - final(runs["consistency"], "accuracy"),
        op=">=",
        threshold=0.0,
    ),
    Claim(
        id="C5-more",
        statement="A vote of fifteen is at least as good as one of five.",
        source="Section 5, test-time voting",
        paper_value=None,
        quantity="accuracy of the majority of 15 minus that of the majority of 5",
        measure=lambda runs: final(runs["consistency"], "vote_more") - final(runs["consistency"], "vote"),
        op=">=",
        threshold=0.0,
    ),
    Claim(
        id="C6-format",
        statement="Training does not unlearn the format.",
        source="Section 3, format reward",
        paper_value=None,
        quantity="share of completions in the format at the end",
        measure=lambda runs: final(runs["both"], "format"),
        op=">=",
        threshold=0.99,
    ),
    Claim(
        id="C6-cold",
        statement="Without supervised learning before, reinforcement comes to less.",
        source="Section 5, ablations (no cold start)",
        paper_value=None,
        quantity="accuracy with a cold start minus without",
        measure=lambda runs: final(runs["both"], "accuracy") - final(runs["cold"], "accuracy"),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C6-hard",
        statement="Reinforcement needs only the pairs that are not judged rightly at the first attempt.",
        source="Section 4, progressive difficulty",
        paper_value=None,
        quantity="accuracy of training on hard pairs alone minus that on all",
        measure=lambda runs: final(runs["hard"], "accuracy") - final(runs["both"], "accuracy"),
        op=">=",
        threshold=-0.01,
    ),
]
