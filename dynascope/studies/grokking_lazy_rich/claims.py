"""What `grokking-lazy-rich` claims, and what is measured of its records to tell."""

import math

import numpy as np

from dynascope.record import Record
from dynascope.studies.grokking_lazy_rich.method import ALPHAS, FITTED, LEARNT
from dynascope.studies.harness import Claim, Runs


def first_below(record: Record, name: str, level: float) -> float:
    """The first step with a loss below a level; the last step where it never gets there."""
    loss = record[name]
    below = np.flatnonzero(loss.values < level)
    return float(loss.step[below[0]] if below.size else loss.step[-1])


def times(record: Record) -> tuple[float, float]:
    """Steps until the training set is fitted, and until the task is learnt."""
    return first_below(record, "train/loss", FITTED), first_below(record, "test/loss", LEARNT)


def gap(record: Record) -> float:
    """Steps between the two."""
    fitted, learnt = times(record)
    return learnt - fitted


def longer_gap(runs: Runs, lazier: str, richer: str) -> float:
    """Steps by which the lazier arm's gap is longer, at least; NaN where even the richer arm never learns the task.

    A gap that is still open at the end says only how long it is at least: enough against one that closed.
    """
    if not (runs[richer]["test/loss"].values < LEARNT).any():
        return math.nan
    return gap(runs[lazier]) - gap(runs[richer])


def delay(record: Record) -> float:
    """Their ratio."""
    fitted, learnt = times(record)
    return learnt / max(fitted, 1.0)


def at(alpha: float) -> str:
    """The name of an arm that differs in its α."""
    return f"alpha-{alpha:g}"


def growth_of_alignment(record: Record) -> float:
    """log of the kernel's alignment with the labels at the end over that at the start."""
    alignment = record["kernel/alignment"].values
    return float(np.log(alignment[-1] / alignment[0]))


def least_drop_in_growth(runs: Runs) -> float:
    """By how much alignment grows less at each α than at the one below it, the smallest of three."""
    growth = [growth_of_alignment(runs[at(alpha)]) for alpha in ALPHAS]
    return float(np.min(-np.diff(growth)))


def mean_field_error(runs: Runs) -> float:
    """Largest relative difference of the theory's test loss from the simulated one after the first step."""
    record = runs["mean-field"]
    predicted, simulated = (record[name].values[1:] for name in ("mean_field/test", "simulated/test"))
    return float(np.max(np.abs(predicted / simulated - 1)))


CLAIMS = [
    Claim(
        id="C1-gap",
        statement="A lazier network generalizes later after it has fitted the training set.",
        source="Section 3.1, Figure 2",
        paper_value=None,
        quantity="gap in steps at alpha 1 over that at alpha 0.25",
        measure=lambda runs: gap(runs[at(1.0)]) / max(gap(runs[at(0.25)]), 1.0),
        op=">=",
        threshold=3.0,
    ),
    Claim(
        id="C1-lazy",
        statement="The laziest network ends where regression with its first kernel does.",
        source="Section 3.1, Figure 2",
        paper_value=None,
        quantity="|final test loss at alpha 16 over the kernel's - 1|",
        measure=lambda runs: abs(float(runs[at(16.0)]["test/loss"][-1]) / float(runs[at(16.0)]["lazy/plateau"][0]) - 1),
        op="<=",
        threshold=0.4,
    ),
    Claim(
        id="C2-many",
        statement="With many examples there is no delay.",
        source="Section 3.2",
        paper_value=None,
        quantity="steps until learnt over steps until fitted, 800 examples",
        measure=lambda runs: delay(runs["many-examples"]),
        op="<",
        threshold=1.5,
    ),
    Claim(
        id="C2-middle",
        statement="Between what features and what a kernel need, generalization is delayed.",
        source="Section 3.2",
        paper_value=None,
        quantity="steps until learnt over steps until fitted, 200 examples",
        measure=lambda runs: delay(runs[at(1.0)]),
        op=">",
        threshold=3.0,
    ),
    Claim(
        id="C2-few",
        statement="With few examples it never comes.",
        source="Section 3.2",
        paper_value=None,
        quantity="lowest test loss, 60 examples",
        measure=lambda runs: float(runs["few-examples"]["test/loss"].min()),
        op=">",
        threshold=0.5,
    ),
    Claim(
        id="C3-linear",
        statement="While the training set is fitted, power goes into linear functions.",
        source="Section 3.3, Figure 3",
        paper_value=None,
        quantity="rise of the linear part of the test loss",
        measure=lambda runs: float(runs[at(1.0)]["test/linear"].max() - runs[at(1.0)]["test/linear"][0]),
        op=">",
        threshold=0.05,
    ),
    Claim(
        id="C3-align",
        statement="Later the weights align with the teacher.",
        source="Section 3.3, Figure 3",
        paper_value=None,
        quantity="misalignment at the end over that at the start",
        measure=lambda runs: float(runs[at(1.0)]["test/misalignment"][-1] / runs[at(1.0)]["test/misalignment"][0]),
        op="<",
        threshold=0.3,
    ),
    Claim(
        id="C4",
        statement="The lazier, the less the kernel aligns with the labels during training.",
        source="Section 3.4, Figure 4",
        paper_value=None,
        quantity="least drop of log growth of alignment from one alpha to the next",
        measure=least_drop_in_growth,
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C5-end",
        statement="Worse first features give the better end, when features must be learnt.",
        source="Section 3.2, Figure 3",
        paper_value=None,
        quantity="final test loss at eps 0.05 over that at eps 1",
        measure=lambda runs: float(runs["eps-0.05"]["test/loss"][-1] / runs["eps-1"]["test/loss"][-1]),
        op="<",
        threshold=0.5,
    ),
    Claim(
        id="C5-delay",
        statement="Worse first features mean a longer delay, at one alpha.",
        source="Section 3.2, Figure 3",
        paper_value=None,
        quantity="delay at eps 0.05 over that at eps 0.25",
        measure=lambda runs: delay(runs["eps-0.05"]) / delay(runs[at(1.0)]),
        op=">",
        threshold=1.0,
    ),
    Claim(
        id="C5-delay-fixed",
        statement="Worse first features mean a longer delay, at one alpha times eps.",
        source="Section 3.2, Figure 3",
        paper_value=None,
        quantity="delay at eps 0.05 over that at eps 1",
        measure=lambda runs: delay(runs["eps-0.05-alpha-5"]) / delay(runs["eps-1-alpha-0.25"]),
        op=">",
        threshold=1.0,
    ),
    Claim(
        id="C6",
        statement="Mean-field theory gives the test loss of a committee in 600 dimensions.",
        source="Appendix (dynamical mean-field theory)",
        paper_value=None,
        quantity="largest relative error over steps",
        measure=mean_field_error,
        op="<",
        threshold=0.02,
    ),
    Claim(
        id="C7-digits",
        statement="On real digits a larger output scale delays generalization.",
        source="Section 5, Figure 5",
        paper_value=None,
        quantity="gap in steps at alpha 2 less that at alpha 0.1",
        measure=lambda runs: longer_gap(runs, f"digits-{at(2.0)}", f"digits-{at(0.1)}"),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C7-modular",
        statement="So it does on modular addition.",
        source="Section 5, Figure 5",
        paper_value=None,
        quantity="gap in steps at alpha 10 less that at alpha 0.3",
        measure=lambda runs: longer_gap(runs, f"modular-{at(10.0)}", f"modular-{at(0.3)}"),
        op=">",
        threshold=0.0,
    ),
]
