"""Exact learning of permutations by infinitely wide networks: what they predict, and how many it takes (2502.16763).

With unit inputs the kernels are functions of ρ = x·x'. In units of w⁴/k: NNGP K(ρ) = (sin θ + (π − θ) ρ)/(2π), and tangent
kernel Θ(ρ) = K(ρ) + (π − θ) ρ/(2π), with θ = arccos ρ. Trained on the unit vectors, the prediction for an input with n ones
is the permutation of a vector that has one value at its ones and another, slightly negative, at its zeros.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy.special import gammaln, log_ndtr
from torch import Tensor

Kernel = Literal["ntk", "nngp"]


@dataclass(frozen=True)
class Prediction:
    """What one network of an infinitely wide ensemble says of an input: normal with these means and this variance."""

    one: float
    """Mean at bits that should be 1."""
    zero: float
    """Mean at bits that should be 0."""
    variance: float

    def failure(self, num_networks: int, num_ones: int, k: int) -> float:
        """Chance that the rounded mean of so many networks is wrong in some bit."""
        if self.variance <= 0:
            return 0.0
        scale = math.sqrt(num_networks / self.variance)
        zeros = (k - num_ones) * log_ndtr(-self.zero * scale) if num_ones < k else 0.0
        return float(-np.expm1(num_ones * log_ndtr(self.one * scale) + zeros))


def permutation_predictor(
    k: int,
    num_ones: int,
    kernel: Kernel = "ntk",
    *,
    steps: float = math.inf,
    lr: float | None = None,
    w_std: float = 1.0,
) -> Prediction:
    """Mean and variance of trained networks' outputs at an input with `num_ones` ones, in closed form.

    `kernel="nngp"` is training that moves the last layer only, to which the standard parametrization comes down at large
    width. At finite `steps` of gradient descent on half the sum of squares, `lr` is that of the kernel in use (default:
    9/10 of the largest stable one, see `largest_lr`). `w_std` scales the variance by its fourth power and no mean.

    Raises ValueError for impossible sizes.

    >>> permutation_predictor(5, 2)
    Prediction(one=0.5606..., zero=-0.0146..., variance=0.0132...)
    """
    if k < 2 or not 1 <= num_ones <= k:
        raise ValueError(f"k={k} must be at least 2, and num_ones={num_ones} between 1 and k")
    rho = 1 / math.sqrt(num_ones)
    own, nngp, nngp_zero = 0.5, _nngp(rho), _nngp(0.0)
    if kernel == "ntk":
        same, at_one, at_zero = 1.0, _nngp(rho) + _slope(rho) * rho, _nngp(0.0)
    else:
        same, at_one, at_zero = own, nngp, nngp_zero
    # Two eigenvalues: of vectors that sum to zero, and of the constant one.
    values = (same - at_zero, same - at_zero + k * at_zero)
    rate = (0.9 * largest_lr(k, kernel) if lr is None else lr) / k
    gains = [(1 - (1 - rate * value) ** steps if math.isfinite(steps) else 1.0) / value for value in values]
    middle = (num_ones * at_one + (k - num_ones) * at_zero) / k
    one, zero = (gains[0] * (entry - middle) + gains[1] * middle for entry in (at_one, at_zero))
    total = num_ones * one + (k - num_ones) * zero
    squares = num_ones * one**2 + (k - num_ones) * zero**2
    variance = (
        own
        + (own - nngp_zero) * squares
        + nngp_zero * total**2
        - 2 * (num_ones * one * nngp + (k - num_ones) * zero * nngp_zero)
    )
    # At a training input the terms cancel to rounding.
    is_known = num_ones == 1 and math.isinf(steps)
    return Prediction(one, 0.0 if is_known else zero, 0.0 if is_known else w_std**4 * variance / k)


def largest_lr(k: int, kernel: Kernel = "ntk") -> float:
    """The largest stable learning rate on half the sum of squares, at w_std = 1: 2 over the kernel's top eigenvalue.

    >>> largest_lr(5)
    6.1...
    """
    same, other = (1.0, _nngp(0.0)) if kernel == "ntk" else (0.5, _nngp(0.0))
    return 2 * k / (same + (k - 1) * other)


def ensemble_size(
    k: int,
    delta: float,
    inputs: int | Literal["worst", "all"] = 2,
    *,
    bound: Literal["hoeffding", "exact"] = "exact",
    kernel: Kernel = "ntk",
) -> int:
    """How many networks' mean, rounded at 0, is right with chance at least 1 − delta: the ensemble complexity.

    Args:
        inputs: The number of ones of a single input; "worst", for whichever number is hardest; or "all", for all 2^k − 1
            inputs together.
        bound: "exact" for Gaussian outputs (for "all" by a union over inputs), or "hoeffding", the paper's
            2 v/μ² ln(bits/delta), larger and easier to read.

    Source: 2502.16763, Theorem 5.1 (k log k for one input, k² for all).

    >>> ensemble_size(5, 0.1)
    205
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta} must lie between 0 and 1")
    counts = list(range(2, k + 1)) if isinstance(inputs, str) else [inputs]
    predictions = {count: permutation_predictor(k, count, kernel) for count in counts}
    if bound == "hoeffding":
        margin = max(_noise_to_signal(prediction, count, k) for count, prediction in predictions.items())
        many = k * math.log(2) if inputs == "all" else 0.0
        return math.ceil(2 * margin * (math.log(k / delta) + many))

    def failure(num_networks: int) -> float:
        chances = [prediction.failure(num_networks, count, k) for count, prediction in predictions.items()]
        if inputs != "all":
            return max(chances)
        # Inputs by the million: their number is kept as a logarithm.
        choose = [gammaln(k + 1) - gammaln(count + 1) - gammaln(k - count + 1) for count in counts]
        return float(
            sum(np.exp(log + np.log(chance)) for log, chance in zip(choose, chances, strict=True) if chance > 0)
        )

    low, high = 0, 1
    while failure(high) > delta:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if failure(middle) > delta else (low, middle)
    return high


def round_ensemble(mean: Float[Tensor, "... bits"], threshold: float = 0.0) -> Float[Tensor, "... bits"]:
    """Bits from an ensemble's mean: 1 above the threshold, 0 at or below it.

    >>> round_ensemble(torch.tensor([0.5, 0.0, -0.01]))
    tensor([1., 0., 0.])
    """
    return (mean > threshold).to(mean.dtype)


def exact_match(bits: Float[Tensor, "... bits"], targets: Float[Tensor, "... bits"]) -> Float[Tensor, "..."]:
    """1 where every bit is right, else 0.

    >>> exact_match(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    tensor([1., 0.])
    """
    return (bits == targets).all(-1).to(bits.dtype)


def bit_margins(mean: Float[Tensor, "... bits"], targets: Float[Tensor, "... bits"]) -> Float[Tensor, "... bits"]:
    """How far each mean lies on its right side of 0; negative where the bit is wrong.

    >>> bit_margins(torch.tensor([0.5, -0.1]), torch.tensor([1.0, 0.0]))
    tensor([0.5000, 0.1000])
    """
    return mean * (2 * targets - 1)


def _nngp(rho: float) -> float:
    angle = math.acos(min(1.0, rho))
    return (math.sin(angle) + (math.pi - angle) * rho) / (2 * math.pi)


def _slope(rho: float) -> float:
    return (math.pi - math.acos(min(1.0, rho))) / (2 * math.pi)


def _noise_to_signal(prediction: Prediction, num_ones: int, k: int) -> float:
    signals = [prediction.one] + ([prediction.zero] if num_ones < k else [])
    return max(prediction.variance / signal**2 if signal else 0.0 for signal in signals)
