"""What `data-diet` claims, and what is measured of its records to tell."""

import math

import numpy as np
from scipy import stats

from dynascope.data import label_noise_report
from dynascope.studies.data_diet.method import mean_scores
from dynascope.studies.harness import Claim, Runs


def accuracy(runs: Runs, arm: str) -> float:
    """Mean test accuracy of an arm's trainings, in percent."""
    return float(runs[arm]["accuracy"].mean())


def gain(runs: Runs, arm: str, over: str) -> float:
    """Points of accuracy that one arm has more than another."""
    return accuracy(runs, arm) - accuracy(runs, over)


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Rank correlation; NaN where one of the two is constant and has no ranks."""
    return math.nan if np.ptp(one) == 0 or np.ptp(other) == 0 else float(stats.spearmanr(one, other).statistic)


def epochs_of(runs: Runs) -> list[int]:
    """The epochs at which scores were taken."""
    return [int(step) for step in runs["score-conv"]["el2n"].step.values]


def agreement(runs: Runs, early: int, with_name: str = "el2n") -> float:
    """Spearman correlation between early EL2N and EL2N (or forgetting) at the end; `early` counts the scored epochs."""
    record, epochs = runs["score-conv"], epochs_of(runs)
    final = mean_scores(record, with_name, epochs[-1])
    return spearman(mean_scores(record, "el2n", epochs[early]), final)


def transfer(runs: Runs) -> float:
    """Spearman correlation between the convolutional nets' and the MLPs' early EL2N."""
    epoch = epochs_of(runs)[-2]
    scores = [mean_scores(runs[arm], "el2n", epoch) for arm in ("score-conv", "score-mlp")]
    return spearman(*scores)


def noise_auroc(runs: Runs) -> float | None:
    """Area under the ROC curve of early EL2N for mislabelled examples."""
    record = runs["score-noisy"]
    is_noisy = record["mislabelled"].values[-1] > 0
    return label_noise_report(mean_scores(record, "el2n", epochs_of(runs)[-2]), is_noisy).auroc


def barrier_delay(runs: Runs) -> float:
    """Epochs by which the hardest tenth's barrier falls below 2 % later than the easiest tenth's."""
    record = runs["barrier"]

    def fallen(name: str) -> float:
        steps, values = record[name].step.values, record[name].values
        below = steps[values < 0.02]
        return float(below[0] if below.size else 2 * steps[-1])

    return fallen("barrier/hardest") - fallen("barrier/easiest")


def velocity_ratio(runs: Runs) -> float:
    """Mean kernel velocity on the hardest tenth over that on the easiest."""
    return float(runs["kernel"]["velocity/hardest"].mean() / runs["kernel"]["velocity/easiest"].mean())


def norm_correlation(runs: Runs) -> float:
    """Spearman correlation between GraNd at initialisation and the norm of the input."""
    record = runs["score-conv"]
    return spearman(mean_scores(record, "grand", 0), record["input_norm"].values[0])


def beats_random(identity: str, arm: str, over: str, told: str) -> Claim:
    """A claim that what was kept by score trains better than what was kept by chance."""
    return Claim(
        id=identity,
        statement=f"{told}, the highest EL2N train better than a random choice.",
        source="Section 3.1, Figure 1",
        paper_value=None,
        quantity="accuracy gained (points)",
        measure=lambda runs: gain(runs, arm, over),
        op=">",
        threshold=0.0,
    )


CLAIMS = [
    Claim(
        id="C1-cost",
        statement="Half of the examples, kept by EL2N early in training, train as well as all.",
        source="Abstract, Section 3.1",
        paper_value="95.4 % with half of CIFAR-10 as with all (recalled)",
        quantity="accuracy lost (points)",
        measure=lambda runs: gain(runs, "full", "el2n-50"),
        op="<=",
        threshold=0.5,
    ),
    beats_random("C1-50", "el2n-50", "random-50", "At 50 % kept"),
    beats_random("C1-30", "el2n-30", "random-30", "At 30 % kept"),
    beats_random("C1-20", "el2n-20", "random-20", "At 20 % kept"),
    beats_random(
        "C1-narrow", "narrow-el2n-50", "narrow-random-50", "In a network of a quarter of the width, at 50 % kept"
    ),
    Claim(
        id="C2",
        statement="EL2N a quarter into training ranks examples as EL2N at the end does.",
        source="Section 3.1",
        paper_value=None,
        quantity="Spearman correlation",
        measure=lambda runs: agreement(runs, -2),
        op=">=",
        threshold=0.6,
    ),
    Claim(
        id="C2-forgetting",
        statement="EL2N a quarter into training ranks examples as forgetting over all of it does.",
        source="Section 3.1",
        paper_value=None,
        quantity="Spearman correlation",
        measure=lambda runs: agreement(runs, -2, "forgetting"),
        op=">=",
        threshold=0.6,
    ),
    Claim(
        id="C2-rises",
        statement="The agreement with the end rises with time.",
        source="Section 3.1, Figure 2",
        paper_value=None,
        quantity="Spearman correlation a quarter into training less that after one epoch",
        measure=lambda runs: agreement(runs, -2) - agreement(runs, 1),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C3",
        statement="Scores agree between architectures.",
        source="Section 3.3",
        paper_value=None,
        quantity="Spearman correlation of convolutional nets with MLPs",
        measure=transfer,
        op=">=",
        threshold=0.5,
    ),
    beats_random("C3-pruning", "mlp-scores-50", "random-50", "At 50 % kept by another architecture's scores"),
    Claim(
        id="C4",
        statement="Mislabelled examples have high EL2N.",
        source="Section 3.2",
        paper_value=None,
        quantity="AUROC",
        measure=noise_auroc,
        op=">=",
        threshold=0.9,
    ),
    Claim(
        id="C4-window",
        statement="With 10 % of labels wrong, leaving out the hardest tenth first beats keeping the highest.",
        source="Section 3.2, Figure 3",
        paper_value=None,
        quantity="accuracy gained (points)",
        measure=lambda runs: gain(runs, "noisy-window-50", "noisy-el2n-50"),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C5",
        statement="The error barrier of twins vanishes earlier on the easiest tenth than on the hardest.",
        source="Section 5.1, Figure 5",
        paper_value=None,
        quantity="delay (epochs)",
        measure=barrier_delay,
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C6",
        statement="The tangent kernel moves faster on the hardest examples than on the easiest.",
        source="Section 5.2, Figure 6",
        paper_value=None,
        quantity="ratio of velocities",
        measure=velocity_ratio,
        op=">",
        threshold=1.0,
    ),
    Claim(
        id="C7",
        statement="Already at initialisation GraNd chooses better than chance (later found to rest on a fault, 2303.14753).",
        source="Section 3.1",
        paper_value=None,
        quantity="accuracy gained (points)",
        measure=lambda runs: gain(runs, "grand-at-init-50", "random-50"),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C7-norm",
        statement="GraNd at initialisation mostly tells the norm of the input.",
        source="arXiv 2303.14753",
        paper_value=None,
        quantity="Spearman correlation",
        measure=norm_correlation,
        op=">=",
        threshold=0.5,
    ),
]
