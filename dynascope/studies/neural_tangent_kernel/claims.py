"""What `neural-tangent-kernel` claims, and what is measured of its records to tell."""

import math

import numpy as np
from scipy import stats

from dynascope.studies.harness import Claim, Runs
from dynascope.studies.neural_tangent_kernel.method import WIDTHS


def slope(runs: Runs, name: str, at: int = -1) -> float:
    """Slope of log quantity over log width."""
    values = [float(runs[f"circle-{width}"][name].values[at]) for width in WIDTHS]
    return float(np.polyfit(np.log(WIDTHS), np.log(values), 1)[0])


def half_lives(runs: Runs, arm: str) -> tuple[np.ndarray, np.ndarray]:
    """Measured and predicted steps to half of the first error, by mode; NaN where the run was too short."""
    record = runs[arm]
    error = record["modes/error"]
    share = np.abs(error.values / error.values[0])
    measured = np.full(share.shape[1], math.nan)
    for mode in range(share.shape[1]):
        below = np.flatnonzero(share[:, mode] <= 0.5)
        if below.size and below[0]:
            ends = slice(below[0] - 1, below[0] + 1)
            measured[mode] = np.interp(-0.5, -share[ends, mode], error.step.values[ends])
    return measured, record["modes/predicted_half_life"].values[0]


def worst_of_top_three(runs: Runs) -> float:
    """Largest relative deviation of the first three half-lives from the prediction."""
    measured, predicted = half_lives(runs, "digits-4096")
    return float(np.max(np.abs(measured[:3] / predicted[:3] - 1)))


def order_of_modes(runs: Runs) -> float:
    """Spearman correlation of measured half-lives with 1/eigenvalue over the top ten."""
    measured, predicted = half_lives(runs, "digits-4096")
    seen = np.isfinite(measured)
    return float(stats.spearmanr(measured[seen], predicted[seen]).statistic) if seen.sum() > 2 else math.nan


def standard_errors_off(runs: Runs) -> np.ndarray:
    """At each angle, how many standard errors the networks' mean is off the predicted one."""
    outputs = runs["ensemble"]["ensemble/outputs"].values[0]
    error = outputs.std(0, ddof=1) / math.sqrt(len(outputs))
    mean: np.ndarray = np.abs(outputs.mean(0) - runs["ensemble"]["predicted/mean"].values[0]) / error
    return mean


def log_variance_ratio(runs: Runs) -> float:
    """|log| of the networks' variance over the predicted one, summed over angles."""
    variance = runs["ensemble"]["ensemble/outputs"].values[0].var(0, ddof=1).sum()
    return float(abs(np.log(variance / np.square(runs["ensemble"]["predicted/std"].values[0]).sum())))


def deviation(runs: Runs, task: str, width: int) -> float:
    """Largest distance of the outputs from the constant kernel's prediction, over the first error."""
    return float(runs[f"{task}-{width}"]["modes/beside"].max())


CLAIMS = [
    Claim(
        id="C1",
        statement="At initialization the kernel tends to its limit as one over the root of the width.",
        source="Theorem 1, Figure 1",
        paper_value="-1/2",
        quantity="distance of the log-log slope over widths from -1/2",
        measure=lambda runs: abs(slope(runs, "limit/error") + 0.5),
        op="<=",
        threshold=0.15,
    ),
    Claim(
        id="C2",
        statement="Training moves the kernel less, the wider the network.",
        source="Theorem 2, Figure 1",
        paper_value="-1/2 (bound of the theory for this norm)",
        quantity="log-log slope of the kernel's relative movement over widths",
        measure=lambda runs: slope(runs, "kernel/distance"),
        op="<=",
        threshold=-0.35,
    ),
    Claim(
        id="C2-4096",
        statement="At width 4096 the kernel stands still.",
        source="Theorem 2",
        paper_value="0 in the limit",
        quantity="relative movement of the kernel",
        measure=lambda runs: float(runs["circle-4096"]["kernel/distance"][-1]),
        op="<",
        threshold=0.05,
    ),
    Claim(
        id="C3",
        statement="The error decays along each eigenvector at the rate of its eigenvalue.",
        source="Section 5.1, Figure 3",
        paper_value=None,
        quantity="largest relative deviation of the first three half-lives",
        measure=worst_of_top_three,
        op="<=",
        threshold=0.15,
    ),
    Claim(
        id="C3-order",
        statement="What lies along the top eigenvectors is learnt first.",
        source="Section 5.1",
        paper_value=None,
        quantity="rank correlation of measured and predicted half-lives, ten modes",
        measure=order_of_modes,
        op=">",
        threshold=0.95,
    ),
    Claim(
        id="C4",
        statement="The mean of trained networks is kernel regression with the limiting kernel.",
        source="Section 5, Figure 2",
        paper_value=None,
        quantity="standard errors between the mean of 50 networks and the prediction",
        measure=lambda runs: float(np.mean(standard_errors_off(runs))),
        op="<",
        threshold=2.0,
    ),
    Claim(
        id="C4-variance",
        statement="Their spread is that of the predicted Gaussian.",
        source="Section 5, Figure 2",
        paper_value=None,
        quantity="|log of the ratio of variances|",
        measure=log_variance_ratio,
        op="<=",
        threshold=math.log(1.6),
    ),
    Claim(
        id="C5",
        statement="On the sphere the limiting kernel is positive definite for ReLU and erf.",
        source="Proposition 2",
        paper_value="above 0",
        quantity="smallest eigenvalue, 50 points",
        measure=lambda runs: min(float(runs["definiteness"][f"smallest/{name}"][0]) for name in ("relu", "erf")),
        op=">",
        threshold=1e-6,
    ),
    Claim(
        id="C5-polynomial",
        statement="For a linear network it has the rank of its inputs and one more.",
        source="Proposition 2",
        paper_value=11.0,
        quantity="rank, 50 points in 10 dimensions, less 11",
        measure=lambda runs: abs(float(runs["definiteness"]["rank/identity"][0]) - 11),
        op="<",
        threshold=0.5,
    ),
    Claim(
        id="C6",
        statement="A narrow network leaves the constant kernel's prediction, a wide one follows it.",
        source="Section 6.3",
        paper_value=None,
        quantity="deviation at width 64 over that at width 4096, digits",
        measure=lambda runs: deviation(runs, "digits", 64) / deviation(runs, "digits", 4096),
        op=">",
        threshold=2.0,
    ),
    Claim(
        id="C7",
        statement="A target along one eigenvector is approached on a straight line by a wide network.",
        source="Section 6.3, Figure 3",
        paper_value=None,
        quantity="deviation at width 64 over that at width 4096, second eigenvector",
        measure=lambda runs: deviation(runs, "direction", 64) / deviation(runs, "direction", 4096),
        op=">",
        threshold=2.0,
    ),
]
