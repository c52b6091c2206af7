"""Risk measures of a distribution of scores, and what each asks of a policy gradient (2510.00911, section 3).

A score is better the higher it is, and F⁻¹(u) is its quantile at level u. A measure is an integral of quantiles, and its
gradient is E[A(R) ∇ log π] with an advantage A that is a function of the score and of one or two quantiles.
"""

from collections.abc import Mapping
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Quantile: TypeAlias = int | float | Float[Tensor, "..."]


def quantile_integral(
    scores: Float[Tensor, " N"], low: int | float, high: int | float, *, weights: Float[Tensor, " N"] | None = None
) -> Float[Tensor, ""]:
    """∫_low^high F⁻¹(u) du, exactly, of scores with equal weights or of a discrete distribution with these probabilities.

    Differentiable in scores and probabilities. Raises ValueError without scores, or unless 0 <= low < high <= 1.

    >>> quantile_integral(torch.tensor([3.0, 0, 1, 2]), 0.0, 0.5)  # a quarter each of 0 and 1
    tensor(0.2500)
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"levels {low} and {high} must be 0 <= low < high <= 1")
    if not len(scores):
        raise ValueError("there are no scores to take quantiles of: give at least one")
    order = scores.argsort()
    mass = torch.full_like(scores, 1 / len(scores)) if weights is None else weights / weights.sum()
    after = mass[order].cumsum(0)
    before = after - mass[order]
    return (scores[order] * (after.clamp(low, high) - before.clamp(low, high))).sum()


def risk_report(
    scores: Float[Tensor, " N"], *, alpha: float = 0.2, beta: float = 0.8, omega: float = 0.5
) -> Mapping[str, Float[Tensor, ""]]:
    """The measures of scores, in their unit: `mean`, `cvar` (mean of the lowest share alpha), `rvar` (mean between the two
    quantiles), and `mvar` = (1 + omega) ∫_0^alpha F⁻¹ + ∫_alpha^beta F⁻¹, which is no mean.

    >>> risk_report(torch.arange(10.0))["cvar"]
    tensor(0.5000)
    """
    tail, middle = quantile_integral(scores, 0, alpha), quantile_integral(scores, alpha, beta)
    return {
        "mean": scores.mean(),
        "cvar": tail / alpha,
        "rvar": middle / (beta - alpha),
        "mvar": (1 + omega) * tail + middle,
    }


def weight_between(scores: Float[Tensor, "..."], low: Quantile, high: Quantile) -> Float[Tensor, "..."]:
    """What the integral of quantiles between two asks of a score: low − high below, score − high between, 0 above.

    The baseline low − high falls out of the derivation, so that a score above `high` asks for nothing.

    >>> weight_between(torch.arange(6.0), 1, 3)
    tensor([-2., -2., -1.,  0.,  0.,  0.])
    """
    return (scores - low).clamp(min=0) - (scores - high).clamp(min=0) + (low - high)


def mvar_advantage(
    scores: Float[Tensor, "..."], low: Quantile, high: Quantile, omega: float = 0.5
) -> Float[Tensor, "..."]:
    """Of the mixed value at risk: averse. The tail below `low` weighs 1 + omega times, what is above `high` not at all.

    Never positive, concave, non-decreasing, and 0 exactly from `high` on. omega = −1 leaves the tail out.
    Source: theorem 1.

    >>> mvar_advantage(torch.arange(6.0), 1, 3)
    tensor([-3.5000, -2.0000, -1.0000,  0.0000,  0.0000,  0.0000])
    """
    return weight_between(scores, low, high) - (1 + omega) * (low - scores).clamp(min=0)


def rvar_advantage(
    scores: Float[Tensor, "..."], low: Quantile, high: Quantile, *, alpha: float = 0.2, beta: float = 0.8
) -> Float[Tensor, "..."]:
    """Of the mean between the quantiles of levels alpha and beta. Raises ValueError unless alpha < beta.

    >>> rvar_advantage(torch.arange(4.0), 1, 3, alpha=0.25, beta=0.75)
    tensor([-4., -4., -2.,  0.])
    """
    if not alpha < beta:
        raise ValueError(f"alpha={alpha} must be below beta={beta}")
    return weight_between(scores, low, high) / (beta - alpha)


def cvar_advantage(scores: Float[Tensor, "..."], low: Quantile, *, alpha: float = 0.2) -> Float[Tensor, "..."]:
    """Of the mean of the lowest share alpha, whose upper end is the quantile `low`. Raises ValueError for no share.

    >>> cvar_advantage(torch.arange(3.0), 1, alpha=0.5)
    tensor([-2., -0., -0.])
    """
    if alpha <= 0:
        raise ValueError(f"alpha={alpha} must be above 0")
    return -(low - scores).clamp(min=0) / alpha


def released_mvar_advantage(
    scores: Float[Tensor, "..."],
    low: Quantile,
    high: Quantile,
    omega: float = 0.5,
    *,
    alpha: float = 0.2,
    beta: float = 0.8,
    natural_baseline: bool = True,
) -> Float[Tensor, "..."]:
    """The released code's form: a weighted mean of the two measures, each normalised, and a baseline that can be left out.

    >>> released_mvar_advantage(torch.arange(6.0), 1.4, 3.6)[:2]
    tensor([-5.6666, -2.6667])
    """
    between = weight_between(scores, low, high) + (0.0 if natural_baseline else high - low)
    tail = -(low - scores).clamp(min=0) / (alpha + 1e-6)
    return ((1 + omega) * tail + between / (beta - alpha + 1e-6)) / (2 + omega)


def seeking_advantage(
    scores: Float[Tensor, "..."],
    low: Quantile,
    high: Quantile,
    omega: float = 0.5,
    *,
    alpha: float = 0.2,
    beta: float = 0.8,
) -> Float[Tensor, "..."]:
    """The opposite, of the paper's ablation: the upper tail weighs more, and the lower one not at all.

    Raises ValueError unless alpha < beta < 1.

    >>> seeking_advantage(torch.arange(3.0), 0, 1, alpha=0.25, beta=0.75)
    tensor([-0.8000,  0.0000,  2.4000])
    """
    if not alpha < beta < 1:
        raise ValueError(f"alpha={alpha} must be below beta={beta}, and that below 1")
    upper = (scores - high).clamp(min=0) / (1 - beta)
    return ((1 + omega) * upper + rvar_advantage(scores, low, high, alpha=alpha, beta=beta)) / (2 + omega)
