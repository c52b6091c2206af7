"""What `sigma-reparam` claims, and what is measured of its records to tell."""

import math

import numpy as np

from dynascope.record import Record
from dynascope.studies.harness import Claim, Runs
from dynascope.studies.sigma_reparam.method import BASELINES, LR_FACTORS, at


def final_loss(record: Record) -> float:
    """Mean over the last tenth of the steps; infinite for a run that diverged."""
    loss = record["loss"].values
    last = float(np.mean(loss[-max(1, len(loss) // 10) :]))
    return last if math.isfinite(last) else math.inf


def lowest_head(record: Record, until: float = math.inf) -> float:
    """Lowest entropy of any head, over that of uniform attention, until a step."""
    entropy = record["attention/entropy_normalized"]
    seen = entropy.values[entropy.step.values <= until]
    return float(np.nanmin(seen)) if np.isfinite(seen).any() else math.nan


def lowest_mean(record: Record) -> float:
    """Lowest mean entropy over heads, over that of uniform attention."""
    mean = record["attention/entropy_normalized"].mean(("layer", "head")).values
    return float(np.nanmin(mean)) if np.isfinite(mean).any() else math.nan


def first_instability(record: Record) -> int | None:
    """The step of the first loss spike or divergence that the detectors tell."""
    steps = [
        finding.step for finding in record.findings if finding.id in ("loss-spike", "divergence", "loss-not-finite")
    ]
    return min(steps, default=None)


def collapse_before_instability(runs: Runs) -> list[bool]:
    """Of the baseline runs that went unstable: had a head collapsed by 10 steps after?"""
    unstable = [
        (record, step)
        for name in BASELINES
        for factor in LR_FACTORS
        if (step := first_instability(record := runs[at(name, factor)])) is not None
    ]
    return [lowest_head(record, until=step + 10.0) < 0.1 for record, step in unstable]


def sigma_keeps_entropy(runs: Runs) -> list[bool]:
    """At each learning rate where a baseline collapses: does σReparam keep more entropy?"""
    return [
        lowest_mean(runs[at("sigma", factor)]) > lowest_mean(runs[at(name, factor)])
        for name in BASELINES
        for factor in LR_FACTORS
        if lowest_head(runs[at(name, factor)]) < 0.1
    ]


def num_trainable(runs: Runs, name: str) -> int:
    """At how many learning rates the arm ends within 10 % of its own best loss."""
    losses = [final_loss(runs[at(name, factor)]) for factor in LR_FACTORS]
    return sum(loss <= 1.1 * min(losses) and math.isfinite(loss) for loss in losses)


def query_key_growth(record: Record) -> np.ndarray:
    """(layer, map): spectral norms at the end over those at the start."""
    grown: np.ndarray = record["growth/qk"].values[-1]
    return grown


def growth_difference(runs: Runs) -> float:
    """Mean log growth of the query and key maps' spectral norms, σReparam less pre-LN, at the lowest learning rate."""
    sigma, baseline = (query_key_growth(runs[at(name, 1.0)]) for name in ("sigma", "pre-ln"))
    return float(np.log(sigma).mean() - np.log(baseline).mean())


def accuracy_lost(runs: Runs, name: str) -> float:
    """Points of accuracy that the arm has less than the pre-LN baseline."""
    return 100 * float(runs["vision-pre-ln"]["accuracy"][-1] - runs[name]["accuracy"][-1])


def entropy_change(runs: Runs) -> float:
    """Mean entropy in the last quarter of the steps, the heated run less the same run left alone."""
    hot, cold = (runs[name]["attention/entropy_normalized"] for name in ("heated", at("pre-ln", 1.0)))
    from_step = 0.75 * float(cold.step[-1])
    return float(hot[hot.step >= from_step].mean() - cold[cold.step >= from_step].mean())


CLAIMS = [
    Claim(
        id="C1",
        statement="When a baseline goes unstable, an attention head has collapsed before, or within 10 steps.",
        source="Section 3.1, Figure 1",
        paper_value=None,
        quantity="unstable baseline runs whose lowest head's entropy fell below 0.1 of uniform by then",
        measure=collapse_before_instability,
        op=">=",
        threshold=0.8,
        statistic="share",
    ),
    Claim(
        id="C2",
        statement="Where a baseline's attention collapses, σReparam keeps more entropy.",
        source="Section 4, Figure 2",
        paper_value=None,
        quantity="collapsed baseline runs above whose lowest mean entropy σReparam stays",
        measure=sigma_keeps_entropy,
        op=">",
        threshold=0.5,
        statistic="share",
    ),
    Claim(
        id="C3",
        statement="σReparam trains over a wider range of learning rates than post-LN.",
        source="Section 4.1, Section 4.3",
        paper_value=None,
        quantity="number of learning rates of 4 that train, σReparam less post-LN",
        measure=lambda runs: num_trainable(runs, "sigma") - num_trainable(runs, "post-ln"),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C4",
        statement="Spectral norms of query and key maps grow more slowly under σReparam.",
        source="Section 3.2, Proposition 3.2",
        paper_value=None,
        quantity="log growth, σReparam less pre-LN",
        measure=growth_difference,
        op="<",
        threshold=0.0,
    ),
    Claim(
        id="C5",
        statement="Vision trains without layer norm, warmup and weight decay at no more than 2 points lost.",
        source="Section 4.1, Table 2",
        paper_value="81.6-82.2 % against 81.8 % (ViT-B, ImageNet-1k; recalled)",
        quantity="accuracy lost (points)",
        measure=lambda runs: accuracy_lost(runs, "vision-sigma"),
        op="<=",
        threshold=2.0,
    ),
    Claim(
        id="C5-sgd",
        statement="The same holds without an adaptive optimizer.",
        source="Section 4.1, Table 2",
        paper_value="81.6-82.2 % against 81.8 % (ViT-B, ImageNet-1k, LARS; recalled)",
        quantity="accuracy lost (points)",
        measure=lambda runs: accuracy_lost(runs, "vision-sigma-sgd"),
        op="<=",
        threshold=2.0,
    ),
    Claim(
        id="C6",
        statement="Sharpening the attention of a healthy run by a factor of 8 lowers its entropy for good.",
        source="Section 3.1, Figure 3",
        paper_value=None,
        quantity="change of normalised entropy",
        measure=entropy_change,
        op="<",
        threshold=0.0,
    ),
    Claim(
        id="C7",
        statement="Sharpening the attention of a healthy run by a factor of 8 worsens its loss.",
        source="Section 3.1, Figure 3",
        paper_value=None,
        quantity="change of final loss (nats)",
        measure=lambda runs: final_loss(runs["heated"]) - final_loss(runs[at("pre-ln", 1.0)]),
        op=">",
        threshold=0.0,
    ),
]
