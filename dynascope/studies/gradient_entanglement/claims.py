"""What `gradient-entanglement` claims, and what is measured of its records to tell."""

from collections.abc import Sequence

import numpy as np

from dynascope.record import Record
from dynascope.studies.gradient_entanglement.method import SUFFIXES
from dynascope.studies.harness import Claim, Runs

JUDGED = ("dpo-8", "ipo", "simpo", "cpo", "slic")
PROTECTING = ("cpo", "slic", "dpop")


def sign_agreement(record: Record) -> float:
    """Share of updates and sides whose change has the predicted sign."""
    predicted, realised = record["predicted"].values[-1], record["realised"].values[-1]
    return float(np.mean(np.sign(predicted) == np.sign(realised)))


def cosines(runs: Runs) -> list[float]:
    """Mean cosine by length of the suffix."""
    return [float(runs[f"dpo-{suffix}"]["cosine"].values[-1].mean()) for suffix in SUFFIXES]


def gained(record: Record) -> float:
    """Change of the mean log-probability of chosen responses over all pairs."""
    return float(record["log_prob"].values[-1, 0] - record["log_prob"].values[0, 0])


def margins(record: Record) -> np.ndarray:
    """Growth of the mean margin, look by look."""
    values: np.ndarray = record["log_prob"].values
    grown: np.ndarray = (values[:, 0] - values[:, 1]) - (values[0, 0] - values[0, 1])
    return grown


def gained_at(record: Record, margin: float) -> float:
    """Change of the chosen log-probability when the margin had first grown that much, on a straight line between looks."""
    grown, values = margins(record), record["log_prob"].values[:, 0] - record["log_prob"].values[0, 0]
    if margin > grown.max():
        return float("nan")
    place = int(np.argmax(grown >= margin))
    if place == 0:
        return 0.0
    share = (margin - grown[place - 1]) / (grown[place] - grown[place - 1])
    return float(values[place - 1] + share * (values[place] - values[place - 1]))


def kept_over_dpo(runs: Runs, arms: Sequence[str]) -> float:
    """By how much the least of these arms keeps chosen responses above DPO, where all have gained the same margin.

    Learning rates differ from loss to loss, and one that has hardly moved has lowered nothing. NaN where the margin of one
    never grew.
    """
    margin = min(float(margins(runs[arm]).max()) for arm in (*arms, "dpo-8"))
    if margin <= 0:
        return float("nan")
    return min(gained_at(runs[arm], margin) for arm in arms) - gained_at(runs["dpo-8"], margin)


def parted(record: Record) -> float:
    """Share of updates after which the chosen response was not lower and the rejected one not higher."""
    chosen, rejected = record["realised"].values[-1].T
    return float(np.mean((chosen >= 0) & (rejected <= 0)))


def label_and_shared(record: Record) -> tuple[float, float]:
    """Weights of chosen tokens: of the label, and the mean of those that both responses have."""
    weights = record["token_weight"].values[-1]
    return float(weights[0]), float(weights[1:].mean())


CLAIMS = [
    Claim(
        id="C1",
        statement="The signs of both responses' changes follow from inner product, norms and coefficients.",
        source="Section 3, Condition 1",
        paper_value=None,
        quantity="share of signs predicted right, the worst of DPO, IPO, SimPO, CPO, SLiC",
        measure=lambda runs: min(sign_agreement(runs[arm]) for arm in JUDGED),
        op=">=",
        threshold=0.95,
    ),
    Claim(
        id="C2",
        statement="The more tokens two responses share, the more aligned their gradients are.",
        source="Section 4, sentiment task",
        paper_value="negative for one token, positive and larger for longer suffixes",
        quantity="least increase of the mean cosine from one suffix length to the next",
        measure=lambda runs: min(np.diff(cosines(runs))),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C3-long",
        statement="With a long suffix DPO lowers the chosen responses.",
        source="Section 4, sentiment task",
        paper_value="falls",
        quantity="change of the mean chosen log-probability (nats), 8 suffix tokens",
        measure=lambda runs: gained(runs["dpo-8"]),
        op="<",
        threshold=0.0,
    ),
    Claim(
        id="C3-short",
        statement="Without one it does not lower them by more than that.",
        source="Section 4, sentiment task",
        paper_value="rises",
        quantity="change with the label alone minus change with 8 suffix tokens (nats)",
        measure=lambda runs: gained(runs["dpo-0"]) - gained(runs["dpo-8"]),
        op=">=",
        threshold=0.0,
    ),
    Claim(
        id="C4",
        statement="With normalized gradients chosen responses do not fall and rejected ones do not rise.",
        source="Section 5, pairwise normalized gradient",
        paper_value=None,
        quantity="share of updates with both",
        measure=lambda runs: parted(runs["normalized"]),
        op=">=",
        threshold=0.95,
    ),
    Claim(
        id="C5",
        statement="Losses with a term of their own for the chosen response keep it higher than DPO does.",
        source="Section 3, discussion of the losses",
        paper_value=None,
        quantity="gain of the chosen log-probability over DPO's at the same margin (nats), the least of CPO, SLiC, DPOP",
        measure=lambda runs: kept_over_dpo(runs, PROTECTING),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C6",
        statement="A learnt sparse mask of tokens keeps chosen responses higher than DPO does.",
        source="Section 5, sparsity-regularized token masking",
        paper_value=None,
        quantity="gain of the chosen log-probability over DPO's at the same margin (nats)",
        measure=lambda runs: kept_over_dpo(runs, ["sparse"]),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C6-mask",
        statement="Such a mask keeps the tokens in which the responses differ.",
        source="Section 5, sparsity-regularized token masking",
        paper_value=None,
        quantity="weight of the label less the mean weight of shared tokens, at the end",
        measure=lambda runs: float(np.subtract(*label_and_shared(runs["sparse"]))),
        op=">",
        threshold=0.0,
    ),
]
