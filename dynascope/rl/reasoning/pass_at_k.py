"""Pass@K and CoT-Pass@K without bias, their curves over K, and how sure they are (2107.03374; 2506.14245, section 3)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

Counts = int | Sequence[int] | np.ndarray | Tensor

_RESAMPLED_AT_ONCE = 4_000_000


def pass_at_k(n: Counts, c: Counts, k: Counts) -> Float[Tensor, "..."]:
    """The chance that at least one of k answers is right, estimated from n of which c were: 1 − C(n−c, k) / C(n, k).

    `n` and `c` are broadcast; the result has their shape, and a last axis for `k` if that is a list. Unbiased for k
    independent draws, unlike 1 − (1 − c/n)^k. float64. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    Source: 2107.03374, section 2.1.

    >>> pass_at_k(10, 5, [1, 3])
    tensor([0.5000, 0.9167], dtype=torch.float64)
    """
    answers, right = torch.broadcast_tensors(_whole("n", n), _whole("c", c))
    ks = _whole("k", k)
    if ks.dim() > 1:
        raise ValueError(f"k is a number or a list of numbers, not of shape {tuple(ks.shape)}")
    if bool(((right < 0) | (right > answers)).any()):
        raise ValueError("c counts right answers out of n: it must lie between 0 and n")
    fewest = int(answers.min())
    if int(ks.min()) < 1 or int(ks.max()) > fewest:
        raise ValueError(
            f"k={ks.reshape(-1).tolist()} must lie between 1 and the fewest answers of a prompt, {fewest}; "
            "draw more answers or leave out the larger k"
        )
    shape = answers.shape + ks.shape
    answers, right, ks = answers.reshape(-1), right.reshape(-1), ks.reshape(-1)
    order = answers.argsort()
    sizes, members = answers[order].unique_consecutive(return_counts=True)
    estimate = torch.empty(len(answers), len(ks), dtype=torch.float64, device=answers.device)
    for size, chosen in zip(sizes.tolist(), order.split(members.tolist()), strict=True):
        counts = right[chosen]
        estimate[chosen] = _by_count(size, int(counts.max()), ks)[counts]
    return estimate.reshape(shape)


def cot_pass_at_k(n: Counts, d: Counts, k: Counts) -> Float[Tensor, "..."]:
    """Pass@K that pays only for answers reached by right reasoning: d of n have a right chain of thought and answer.

    Never above `pass_at_k` of the same answers, since d <= c. Raises as `pass_at_k` does. Source: 2506.14245, section 3.

    >>> cot_pass_at_k(10, 2, [1, 3])
    tensor([0.2000, 0.5333], dtype=torch.float64)
    """
    return pass_at_k(n, d, k)


def pass_at_k_variance(n: int, p: Float[Tensor, "..."] | float, k: Counts) -> Float[Tensor, "..."]:
    """The variance of one prompt's estimate from n answers, each right with probability p; exact.

    With several k, their axis comes last. Tells how many answers a precision needs; p = c/n plugs in what was seen.
    Raises ValueError for p outside [0, 1], and as `pass_at_k` does.

    >>> pass_at_k_variance(100, 0.2, 1)
    tensor(0.0016, dtype=torch.float64)
    """
    chance = torch.as_tensor(p, dtype=torch.float64)
    if bool(((chance < 0) | (chance > 1)).any()):
        raise ValueError("p is a probability: it must lie between 0 and 1")
    counts = torch.arange(n + 1)
    weight = torch.from_numpy(np.asarray(stats.binom.pmf(counts.numpy(), n, chance[..., None].numpy())))
    estimate = pass_at_k(n, counts, k)
    table = estimate.reshape(n + 1, -1)
    away = table - (weight @ table)[..., None, :]
    variance = (weight[..., None] * away.square()).sum(-2)
    return variance.reshape(chance.shape + estimate.shape[1:])


@dataclass(frozen=True, eq=False)
class PassAtKCurve:
    """Mean Pass@K over prompts at each K, with what the choice of prompts leaves uncertain.

    `low` and `high` bound the mean: by resampling prompts if that was asked for, otherwise by the normal approximation;
    NaN for a single prompt.
    """

    ks: tuple[int, ...]
    mean: Float[Tensor, " ks"]
    standard_error: Float[Tensor, " ks"]
    low: Float[Tensor, " ks"]
    high: Float[Tensor, " ks"]
    per_prompt: Float[Tensor, "prompts ks"]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """How the answers were drawn, where that is known; curves of other temperatures or lengths are no rivals."""


def pass_at_k_curve(
    correct: Bool[Tensor, "prompts answers"],
    ks: Sequence[int],
    *,
    mask: Bool[Tensor, "prompts answers"] | None = None,
    weights: Float[Tensor, " prompts"] | None = None,
    resamples: int = 0,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
) -> PassAtKCurve:
    """The curve of a table of answers; for CoT-Pass@K hand over `answer_correct & chain_correct`.

    Prompts with fewer answers than others leave the rest of their row out of `mask`: each is estimated from its own n,
    as repeating its last answer would be biased. Raises as `curve_from_counts` does.

    >>> pass_at_k_curve(torch.rand(500, 64) < 0.2, [1, 8, 64], resamples=1000).mean
    """
    if mask is None:
        n = torch.full((len(correct),), correct.shape[1], device=correct.device)
    else:
        n, correct = mask.sum(1), correct & mask
    return curve_from_counts(
        n,
        correct.sum(1),
        ks,
        weights=weights,
        resamples=resamples,
        confidence=confidence,
        generator=generator,
    )


def curve_from_counts(
    n: Counts,
    c: Counts,
    ks: Sequence[int],
    *,
    weights: Float[Tensor, " prompts"] | None = None,
    resamples: int = 0,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
) -> PassAtKCurve:
    """The curve from each prompt's number of answers and of right ones.

    With `weights` the means over prompts are weighted ones. With `resamples` the interval is a percentile bootstrap over
    prompts. Raises ValueError for weights that are negative or all 0, and as `pass_at_k` does.

    >>> curve_from_counts([10, 12], [5, 0], [1, 8]).mean
    tensor([0.2500, 0.5000], dtype=torch.float64)
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1")
    estimate = pass_at_k(n, c, list(ks)).reshape(-1, len(ks))
    num = len(estimate)
    share = estimate.new_full((num,), 1 / num)
    if weights is not None:
        if len(weights) != num:
            raise ValueError(f"there are {num} prompts and {len(weights)} weights; give one weight a prompt")
        if bool((weights < 0).any()) or not bool(weights.sum() > 0):
            raise ValueError("weights of prompts must not be negative, nor all 0")
        share = weights.to(estimate) / weights.to(estimate).sum()
    mean = share @ estimate
    spread = share.square() @ (estimate - mean).square()
    error = (spread * num / (num - 1)).sqrt() if num > 1 else torch.full_like(mean, torch.nan)
    if resamples and num > 1:
        low, high = _resampled(estimate, share, resamples, confidence, generator)
    else:
        reach = float(stats.norm.ppf((1 + confidence) / 2))
        low, high = mean - reach * error, mean + reach * error
    return PassAtKCurve(tuple(int(k) for k in ks), mean, error, low, high, estimate)


def _whole(name: str, values: Counts) -> Tensor:
    tensor: Tensor = torch.as_tensor(values)
    if not tensor.numel():
        raise ValueError(f"{name} is empty: there is nothing to estimate from")
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise ValueError(f"{name} counts answers: it must hold whole numbers, not {tensor.dtype}")
    return tensor.long()


def _by_count(n: int, most: int, ks: Tensor) -> Float[Tensor, "counts ks"]:
    # One factor for each right answer, multiplied from the top: a product stays exact where differences of log-factorials
    # lose digits, and the factor 1 - k/k = 0 gives a sure success its exact 1.
    factors = 1 - ks / torch.arange(n, n - most, -1, dtype=torch.float64, device=ks.device)[:, None]
    start = torch.ones(1, ks.numel(), dtype=torch.float64, device=ks.device)
    return 1 - torch.cat([start, factors]).cumprod(0)


def _resampled(
    estimate: Tensor, share: Tensor, resamples: int, confidence: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    num = len(estimate)
    together = torch.cat([estimate * share[:, None], share[:, None]], 1)
    means: list[Tensor] = []
    at_once = max(1, _RESAMPLED_AT_ONCE // num)
    for first in range(0, resamples, at_once):
        rows = min(at_once, resamples - first)
        drawn = torch.randint(num, (rows, num), generator=generator, device=estimate.device)
        times = torch.zeros(rows, num, dtype=torch.float64, device=estimate.device)
        sums = times.scatter_add_(1, drawn, torch.ones_like(times)) @ together
        means.append(sums[:, :-1] / sums[:, -1:])
    edges = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64, device=estimate.device)
    low, high = torch.cat(means).nanquantile(edges, 0)
    return low, high
