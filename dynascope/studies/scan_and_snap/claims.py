"""What the paper says of scanning, the snap and its control, as rules over the records of the study."""

import itertools

import numpy as np
import xarray as xr
from jaxtyping import Float
from scipy import stats

from dynascope.findings.scan_snap import log_step_rate
from dynascope.record import Record
from dynascope.studies.harness import Claim, Runs
from dynascope.studies.scan_and_snap.synthetic import (
    DENSE_UNTIL,
    RATES,
    RATIOS,
)

Samples = Float[np.ndarray, " repetitions"]


# What the claims measure


def after_scan(series: xr.DataArray) -> Float[np.ndarray, "..."]:
    """A series at step 100, or at its end if that is earlier."""
    at: np.ndarray = series.sel(step=min(DENSE_UNTIL, int(series.step[-1]))).values
    return at


def swapped(runs: Runs) -> Samples:
    """Neighbours in the order of P(l|n) whose attention is in another order, over all classes of each repetition."""
    share: Samples = (np.diff(after_scan(runs["scan"]["distinct"]), axis=-1) <= 0).sum((-1, -2)).astype(float)
    return share


def growth(runs: Runs) -> Samples:
    """How much the ratio of the most and the least frequent distinct token grew, in the class where it grew least."""
    weights = runs["scan"]["distinct"]
    ratio = [part[..., -1] / part[..., 0] for part in (after_scan(weights), weights.values[0])]
    least: Samples = (ratio[0] / ratio[1]).min(-1)
    return least


def moved(runs: Runs) -> tuple[Samples, Samples]:
    """Change of the common mass until step 100, and after it, over classes."""
    mass = runs["scan"]["common_mass"].mean("dim_1")
    middle = after_scan(mass)
    return mass.values[0] - middle, middle - mass.values[-1]


def paired_t(difference: Samples) -> float:
    """Student's t of paired differences."""
    return float(np.mean(difference) / stats.sem(difference))


def cell(runs: Runs, rate: float, ratio: float) -> Samples:
    """Entropy of every repetition at one pair of rates, one query."""
    values: Samples = runs["grid-1"]["entropy"].values[-1, :, RATES.index(rate), RATIOS.index(ratio)]
    return values


def denser(runs: Runs) -> float:
    """Smallest t of the entropy that a tenfold decoder rate adds, over rates of attention but the unstable 2."""
    return min(paired_t(cell(runs, rate, 10.0) - cell(runs, rate, 1.0)) for rate in RATES if rate != 2.0)


def sparser(runs: Runs) -> float:
    """Smallest t of the entropy that each next larger rate of attention takes away, with equal rates."""
    return min(paired_t(cell(runs, slow, 1.0) - cell(runs, fast, 1.0)) for slow, fast in itertools.pairwise(RATES))


def rate_left(record: Record) -> float:
    """Last rate of the entropy in log step over its steepest fall, each over a factor 2.5 of steps; 1 if it did not fall."""
    entropy = record["scan/entropy"].mean(("layer", "head"))
    entropy = entropy[entropy.step > 0]
    rates = log_step_rate(entropy).values
    has_fallen = entropy.values[-1] < entropy.values[0] and rates.min(initial=0.0) < 0
    return float(abs(rates[-1]) / -rates.min()) if has_fallen else 1.0


def moves_to_distinct(record: Record) -> float:
    """Spearman's correlation of how common a word is and how its attention changed."""
    commonness, change = (record[name].values[-1] for name in ("commonness", "attention_change"))
    known = np.isfinite(commonness) & np.isfinite(change)
    return float(stats.spearmanr(commonness[known], change[known]).statistic)


MODELS = {"yz": "the paper's model in low rank", "transformer": "an ordinary transformer layer"}
TEXT_CLAIMS = [
    claim
    for model, who in MODELS.items()
    for claim in (
        Claim(
            id=f"D-snap-{model}",
            statement=f"On real text too attention scans and then freezes: {who}.",
            source="Experiments on WikiText",
            paper_value=None,
            quantity="last rate of attention's entropy in log step over its steepest fall",
            measure=lambda runs, model=model: rate_left(runs[f"text-{model}"]),  # type: ignore[misc]
            op="<",
            threshold=1 / 3,
        ),
        Claim(
            id=f"D-distinct-{model}",
            statement=f"On real text attention moves from common to distinct words: {who}.",
            source="Experiments on WikiText",
            paper_value=None,
            quantity="Spearman correlation of commonness and change of attention",
            measure=lambda runs, model=model: moves_to_distinct(runs[f"text-{model}"]),  # type: ignore[misc]
            op="<",
            threshold=-0.2,
        ),
    )
]


CLAIMS = [
    Claim(
        id="A-mass",
        statement="Attention scans: tokens that all contexts share lose it.",
        source="Theorem on the fate of contextual tokens; figure of the attention map",
        paper_value=None,
        quantity="attention on common tokens at step 100, the class with most (0.645 at the start)",
        measure=lambda runs: after_scan(runs["scan"]["common_mass"]).max(-1),
        op="<",
        threshold=0.45,
    ),
    Claim(
        id="A-order",
        statement="Distinct tokens keep the order of their co-occurrence with the next one.",
        source="Theorem on relative gains",
        paper_value=0.0,
        quantity="neighbours in that order whose attention is not",
        measure=swapped,
        op="<=",
        threshold=0.0,
    ),
    Claim(
        id="A-ratio",
        statement="And the more frequent of them push the rarer ones down.",
        source="Theorem on relative gains",
        paper_value=None,
        quantity="growth of attention on the most over the least frequent, the class where it is least",
        measure=growth,
        op=">",
        threshold=2.0,
    ),
    Claim(
        id="B-early",
        statement="The mass moves in the first hundred steps.",
        source="Theorem on the phase transition",
        paper_value=None,
        quantity="fall of the common mass in steps 0 to 100",
        measure=lambda runs: moved(runs)[0],
        op=">",
        threshold=0.2,
    ),
    Claim(
        id="B-late",
        statement="Then attention snaps: it hardly moves any more.",
        source="Theorem on the phase transition",
        paper_value=None,
        quantity="|change| of the common mass from step 100 to the end",
        measure=lambda runs: np.abs(moved(runs)[1]),
        op="<",
        threshold=0.03,
    ),
    Claim(
        id="B-share",
        statement="What it still moves is a small part of what it had moved.",
        source="Theorem on the phase transition",
        paper_value=None,
        quantity="late over early change of the common mass",
        measure=lambda runs: np.abs(moved(runs)[1] / moved(runs)[0]),
        op="<",
        threshold=0.25,
    ),
    Claim(
        id="B-winner",
        statement="No token takes everything.",
        source="Abstract; theorem on the phase transition",
        paper_value=None,
        quantity="largest attention on one token at the end",
        measure=lambda runs: runs["scan"]["largest"].values[-1].max(-1),
        op="<",
        threshold=0.5,
    ),
    Claim(
        id="C-ratio",
        statement="A ten times faster decoder leaves attention denser.",
        source="Experiments, entropy over both learning rates",
        paper_value=None,
        quantity="smallest paired t of the entropy added, attention's rates 0.5, 1 and 3, one query",
        measure=denser,
        op=">",
        threshold=3.0,
    ),
    Claim(
        id="C-rate",
        statement="Faster learning of attention makes it sparser.",
        source="Experiments, entropy over both learning rates",
        paper_value=None,
        quantity="smallest paired t of the entropy lost from each of attention's rates to the next, one query",
        measure=sparser,
        op=">",
        threshold=3.0,
    ),
    *TEXT_CLAIMS,
]
