"""What `cot-pass-at-k` claims, and what is measured of its records to tell."""

import numpy as np

from dynascope.record import Record
from dynascope.studies.harness import Claim

EARLY = 0.2
"""The share of training within which P(CC|CA) has to rise."""


def final_chance(record: Record) -> np.ndarray:
    """The bandit's chance of right reasoning at the end, a number a run."""
    last: np.ndarray = record["bandit/chain_correct"].values[-1]
    return last


def curve(record: Record, name: str, place: int) -> np.ndarray:
    """Pass@K or CoT-Pass@K over K, at the first (0) or the last (-1) test."""
    values: np.ndarray = record[f"test/{name}"].values[place]
    return values


def gain(record: Record) -> np.ndarray:
    """CoT-Pass@K after training less that before, by K."""
    gained: np.ndarray = curve(record, "cot_pass_at_k", -1) - curve(record, "cot_pass_at_k", 0)
    return gained


def early_rise(record: Record) -> float:
    """P(CC|CA) over the second half of the first fifth of training, less that over its first tenth."""
    values = record["reasoning/chain_correct"].values
    early = max(2, round(EARLY * len(values)))
    return _mean(values[early // 2 : early]) - _mean(values[: max(1, early // 10)])


def change(record: Record, name: str) -> float:
    """From the first value of a series to its last."""
    return float(record[name].values[-1] - record[name].values[0])


def advantage_margin(record: Record) -> float:
    """The lesser of the mean advantage of right chains and of minus that of wrong ones."""
    right, wrong = (_mean(record[f"advantage/{name}_chain"].values) for name in ("right", "wrong"))
    return min(right, -wrong)


def _mean(values: np.ndarray) -> float:
    """Over steps that have a value; NaN where none has."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


CLAIMS = [
    Claim(
        id="T1",
        statement="Where right reasoning pays, its advantages are positive and those of wrong reasoning negative.",
        source="Section 4, Theorem 1",
        paper_value=None,
        quantity="lesser of the mean advantage of right chains and minus that of wrong ones",
        measure=lambda runs: advantage_margin(runs["grpo"]),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="A1",
        statement="A policy paid for answers comes to reason rightly where α > β.",
        source="Section 4, Theorem 1",
        paper_value=None,
        quantity="final chance of right reasoning, the least of the runs, α = 0.9 and β = 0.3",
        measure=lambda runs: final_chance(runs["bandit-prior"]).min(),
        op=">",
        threshold=0.95,
    ),
    Claim(
        id="A2",
        statement="It stays where it was where α = β.",
        source="Section 4, Theorem 1",
        paper_value=None,
        quantity="distance of the final chance from 0.2, the largest of the runs, α = β = 0.6",
        measure=lambda runs: np.abs(final_chance(runs["bandit-equal"]) - 0.2).max(),
        op="<=",
        threshold=0.15,
    ),
    Claim(
        id="A3",
        statement="It unlearns right reasoning where α < β.",
        source="Section 4, limits of the theorem",
        paper_value=None,
        quantity="final chance of right reasoning, the largest of the runs, α = 0.4 and β = 0.7",
        measure=lambda runs: final_chance(runs["bandit-violated"]).max(),
        op="<",
        threshold=0.1,
    ),
    Claim(
        id="B1-pass",
        statement="With many tries the base model finds nearly every answer.",
        source="Section 3",
        paper_value="base models overtake at large K in Pass@K",
        quantity="Pass@64 of the base model",
        measure=lambda runs: curve(runs["grpo"], "pass_at_k", 0)[-1],
        op=">=",
        threshold=0.95,
    ),
    Claim(
        id="B1-gap",
        statement="Much of that is no reasoning.",
        source="Section 3",
        paper_value=None,
        quantity="Pass@64 minus CoT-Pass@64 of the base model",
        measure=lambda runs: curve(runs["grpo"], "pass_at_k", 0)[-1] - curve(runs["grpo"], "cot_pass_at_k", 0)[-1],
        op=">=",
        threshold=0.2,
    ),
    Claim(
        id="B2-all",
        statement="After reinforcement learning CoT-Pass@K is not lower at any K.",
        source="Section 3, AIME 2024 and 2025",
        paper_value="higher at every K up to 1024",
        quantity="gain of CoT-Pass@K, the least over K from 1 to 64",
        measure=lambda runs: gain(runs["grpo"]).min(),
        op=">=",
        threshold=-0.02,
    ),
    Claim(
        id="B2-one",
        statement="At K = 1 it is much higher.",
        source="Section 3",
        paper_value=None,
        quantity="gain of CoT-Pass@1",
        measure=lambda runs: gain(runs["grpo"])[0],
        op=">=",
        threshold=0.2,
    ),
    Claim(
        id="B3",
        statement="The share of right reasoning among right answers rises from early on.",
        source="Section 5, training dynamics",
        paper_value="rises from the first steps",
        quantity="rise of P(CC|CA) within the first fifth of training",
        measure=lambda runs: early_rise(runs["grpo"]),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C1",
        statement="Where a wrong shortcut is paid better than right reasoning, right reasoning is unlearnt.",
        source="Section 4, limits of the theorem",
        paper_value=None,
        quantity="change of the share of right chains, α < β",
        measure=lambda runs: change(runs["shortcut"], "test/chain"),
        op="<",
        threshold=0.0,
    ),
    Claim(
        id="D1",
        statement="What the trained model writes teaches the base model better than what the base model wrote.",
        source="Section 5, quality of the reasoning by supervised fine-tuning",
        paper_value="Pass@1 of the trained model is regained",
        quantity="share of right chains after fine-tuning on the last checkpoint's answers minus on the base model's",
        measure=lambda runs: change(runs["grpo"], "sft/chain"),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="D2",
        statement="It teaches the base model to answer as rightly as the trained model does.",
        source="Section 5, quality of the reasoning by supervised fine-tuning",
        paper_value="Pass@1 of the trained model is regained",
        quantity="share of right answers after fine-tuning on the last checkpoint's answers, less the checkpoint's own",
        measure=lambda runs: float(runs["grpo"]["sft/correct"].values[-1] - runs["grpo"]["test/correct"].values[-1]),
        op=">=",
        threshold=-0.05,
    ),
    Claim(
        id="D3",
        statement="And to reason rightly within as many tries.",
        source="Section 5, quality of the reasoning by supervised fine-tuning",
        paper_value=None,
        quantity="CoT-Pass@K after fine-tuning on the last checkpoint's answers, less on the base model's, the least over K",
        measure=lambda runs: (
            runs["grpo"]["sft/cot_pass_at_k"].values[-1] - runs["grpo"]["sft/cot_pass_at_k"].values[0]
        ).min(),
        op=">=",
        threshold=-0.02,
    ),
]
