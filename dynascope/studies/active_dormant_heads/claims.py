"""What active-dormant-heads claims, and how it is measured."""

from typing import Literal

import numpy as np

from dynascope.findings.extreme_tokens import reinforcement
from dynascope.findings.history import log_slope
from dynascope.record import Record
from dynascope.studies.harness import Claim

LATE = 0.25
"""The share of steps that late slopes leave out."""


def last(record: Record, name: str) -> float:
    """A series of the one layer's one head, at the end."""
    return float(record[name].values[-1].squeeze())


def at_sink(record: Record, name: str) -> float:
    """A series at the end, in the layer and head with the strongest sink."""
    scores = record["extreme/sink_score"].values[-1]
    return float(record[name].values[-1][np.unravel_index(scores.argmax(), scores.shape)])


def peak_growth(record: Record) -> float:
    """Ratio of the residual norm at <s> to the others' after the middle block, at the end over a third of the way."""
    peaks = record["extreme/peak_mean"]
    third = int(peaks.step[-1]) // 3
    middle = peaks.sizes["block"] // 2
    return float(peaks.values[-1, middle] / peaks.sel(step=third).values[middle])


def reinforced(record: Record) -> float:
    """Spearman's rank correlation of sink score and minus the value drain over checkpoints."""
    return reinforcement(record["extreme/sink_score"].values[:, 0, 0], record["extreme/value_drain"].values[:, 0, 0])


def late_slope(record: Record, name: str) -> float:
    """Slope of the one head's series against the log of the step over the last three quarters of the steps."""
    series = record[name]
    return log_slope(series.step.values, series.values[:, 0, 0], since=LATE * float(series.step[-1]))


def claim(
    id: str, statement: str, source: str, quantity: str, op: Literal["<", ">", "<="], threshold: float, of: str
) -> Claim:
    """A claim on a series at the end of one arm: `of` is "arm series"."""
    arm, name = of.split()
    return Claim(id, statement, source, None, quantity, lambda runs: last(runs[arm], name), op, threshold)


CLAIMS = [
    claim(
        "sink-elsewhere",
        "A softmax head parks on <s> where there is nothing to copy.",
        "Section 3.1, Figure 3",
        "attention to <s> on queries that are no triggers",
        ">",
        0.8,
        "softmax extreme/sink_score",
    ),
    claim(
        "no-sink-at-triggers",
        "It does not at triggers, where it copies.",
        "Section 3.1, Figure 3",
        "attention to <s> on triggers",
        "<",
        0.05,
        "softmax triggers/sink_score",
    ),
    claim(
        "drain",
        "The value of <s> drains.",
        "Section 3.1, Figure 3",
        "norm of the value of <s> over the mean of the others",
        "<",
        0.35,
        "softmax extreme/value_drain",
    ),
    claim(
        "relu-no-sink",
        "ReLU attention has no sink.",
        "Section 3.3, Figure 8",
        "attention to <s> on queries that are no triggers",
        "<",
        0.05,
        "relu extreme/sink_score",
    ),
    claim(
        "relu-no-drain",
        "Nor does the value of <s> drain under it.",
        "Section 3.3, Figure 8",
        "norm of the value of <s> over the mean of the others",
        ">",
        0.6,
        "relu extreme/value_drain",
    ),
    Claim(
        id="relu-solves-the-task",
        statement="And it copies as well as softmax attention.",
        source="Section 3.3",
        paper_value=None,
        quantity="|copy cross-entropy, ReLU less softmax| (nats)",
        measure=lambda runs: abs(last(runs["relu"], "risk/copy") - last(runs["softmax"], "risk/copy")),
        op="<=",
        threshold=0.02,
    ),
    Claim(
        id="adam-grows-a-peak",
        statement="With three layers and Adam the residual state of <s> keeps growing.",
        source="Section 3.2, Figure 7",
        paper_value=None,
        quantity="residual ratio of <s> after the middle block, end over a third of the way",
        measure=lambda runs: peak_growth(runs["deep-adam"]),
        op=">",
        threshold=1.25,
    ),
    Claim(
        id="sgd-grows-none",
        statement="From the same start SGD grows no such peak.",
        source="Section 3.3, Figure 8",
        paper_value=None,
        quantity="residual ratio of <s> after the middle block, end over a third of the way",
        measure=lambda runs: peak_growth(runs["deep-sgd"]),
        op="<",
        threshold=1.15,
    ),
    Claim(
        id="relu-grows-none",
        statement="Nor does ReLU attention, which has no sink to feed it.",
        source="Section 3.3, Figure 8",
        paper_value=None,
        quantity="residual ratio of <s> after the middle block, end over a third of the way",
        measure=lambda runs: peak_growth(runs["deep-relu"]),
        op="<",
        threshold=1.15,
    ),
    Claim(
        id="sgd-keeps-the-sink",
        statement="Sinks there are under SGD too: only the peak is Adam's.",
        source="Section 3.3, Figure 8",
        paper_value=None,
        quantity="attention to <s> on queries that are no triggers, three layers, the strongest",
        measure=lambda runs: at_sink(runs["deep-sgd"], "extreme/sink_score"),
        op=">",
        threshold=0.5,
    ),
    Claim(
        id="sgd-keeps-the-drain",
        statement="And their values drain.",
        source="Section 3.3, Figure 8",
        paper_value=None,
        quantity="norm of the value of <s> over the mean of the others, three layers, the strongest sink",
        measure=lambda runs: at_sink(runs["deep-sgd"], "extreme/value_drain"),
        op="<",
        threshold=0.5,
    ),
    Claim(
        id="mutual-reinforcement",
        statement="The sink grows as the value drains.",
        source="Section 3.2, Theorem 2",
        paper_value=None,
        quantity="rank correlation of sink score and minus value drain over checkpoints",
        measure=lambda runs: reinforced(runs["softmax"]),
        op=">",
        threshold=0.9,
    ),
    Claim(
        id="half-log-t",
        statement="Late in training the sink logit grows about as half the log of time.",
        source="Section 3.2, Theorem 2",
        paper_value=0.5,
        quantity="|slope of the sink logit against log step - 0.5|, from a quarter of the steps on",
        measure=lambda runs: abs(late_slope(runs["softmax"], "extreme/sink_logit") - 0.5),
        op="<=",
        threshold=0.3,
    ),
    Claim(
        id="sink-logits-concentrate",
        statement="Meanwhile the sink logits of different queries come together.",
        source="Section 3.2, Theorem 2",
        paper_value=None,
        quantity="slope of the sink logit's standard deviation over queries against log step, from a quarter of the steps on",
        measure=lambda runs: late_slope(runs["softmax"], "extreme/sink_logit_spread"),
        op="<",
        threshold=0.0,
    ),
]
