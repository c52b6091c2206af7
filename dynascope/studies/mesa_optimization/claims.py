"""What `mesa-optimization` claims, and what is measured of its records to tell."""

from dynascope.record import Record
from dynascope.studies.harness import Claim, Runs
from dynascope.studies.mesa_optimization.method import SCALES, STARTS


def product(record: Record) -> float:
    """a·b at the end."""
    return float(record["mesa/a"][-1] * record["mesa/b"][-1])


def off_target(runs: Runs, *arms: str) -> list[float]:
    """|ab/ab* − 1| of each arm."""
    return [abs(product(runs[arm]) / float(runs[arm]["target"][0]) - 1) for arm in arms]


def spread_of_starts(runs: Runs) -> float:
    """Largest relative difference between the products that different starts come to."""
    ends = [product(runs[f"gaussian-from-{place}"]) for place in range(len(STARTS))]
    return max(ends) / min(ends) - 1


def last_ratio(runs: Runs, arm: str) -> float:
    """Mean ratio of prediction and truth at the last position."""
    return float(runs[arm]["capability/mean_ratio"].values[-1, -1])


CLAIMS = [
    Claim(
        id="C1-sparse",
        statement="With a sparse first token the product of the two scalars comes to its closed form.",
        source="Theorem 4.1, Figure 1",
        paper_value="1 / scale squared",
        quantity="|product over closed form - 1|, scales 0.5, 1, 2",
        measure=lambda runs: off_target(runs, *(f"sparse-{scale:g}" for scale in SCALES)),
        op="<",
        threshold=1e-3,
    ),
    Claim(
        id="C1-gaussian",
        statement="So it does with a Gaussian first token, all matrices free.",
        source="Theorem 4.1, Figure 1",
        paper_value="1 / (5 scale squared) for long sequences",
        quantity="|product over closed form - 1|, scales 0.5, 1, 2",
        measure=lambda runs: off_target(runs, "gaussian-0.5", "gaussian-from-1", "gaussian-2"),
        op="<",
        threshold=0.02,
    ),
    Claim(
        id="C2",
        statement="Where training starts makes no difference to the product.",
        source="Theorem 4.1",
        paper_value=None,
        quantity="relative spread of the product over three starts",
        measure=spread_of_starts,
        op="<",
        threshold=0.01,
    ),
    Claim(
        id="C3",
        statement="With the gradient masked to the diagonals the law of ones has its closed form too.",
        source="Section 6, Figure 3",
        paper_value=None,
        quantity="|product over closed form - 1|",
        measure=lambda runs: off_target(runs, "ones-masked"),
        op="<",
        threshold=0.01,
    ),
    Claim(
        id="C4-ones",
        statement="Without the mask the law of ones breaks the diagonal structure.",
        source="Theorem 4.3, Figure 3",
        paper_value=None,
        quantity="off-diagonal share of the projection-value block",
        measure=lambda runs: float(runs["ones"]["mesa/off_diagonal"].values[-1, 1]),
        op=">",
        threshold=0.10,
    ),
    Claim(
        id="C4-gaussian",
        statement="The Gaussian law keeps it.",
        source="Theorem 4.1",
        paper_value=0.0,
        quantity="off-diagonal share of the projection-value block",
        measure=lambda runs: float(runs["gaussian-from-1"]["mesa/off_diagonal"].values[-1, 1]),
        op="<",
        threshold=0.03,
    ),
    Claim(
        id="C5-sparse",
        statement="The learner recovers sparse processes.",
        source="Theorem 4.2, Figure 2",
        paper_value=1.0,
        quantity="|mean ratio of prediction and truth at the last position - 1|, scales 0.5, 1, 2",
        measure=lambda runs: [abs(last_ratio(runs, f"sparse-{scale:g}") - 1) for scale in SCALES],
        op="<=",
        threshold=1e-3,
    ),
    Claim(
        id="C5-gaussian",
        statement="It gives a fifth of Gaussian ones, at every scale.",
        source="Theorem 4.2, Figure 2",
        paper_value=0.2,
        quantity="|mean ratio of prediction and truth at the last position - 0.2|, scales 0.5, 1, 2",
        measure=lambda runs: [
            abs(last_ratio(runs, arm) - 0.2) for arm in ("gaussian-0.5", "gaussian-from-1", "gaussian-2")
        ],
        op="<=",
        threshold=0.02,
    ),
]
