"""Advantages within three standard deviations, and statistics of them over shards (StableReinforce, arXiv 2505.02835).

With 0/1 rewards and a share q of successes, a failure's normalized advantage is −√(q/(1−q)): beyond q = 0.9 the filter
removes every failure, and below 0.1 every success. What is left then has one sign; `advantage_health` tells.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dynascope.rl.batch import PolicyBatch, per_token

Mode = Literal["zero", "drop"]

TOLERANCE = 1e-4
"""An advantage of 3 sigma exactly is kept, whatever rounding made of it."""


class Moments(NamedTuple):
    """Number, mean, and sum of squared distances from the mean of a shard's tokens."""

    number: Float[Tensor, ""]
    mean: Float[Tensor, ""]
    squares: Float[Tensor, ""]


def token_moments(values: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Moments:
    """The moments of one shard; those of no token are 0.

    >>> token_moments(torch.tensor([[1.0, 3.0]]), torch.ones(1, 2).bool()).mean
    tensor(2., dtype=torch.float64)
    """
    known = values.masked_fill(~mask, 0.0).double()
    count = mask.sum().double()
    mean = known.sum() / count.clamp(min=1)
    return Moments(count, mean, ((known - mean) * mask).square().sum())


def combined(shards: Iterable[Moments]) -> Moments:
    """The moments of all shards together, without the cancellation of sums of squares (Chan, Golub and LeVeque 1979).

    Each shard hands over three numbers: one collective a batch.

    >>> combined([token_moments(one, mask) for one, mask in shards])
    """
    count, mean, squares = (torch.stack(one) for one in zip(*shards, strict=True))
    total = count.sum()
    together = (count * mean).sum() / total.clamp(min=1)
    return Moments(total, together, (squares + count * (mean - together).square()).sum())


def across_processes(own: Moments) -> Moments:
    """The moments of all processes of torch.distributed together, by one collective of three numbers; `own` where there is one.

    >>> normalize_advantages(values, mask, across_processes(token_moments(values, mask)))
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return own
    mine = torch.stack(own)
    every = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(every, mine)
    return combined(Moments(*one) for one in every)


def normalize_advantages(
    values: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"], moments: Moments | None = None, *, floor: float = 1e-8
) -> Float[Tensor, "N T"]:
    """(value − mean) / population deviation over all tokens; padding is 0, and so are values that are all equal.

    The whitening of REINFORCE++ (2501.03262, section 3.3) and of PPO for text. `moments` are those of all shards (`combined`)
    or processes (`across_processes`); by default the batch's own. `floor` is the least variance.

    >>> normalize_advantages(torch.tensor([[1.0, 3.0]]), torch.ones(1, 2).bool())
    tensor([[-1.,  1.]])
    """
    known = token_moments(values, mask) if moments is None else moments
    deviation = (known.squares / known.number.clamp(min=1)).clamp(min=floor).sqrt()
    away = values.double() - known.mean
    away = away.masked_fill(away.abs() <= 1e-12 * known.mean.abs(), 0.0)  # a mean of equal values is rounded
    return (away / deviation).to(values.dtype).masked_fill(~mask, 0.0)


def filter_advantages(
    advantage: Float[Tensor, "*shape"], *, sigma: float = 3.0, center: float | Float[Tensor, ""] = 0.0
) -> tuple[Float[Tensor, "*shape"], Bool[Tensor, "*shape"]]:
    """Normalized advantages with those further than `sigma` from `center` set to 0, and which are kept.

    What is not finite is not kept either. The paper's center is 0; the authors' code compares the normalized value with
    the mean of the raw advantages, which `center` can be set to. Raises ValueError for a sigma that is not positive.

    >>> filter_advantages(torch.tensor([0.2, -5.6]))[0]
    tensor([0.2000, 0.0000])
    """
    if not sigma > 0:
        raise ValueError(f"sigma={sigma} must be positive")
    is_kept = ((advantage - center).abs() <= sigma + TOLERANCE) & advantage.isfinite()
    return torch.where(is_kept, advantage, 0.0), is_kept


@dataclass(eq=False)
class AdvantageFilter:
    """`filter_advantages` as a post-processor, to come after an estimator that normalizes.

    "zero" keeps the denominators of the loss, as the authors' code does. "drop" divides a completion's tokens by how many of
    them are kept, as if the others were not there (the paper's wording); the two differ by that factor alone. `center` is a
    number, or a function of the batch: `WhitenedReturns().raw_mean` is that of the authors' code. `metrics` are those of
    `advantage_health` for the last rollout.

    Raises ValueError for another mode, and for "drop" where that would not be what leaving tokens out of the mask is: with an
    aggregation other than seq-mean-token-mean, or with one advantage a completion.

    >>> stable = reinforce_pp.having(post=(AdvantageFilter(),), pre_clip=(1e-3, 1e3))
    """

    sigma: float = 3.0
    mode: Mode = "zero"
    center: float | Callable[[PolicyBatch], Tensor] = 0.0
    metrics: Mapping[str, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode is zero or drop, not {self.mode!r}")

    @property
    def only_with(self) -> frozenset[str]:
        """The aggregations that it is exact with; all where there are none."""
        return frozenset({"seq-mean-token-mean"} if self.mode == "drop" else ())

    @property
    def needs(self) -> frozenset[str]:
        """What `center` reads, if it is the method of an estimator."""
        return getattr(getattr(self.center, "__self__", None), "needs", frozenset())

    def __call__(self, advantage: Tensor, batch: PolicyBatch) -> Tensor:
        self.metrics = advantage_health(advantage, batch, sigma=self.sigma)
        center = self.center(batch) if callable(self.center) else self.center
        filtered, is_kept = filter_advantages(advantage, sigma=self.sigma, center=center)
        if self.mode == "drop":
            if advantage.ndim == 1:
                raise ValueError(
                    "mode='drop' leaves out tokens, and here is one advantage a completion: use mode='zero'"
                )
            kept = (is_kept & batch.mask).sum(1, keepdim=True)
            filtered = filtered * batch.mask.sum(1, keepdim=True) / kept.clamp(min=1)
        return filtered


def advantage_health(advantage: Float[Tensor, "..."], batch: PolicyBatch, *, sigma: float = 3.0) -> dict[str, Tensor]:
    """What a 3-sigma filter would do to advantages before it, as numbers on the device.

    - `advantage/max_abs`: the largest |z|.
    - `advantage/filtered`: share of tokens beyond `sigma`.
    - `advantage/sign_balance`: of what is left, the rarer sign's share; 0 says that nothing pushes back any more.

    >>> told = advantage_health(objective.advantage(batch), batch)
    """
    by_token = per_token(advantage).expand(batch.mask.shape)
    by_token = by_token.masked_fill(~batch.mask, 0.0)
    left, is_kept = filter_advantages(by_token, sigma=sigma)
    up, down = (left > 0).sum(), (left < 0).sum()
    return {
        "advantage/max_abs": by_token.abs().amax(),
        "advantage/filtered": (~is_kept & batch.mask).sum() / batch.mask.sum().clamp(min=1),
        "advantage/sign_balance": torch.minimum(up, down) / (up + down).clamp(min=1),
    }


def failure_advantage(success: float) -> float:
    """−√(q/(1−q)): the normalized advantage of a failure where a share q succeeds; NaN where all or none do.

    >>> failure_advantage(0.9)
    -3.0000000000000004
    """
    return -math.sqrt(success / (1 - success)) if 0 < success < 1 else math.nan
