"""What `mamba-icl-outliers` claims, measures and asks: thresholds were fixed before it was run."""

import numpy as np

from dynascope.studies.harness import Claim, Runs
from dynascope.studies.mamba_icl_outliers.method import ALPHAS, RULES


def error(runs: Runs, arm: str, alpha: float, rule: str = "flip") -> float:
    """Test error, random places."""
    return float(runs[arm][f"error/{rule}"].values[-1, ALPHAS.index(alpha)])


def accuracy(runs: Runs, arm: str) -> np.ndarray:
    """Accuracy by placement: farthest, random, closest."""
    found: np.ndarray = runs[arm]["accuracy/placement"].values[-1]
    return found


def far_less_close(runs: Runs, arm: str) -> float:
    """What is lost when outliers move from the far end to the query."""
    return float(accuracy(runs, arm)[0] - accuracy(runs, arm)[2])


def gate_ratio(runs: Runs, arm: str) -> float:
    """Mean gate of clean examples over that of outliers, after training."""
    clean, outlier = runs[arm]["mamba/gate"].values[-1, 0]
    return float(clean / outlier)


def slope(runs: Runs) -> float:
    """log2 gate by rank among clean examples, one layer."""
    return float(runs["gated"]["mamba/decay_slope"].values[-1, 0])


def steps(runs: Runs, arm: str) -> float:
    """Steps until the hinge loss of a fresh batch was below 0.1."""
    return float(runs[arm]["steps_to_hinge"].values[-1])


def open_claim(rule: str, arm: str) -> Claim:
    """The paper's own figure, out of reach of small budgets with one learning rate for everything."""
    has_two = arm == "gated-two-lrs"
    return Claim(
        id=f"C9-{rule}{'-two-lrs' if has_two else ''}",
        statement=f"Mamba is all but always right at 80 % outliers, label rule {rule}"
        f"{', its gate trained faster than its attention' if has_two else ''}.",
        source="Figure 1",
        paper_value="below 0.01 up to alpha near 0.8",
        quantity="test error at alpha 0.8",
        measure=lambda runs: error(runs, arm, 0.8, rule),
        op="<",
        threshold=0.01,
    )


DEPTHS = {"": "", "-deep": " (three layers)"}


def placement_claim(model: str, depth: str) -> Claim:
    """Where outliers stand is of importance to Mamba, and of none to the linear transformer."""
    if model == "mamba":
        return Claim(
            id=f"C4-mamba{depth}",
            statement=f"Outliers next to the query hurt Mamba more than those far from it{DEPTHS[depth]}.",
            source="Table 1, three layers",
            paper_value="99.73 % far, 82.73 % close",
            quantity="accuracy with outliers far less that with outliers close, alpha 0.5",
            measure=lambda runs: far_less_close(runs, f"gated{depth}"),
            op=">=",
            threshold=0.10,
        )
    return Claim(
        id=f"C4-linear{depth}",
        statement=f"To the linear transformer it is all one where outliers stand{DEPTHS[depth]}.",
        source="Table 1, three layers",
        paper_value="93.68 to 94.12 %",
        quantity="spread of accuracy over placements, alpha 0.5",
        measure=lambda runs: float(np.ptp(accuracy(runs, f"linear{depth}"))),
        op="<",
        threshold=0.03,
    )


CLAIMS = [
    Claim(
        id="C1-mamba",
        statement="Mamba predicts right where 60 % of the examples are poisoned with flipped labels.",
        source="Theorem 1, Figure 1",
        paper_value="below 0.01",
        quantity="test error at alpha 0.6",
        measure=lambda runs: error(runs, "gated", 0.6),
        op="<",
        threshold=0.10,
    ),
    Claim(
        id="C1-linear",
        statement="The linear transformer there predicts worse than a coin.",
        source="Theorem 2, Figure 1",
        paper_value="fails beyond 1/2",
        quantity="test error at alpha 0.6",
        measure=lambda runs: error(runs, "linear", 0.6),
        op=">",
        threshold=0.5,
    ),
    Claim(
        id="C2",
        statement="At 40 % Mamba is all but always right.",
        source="Theorem 1, Figure 1",
        paper_value="below 0.01",
        quantity="test error at alpha 0.4",
        measure=lambda runs: error(runs, "gated", 0.4),
        op="<",
        threshold=0.02,
    ),
    Claim(
        id="C3",
        statement="The gate shuts outliers out.",
        source="Proposition 2, Figure 3",
        paper_value="1/poly(number of patterns) on outliers",
        quantity="mean gate of clean examples over that of outliers",
        measure=lambda runs: gate_ratio(runs, "gated"),
        op=">",
        threshold=4.0,
    ),
    *[placement_claim("mamba", depth) for depth in DEPTHS],
    *[placement_claim("linear", depth) for depth in DEPTHS],
    Claim(
        id="C5",
        statement="The linear transformer learns in fewer steps.",
        source="Theorems 1 and 2",
        paper_value="fewer by the length of the prompt",
        quantity="steps to a hinge loss of 0.1 less those of Mamba",
        measure=lambda runs: steps(runs, "linear") - steps(runs, "gated"),
        op="<",
        threshold=0.0,
    ),
    Claim(
        id="C6-gate",
        statement="A gate that saw no trigger in training does not shut it out.",
        source="Theorem 1 (alpha < p_a l_tr / l_ts)",
        paper_value=None,
        quantity="mean gate of clean examples over that of outliers, trained without outliers",
        measure=lambda runs: gate_ratio(runs, "gated-no-outliers"),
        op="<",
        threshold=4.0,
    ),
    Claim(
        id="C6-error",
        statement="Mamba is then not robust at 40 %.",
        source="Theorem 1 (alpha < p_a l_tr / l_ts)",
        paper_value=None,
        quantity="test error at alpha 0.4, trained without outliers",
        measure=lambda runs: error(runs, "gated-no-outliers", 0.4),
        op=">",
        threshold=0.02,
    ),
    Claim(
        id="C7",
        statement="More outliers in training let Mamba stand more of them in tests.",
        source="Theorem 1 (alpha < p_a l_tr / l_ts)",
        paper_value=None,
        quantity="test error at alpha 0.8, p_a 0.8 less p_a 0.6",
        measure=lambda runs: error(runs, "gated-more-outliers", 0.8) - error(runs, "gated", 0.8),
        op="<",
        threshold=0.0,
    ),
    Claim(
        id="C8-near",
        statement="The gate prefers near examples.",
        source="Proposition 2",
        paper_value=None,
        quantity="log2 gate per clean example away from the query",
        measure=slope,
        op="<",
        threshold=0.0,
    ),
    Claim(
        id="C8-half",
        statement="It falls by no more than a half with each clean example.",
        source="Proposition 2",
        paper_value="-1 or above",
        quantity="log2 gate per clean example away from the query",
        measure=slope,
        op=">=",
        threshold=-1.0,
    ),
    *[open_claim(rule, arm) for arm in ("gated", "gated-two-lrs") for rule in RULES],
    Claim(
        id="C10",
        statement="Training on neighbouring pairs of patterns alone leaves errors on the other pairs.",
        source="Section 3 (training tasks)",
        paper_value=None,
        quantity="test error at alpha 0.2, unseen pairs less seen ones",
        measure=lambda runs: float(
            runs["gated-cyclic"]["error/unseen"].values[-1] - runs["gated-cyclic"]["error/seen"].values[-1]
        ),
        op=">",
        threshold=0.0,
    ),
]
