"""What `exact-permutations` claims, and what is measured of its records to tell."""

import math

import numpy as np

from dynascope.studies.exact_permutations.method import CLOSED_K, PAPERS_SIZES, SAMPLED_K
from dynascope.studies.harness import Claim, Runs
from dynascope.theory.permutations import (
    Kernel,
    ensemble_size,
    permutation_predictor,
)


def off(runs: Runs, kernel: Kernel, name: str) -> float:
    """How far a trained ensemble's figure is from the limit's, two ones of five bits; variances relatively."""
    found = float(runs[f"trained-{kernel}"][name].sel(step=2))
    limit = permutation_predictor(5, 2, kernel)
    expected = {"mean/one": limit.one, "mean/zero": limit.zero, "variance": limit.variance}[name]
    return abs(found - expected) / (expected if name == "variance" else 1.0)


def spread(runs: Runs, name: str, law: np.ndarray) -> float:
    """Largest over smallest ratio of the ensemble size to a law, over k = 32 … 512."""
    ratio = runs["closed-form"][f"size/{name}"].values[0] / law
    seen = ratio[np.array(CLOSED_K) >= 32]
    return float(seen.max() / seen.min())


def sampled_off(runs: Runs) -> np.ndarray:
    """|log| of the sizes found by sampling over the exact ones, by k, at delta 0.1."""
    found = runs["sampled-ntk"]["size/0.1"].values
    mean: np.ndarray = np.abs(np.log(found / [ensemble_size(k, 0.1) for k in SAMPLED_K]))
    return mean


def papers_misfit(runs: Runs, kernel: Kernel) -> float:
    """Mean |log| of the paper's own sizes over those sampled with a kernel."""
    found = runs[f"sampled-{kernel}"]
    logs = np.array([np.log(sizes / found[f"size/{delta}"].values) for delta, sizes in PAPERS_SIZES.items()])
    reached = logs[np.isfinite(logs)]
    return float(np.abs(reached).mean()) if reached.size else math.nan


K = np.array(CLOSED_K, float)
TOLERANCES = {"mean/one": 0.01, "mean/zero": 0.004, "variance": 0.08}
NAMES: dict[Kernel, str] = {"ntk": "NTK parametrization", "nngp": "standard parametrization, NNGP kernel"}


def every_input_claim(k: int) -> Claim:
    """No vector is wrong."""
    return Claim(
        id=f"C1-{k}",
        statement=f"Trained on {k} unit vectors, an ensemble is exact on all {2**k - 1} nonzero inputs.",
        source="Theorem 5.1",
        paper_value="all of them",
        quantity="wrong vectors",
        measure=lambda runs: float(runs[f"every-input-{k}"]["wrong"][0]),
        op="<",
        threshold=0.5,
    )


def moment_claim(kernel: Kernel, name: str) -> Claim:
    """A mean or the variance is that of the limit."""
    return Claim(
        id=f"C2-{kernel}-{name.replace('/', '-')}",
        statement=f"A wide trained ensemble has the limit's {name.replace('/', ' of a ')} ({NAMES[kernel]}).",
        source="Section 4, Theorem 4.2",
        paper_value=None,
        quantity="relative difference" if name == "variance" else "difference",
        measure=lambda runs: off(runs, kernel, name),
        op="<=",
        threshold=TOLERANCES[name],
    )


CLAIMS = [
    *[every_input_claim(k) for k in (5, 8)],
    *[moment_claim(kernel, name) for kernel in NAMES for name in TOLERANCES],
    Claim(
        id="C3-single",
        statement="For one input the ensemble grows as k log k.",
        source="Theorem 5.1",
        paper_value="linearithmic",
        quantity="largest over smallest ratio of size to k log k, k from 32 to 512",
        measure=lambda runs: spread(runs, "single", K * np.log(K)),
        op="<",
        threshold=2.0,
    ),
    Claim(
        id="C3-all",
        statement="For all inputs together it grows as the square of k.",
        source="Corollary 5.2",
        paper_value="quadratic",
        quantity="largest over smallest ratio of size to k squared, k from 32 to 512",
        measure=lambda runs: spread(runs, "all", K**2),
        op="<",
        threshold=2.0,
    ),
    Claim(
        id="C3-not-less",
        statement="A law of k to the 1.5 fits the sizes for all inputs worse than the square.",
        source="Corollary 5.2",
        paper_value=None,
        quantity="spread of ratios to k^1.5 over that to the square",
        measure=lambda runs: spread(runs, "all", K**1.5) / spread(runs, "all", K**2),
        op=">",
        threshold=1.0,
    ),
    Claim(
        id="C4",
        statement="Networks drawn from the limit need as many as the closed form says.",
        source="Section 6, Figure 2",
        paper_value=None,
        quantity="|log of sampled over exact size|, k from 5 to 30",
        measure=sampled_off,
        op="<",
        threshold=math.log(1.5),
    ),
    Claim(
        id="C4-paper",
        statement="The sizes in the paper's own figure are those of its theory's kernel, not of the NNGP kernel.",
        source="Section 6, Figure 2",
        paper_value="43 to 318 networks",
        quantity="|log misfit| to the tangent kernel less that to the NNGP kernel",
        measure=lambda runs: papers_misfit(runs, "ntk") - papers_misfit(runs, "nngp"),
        op="<",
        threshold=0.0,
    ),
    Claim(
        id="C5",
        statement="A single network is of no use: its zero bits are wrong almost every other time.",
        source="Section 4",
        paper_value=0.449,
        quantity="distance of the error rate of zero bits from the limit's",
        measure=lambda runs: abs(float(runs["trained-ntk"]["error/single"].sel(step=2)) - 0.449),
        op="<",
        threshold=0.05,
    ),
]
