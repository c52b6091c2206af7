"""From records to verdicts: each claim's samples, their interval, and on which side of the threshold it lies."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dynascope.studies.harness.study import Claim, Runs, Study

# Wilson's interval would let one run of one seed speak for all.
FEWEST = {"mean": 2, "share": 3}


@dataclass(frozen=True)
class Judgement:
    """What was measured for one claim. `holds` is None when it is undecided; `note` then says why."""

    claim: Claim
    measured: float | None
    ci95: tuple[float, float] | None
    holds: bool | None
    num_samples: int
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """The outcome of a study: a judgement a claim, and the arms that failed."""

    study: Study
    preset: str
    seeds: int
    judgements: list[Judgement]
    run: Path
    wall_seconds: float
    failures: Mapping[str, str]

    def exit_status(self, *, strict: bool = False) -> int:
        """0, or 1 when an arm failed, or 3 with `strict` when a claim does not hold."""
        if self.failures:
            return 1
        return 3 if strict and any(judgement.holds is False for judgement in self.judgements) else 0


def judge(claim: Claim, runs: Sequence[Runs]) -> Judgement:
    """Apply a claim's rule to the records of each seed.

    >>> judge(claim, [{"baseline": open_record(a0), "pruned": open_record(b0)}, …]).holds
    """
    samples: list[float] = []
    missing, num_left_out = "", 0
    for records in runs:
        try:
            measured = claim.measure(records)
        except KeyError as error:  # an arm that failed, or a series that it never wrote
            missing = str(error.args[0])
            continue
        values = np.atleast_1d(np.asarray([] if measured is None else measured, np.float64)).ravel()
        samples.extend(values[~np.isnan(values)])
        num_left_out += int(np.isnan(values).sum())
    if not samples:
        return Judgement(claim, None, None, None, 0, f"nothing to measure: no {missing}" if missing else "no samples")
    mean = float(np.mean(samples))
    if not math.isfinite(mean):
        return Judgement(claim, mean, None, None, len(samples), "a sample is infinite, so the mean has no interval")
    if len(samples) < FEWEST[claim.statistic]:
        few = "one sample says" if len(samples) == 1 else f"{len(samples)} samples say"
        return Judgement(claim, mean, None, None, len(samples), f"{few} too little; run more seeds")
    interval = _wilson(samples) if claim.statistic == "share" else student_interval(samples)
    holds = _side(claim, *interval)
    notes = [f"{num_left_out} of {len(samples) + num_left_out} samples are no number"] if num_left_out else []
    notes += ["the interval holds the threshold; run more seeds"] if holds is None else []
    if missing:
        return Judgement(claim, mean, interval, None, len(samples), f"some seeds have no {missing}")
    return Judgement(claim, mean, interval, holds, len(samples), "; ".join(notes))


def student_interval(samples: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean, from at least two samples.

    >>> student_interval([1.0, 1.0])
    (1.0, 1.0)
    """
    mean = np.mean(samples)
    reach = np.std(samples, ddof=1) / math.sqrt(len(samples)) * _quantile(len(samples) - 1)
    return float(mean - reach), float(mean + reach)


@cache
def _quantile(degrees: int) -> float:
    from scipy import stats

    return float(stats.t.ppf(0.975, degrees))


def _wilson(samples: list[float]) -> tuple[float, float]:
    from scipy import stats

    interval = stats.binomtest(int(np.count_nonzero(samples)), len(samples)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def _side(claim: Claim, low: float, high: float) -> bool | None:
    """True when the whole interval satisfies the rule, False when none of it does."""
    satisfies = {
        "<": lambda value: value < claim.threshold,
        "<=": lambda value: value <= claim.threshold,
        ">": lambda value: value > claim.threshold,
        ">=": lambda value: value >= claim.threshold,
    }[claim.op]
    ends = satisfies(low), satisfies(high)
    return ends[0] if ends[0] == ends[1] else None


def verdict_as_json(verdict: Verdict) -> dict[str, Any]:
    """The verdict as plain values; what is not finite is None."""
    study = verdict.study
    return {
        "study": study.name,
        "origin": study.origin or study.name,
        "paper": study.paper.arxiv,
        "preset": verdict.preset,
        "seeds": verdict.seeds,
        "claims": [
            {
                "id": judgement.claim.id,
                "statement": judgement.claim.statement,
                "source": judgement.claim.source,
                "paper_value": judgement.claim.paper_value,
                "measured": _finite(judgement.measured),
                "ci95": judgement.ci95 and [_finite(end) for end in judgement.ci95],
                "rule": judgement.claim.rule,
                "holds": judgement.holds,
                "samples": judgement.num_samples,
                "note": judgement.note,
            }
            for judgement in verdict.judgements
        ],
        "failures": dict(verdict.failures),
        "run": str(verdict.run),
        "wall_seconds": round(verdict.wall_seconds, 1),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
