"""What `relift` claims, and what is measured of its records to tell."""

from functools import partial

import numpy as np

from dynascope.record import Record
from dynascope.rl.tasks.difficulty import STRATA
from dynascope.studies.harness import Claim, Runs


def correct(record: Record) -> float:
    """Share of right answers at the end, over all validation questions."""
    return float(record["validation/correct"].values[-1])


def gain(record: Record, stratum: str) -> float:
    """By how much the accuracy of questions that began in a stratum rose."""
    values = record["difficulty/accuracy"].values[:, STRATA.index(stratum)]
    return float(values[-1] - values[0])


def gain_of_passing(record: Record) -> float:
    """By how much the accuracy of the questions rose that have no demonstration in the arm that lacks them."""
    values = record["validation/passing"].values
    return float(values[-1] - values[0])


def lead(runs: Runs, others: tuple[str, ...]) -> float:
    """By how much ReLIFT's accuracy at the end exceeds that of the best of others."""
    return correct(runs["relift"]) - max(correct(runs[other]) for other in others)


def used(record: Record) -> float:
    """Demonstrations consumed, every use counted."""
    return float(np.max(record["demonstrations/used"].values))


CLAIMS = [
    Claim(
        id="C1-rl",
        statement="Reinforcement learning alone hardly moves the hardest questions.",
        source="Section 2",
        paper_value=None,
        quantity="gain of accuracy of the hardest",
        measure=lambda runs: gain(runs["rl"], "hardest"),
        op="<=",
        threshold=0.05,
    ),
    Claim(
        id="C1-sft",
        statement="Fine-tuning moves them.",
        source="Section 2",
        paper_value=None,
        quantity="gain of accuracy of the hardest",
        measure=lambda runs: gain(runs["sft"], "hardest"),
        op=">=",
        threshold=0.2,
    ),
    Claim(
        id="C1-relift",
        statement="So does ReLIFT.",
        source="Sections 2 and 3",
        paper_value=None,
        quantity="gain of accuracy of the hardest",
        measure=lambda runs: gain(runs["relift"], "hardest"),
        op=">=",
        threshold=0.2,
    ),
    Claim(
        id="C2-best",
        statement="Over all questions ReLIFT is as good as the better of its two halves.",
        source="Table 1",
        paper_value="52.6 against 46.9 (RL) and 49.0 (SFT)",
        quantity="accuracy less that of the better of RL and SFT",
        measure=lambda runs: lead(runs, ("rl", "sft")),
        op=">=",
        threshold=-0.01,
    ),
    Claim(
        id="C2-rl",
        statement="It is clearly better than RL.",
        source="Table 1",
        paper_value="5.7 points",
        quantity="accuracy less that of RL",
        measure=lambda runs: lead(runs, ("rl",)),
        op=">=",
        threshold=0.05,
    ),
    Claim(
        id="C3",
        statement="It needs a fraction of the demonstrations.",
        source="Abstract; Table 1",
        paper_value="13 % (first version), 8K of 46K (second)",
        quantity="demonstrations used over those of fine-tuning",
        measure=lambda runs: used(runs["relift"]) / used(runs["sft"]),
        op="<=",
        threshold=0.35,
    ),
    Claim(
        id="C4",
        statement="It loses no more on easy questions than fine-tuning does.",
        source="Section 2",
        paper_value=None,
        quantity="loss of accuracy of the easy, less that of fine-tuning",
        measure=lambda runs: gain(runs["sft"], "easy") - gain(runs["relift"], "easy"),
        op="<=",
        threshold=0.0,
    ),
    Claim(
        id="C5-control",
        statement="Questions that have no demonstration gain nothing (a control of ours).",
        source="Section 3",
        paper_value=None,
        quantity="gain of accuracy of the questions that lack one",
        measure=lambda runs: gain_of_passing(runs["relift-lacking"]),
        op="<=",
        threshold=0.05,
    ),
    *(
        Claim(
            id=f"C6-{arm}",
            statement=statement,
            source=source,
            paper_value=value,
            quantity=f"accuracy less that of {arm}",
            measure=partial(lead, others=(arm,)),
            op=">",
            threshold=0.0,
        )
        for arm, statement, source, value in (
            ("random", "The hardest questions are the right ones to fine-tune on.", "Ablation", "52.6 against 45.5"),
            ("all", "Fine-tuning after every step of RL is worse.", "Ablation", "52.6 against 23.8"),
            ("uniform", "So is fine-tuning after every eighth.", "Ablation", "52.6 against 49.1"),
            ("rl-and-sft-loss", "So is one loss of both.", "Table 1", "52.6 against 48.6"),
            ("sft-then-rl", "So is one after the other.", "Table 1", "52.6 against 50.7"),
            ("luffy", "So is a demonstration in every group of samples.", "Table 1", "52.6 against 50.9"),
        )
    ),
]
