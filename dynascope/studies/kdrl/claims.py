"""What `kdrl` claims, and what is measured of its records to tell."""

from functools import partial

from dynascope.studies.harness import Claim, Runs


def right(runs: Runs, arm: str, place: int = -1) -> float:
    """Share of right answers on the tests, at the end by default."""
    return float(runs[arm]["test/correct"].values[place])


def gained(runs: Runs, arm: str) -> float:
    """Share of right answers at the end, less at the start."""
    return right(runs, arm) - right(runs, arm, 0)


def lead(runs: Runs, arm: str, *others: str) -> float:
    """Over the best of the others."""
    return right(runs, arm) - max(right(runs, other) for other in others)


def lead_of(runs: Runs, arm: str) -> float:
    """Of an arm over KDRL."""
    return lead(runs, arm, "kdrl")


def length(runs: Runs, arm: str) -> float:
    """Mean tokens of an answer at the end."""
    return float(runs[arm]["test/length"].values[-1])


CLAIMS = [
    Claim(
        id="C1-k1",
        statement="Minimising log π − log π_teacher itself teaches nothing.",
        source="Section 3.1 (estimators); the expected gradient is 0",
        paper_value=None,
        quantity="pass@1 gained by k1 as a loss, without rewards",
        measure=lambda runs: gained(runs, "kd-k1"),
        op="<=",
        threshold=0.03,
    ),
    Claim(
        id="C1-k2",
        statement="Minimising its square does: the gradient is that of the reverse divergence.",
        source="Section 3.1, equation 8",
        paper_value=None,
        quantity="pass@1 gained by k2 as a loss, without rewards",
        measure=lambda runs: gained(runs, "kd-k2"),
        op=">=",
        threshold=0.10,
    ),
    Claim(
        id="C2-both",
        statement="Both together are as good as the better of the two alone.",
        source="Table 1",
        paper_value="+1.1 points over KD-RKL, +2.6 over GRPO",
        quantity="pass@1, KDRL less the better of GRPO and KD-RKL",
        measure=lambda runs: lead(runs, "kdrl", "grpo", "kd-k2"),
        op=">=",
        threshold=-0.01,
    ),
    Claim(
        id="C2-grpo",
        statement="Both together are better than rewards alone.",
        source="Table 1",
        paper_value="+2.6 points",
        quantity="pass@1, KDRL less GRPO",
        measure=lambda runs: lead(runs, "kdrl", "grpo"),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C3",
        statement="Much teacher at first and little later is as good as a constant coefficient, or better.",
        source="Section 3.3",
        paper_value=None,
        quantity="pass@1, annealed less constant",
        measure=lambda runs: lead(runs, "kdrl-annealed", "kdrl"),
        op=">=",
        threshold=-0.01,
    ),
    Claim(
        id="C2-sft",
        statement="Both together are better than imitating the teacher's own samples.",
        source="Table 1",
        paper_value="+4.7 points",
        quantity="pass@1, KDRL less SFT",
        measure=lambda runs: lead(runs, "kdrl", "sft"),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C2-length",
        statement="Answers are no longer than those of the teacher's divergence alone.",
        source="Abstract (token efficiency)",
        paper_value="about a fifth shorter, by notes",
        quantity="mean length of answers, KDRL over KD-RKL",
        measure=lambda runs: length(runs, "kdrl") / length(runs, "kd-k2"),
        op="<=",
        threshold=1.0,
    ),
    Claim(
        id="C5-k3",
        statement="k2 is a better estimator to minimise than k3, whose gradient is that of the forward divergence.",
        source="Section 3.1 (estimators)",
        paper_value=None,
        quantity="pass@1, KDRL by k2 less KDRL by k3",
        measure=lambda runs: lead(runs, "kdrl", "kdrl-k3"),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C5-top",
        statement="Summing over the student's likeliest tokens is worse than k2.",
        source="Section 3.1 (top-K is unstable)",
        paper_value=None,
        quantity="pass@1, KDRL by k2 less KDRL by the student's top 4",
        measure=lambda runs: lead(runs, "kdrl", "kdrl-top"),
        op=">",
        threshold=0.0,
    ),
    *(
        Claim(
            id=f"C6-{arm}",
            statement=f"Teaching {whom} alone costs nothing.",
            source="Section 3.4 (reward-guided masking)",
            paper_value=None,
            quantity="pass@1, masked less unmasked",
            measure=partial(lead_of, arm=f"kdrl-{arm}"),
            op=">=",
            threshold=-0.01,
        )
        for arm, whom in (("response", "wrong answers"), ("group", "prompts that no answer solved"))
    ),
    Claim(
        id="C4",
        statement="The weaker the start, the more the teacher adds to rewards.",
        source="Section 1 (exploration)",
        paper_value=None,
        quantity="lead of KDRL over GRPO in pass@1, weak start less usual start",
        measure=lambda runs: lead(runs, "weak-kdrl", "weak-grpo") - lead(runs, "kdrl", "grpo"),
        op=">",
        threshold=0.0,
    ),
]
