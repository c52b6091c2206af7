"""What a noisy judge does to P(CC|CA), and how to undo it (2506.14245, section 3; Rogan and Gladen 1978)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from scipy import stats
from torch import Tensor

from dynascope.rl.reasoning.judge_ensemble import RULES


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class JudgeNoiseModel:
    """A judge that calls a wrong chain right with chance `p_fp`, a right one wrong with `p_fn`, each of n times anew.

    The times are taken to be independent, which flatters a judge whose mistakes repeat themselves. Raises ValueError for
    a chance outside [0, 1] or n < 1.

    >>> JudgeNoiseModel(0.1, 0.2, n=3).rates("majority")  # 0.028 and 0.104
    """

    p_fp: float
    p_fn: float
    n: int = 3

    def __post_init__(self) -> None:
        if not (0 <= self.p_fp <= 1 and 0 <= self.p_fn <= 1):
            raise ValueError(f"p_fp={self.p_fp} and p_fn={self.p_fn} are chances: they must lie between 0 and 1")
        if self.n < 1:
            raise ValueError(f"n={self.n} must be at least 1")

    def rates(self, rule: str) -> tuple[float, float]:
        """The false-positive and the false-negative rate of the rule over n verdicts.

        Raises ValueError for another rule than any, majority and all.
        """
        if rule not in RULES:
            raise ValueError(f"rule is any, majority or all, not {rule!r}")
        fewest = {"any": 1, "majority": self.n // 2 + 1, "all": self.n}[rule]
        false_positive = float(stats.binom.sf(fewest - 1, self.n, self.p_fp))
        false_negative = float(stats.binom.cdf(fewest - 1, self.n, 1 - self.p_fn))
        return false_positive, false_negative

    def expected(self, share: float, rule: str) -> float:
        """The share of chains that the rule calls right where `share` of them are.

        >>> JudgeNoiseModel(0.1, 0.2).expected(0.7, "majority")  # 0.7 · 0.896 + 0.3 · 0.028
        """
        false_positive, false_negative = self.rates(rule)
        return share * (1 - false_negative) + (1 - share) * false_positive

    def band(self, d: int, c: int, rule: str, confidence: float = 0.95) -> tuple[int, int]:
        """Between which counts the judged D lies, where d of c answers truly have a right chain; exact.

        Raises ValueError unless 0 <= d <= c.

        >>> JudgeNoiseModel(0.1, 0.2).band(70, 100, "majority")
        """
        if not 0 <= d <= c:
            raise ValueError(f"d={d} right chains out of c={c} right answers: d must lie between 0 and c")
        false_positive, false_negative = self.rates(rule)
        of_right = stats.binom.pmf(np.arange(d + 1), d, 1 - false_negative)
        of_wrong = stats.binom.pmf(np.arange(c - d + 1), c - d, false_positive)
        below = np.convolve(of_right, of_wrong).cumsum()
        tail = (1 - confidence) / 2
        return int(np.searchsorted(below, tail)), int(np.searchsorted(below, 1 - tail).clip(max=c))

    def corrected(self, observed: float, rule: str) -> float:
        """The share that the rule's observed share speaks for, by its rates."""
        return rogan_gladen(observed, *self.rates(rule))


def rogan_gladen(observed: float, false_positive: float, false_negative: float) -> float:
    """(observed − fp) / (1 − fp − fn), kept within [0, 1].

    Raises ValueError when fp + fn >= 1: such a judge tells nothing. Source: Rogan and Gladen 1978.

    >>> rogan_gladen(0.6356, 0.028, 0.104)  # 0.7
    """
    power = 1 - false_positive - false_negative
    if power <= 0:
        raise ValueError(
            f"fp={false_positive:.3g} and fn={false_negative:.3g} add up to 1 or more: this judge tells right chains from "
            "wrong ones no better than chance; take another"
        )
    return float(np.clip((observed - false_positive) / power, 0, 1))


def corrected_share(
    judged: Bool[Tensor, " N"],
    calibration_judged: Bool[Tensor, " M"],
    calibration_gold: Bool[Tensor, " M"],
    confidence: float = 0.95,
) -> Interval:
    """P(CC|CA) from an ensemble's verdicts on right answers, its errors measured on chains that people have labelled.

    The interval (delta method) covers that both samples are finite; it treats chains as independent. Raises ValueError
    without a right and a wrong chain among the labelled, and as `rogan_gladen` does.

    >>> corrected_share(judged, hand_judged, hand_labels)
    """
    right, wrong = calibration_gold, ~calibration_gold
    if not len(judged):
        raise ValueError("there is no judged chain to estimate from")
    if not bool(right.any()) or not bool(wrong.any()):
        raise ValueError("label at least one right and one wrong chain by hand; one kind is missing")
    observed = float(judged.double().mean())
    false_positive = float(calibration_judged[wrong].double().mean())
    false_negative = float((~calibration_judged[right]).double().mean())
    share = rogan_gladen(observed, false_positive, false_negative)
    power = 1 - false_positive - false_negative
    variance = (
        _variance(observed, len(judged))
        + (1 - share) ** 2 * _variance(false_positive, int(wrong.sum()))
        + share**2 * _variance(false_negative, int(right.sum()))
    ) / power**2
    reach = float(stats.norm.ppf((1 + confidence) / 2)) * variance**0.5
    return Interval(share, max(0.0, share - reach), min(1.0, share + reach))


def _variance(share: float, count: int) -> float:
    # One success and one failure more, so that a rate seen as 0 or 1 in a small sample is not taken for certain.
    smooth = (share * count + 1) / (count + 2)
    return smooth * (1 - smooth) / count
