"""The entropy of tokens as one signal between -1 and 1: 0 at the pivot, 1 at the most uncertain token (2509.16591, eq. 5-6)."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dynascope.rl.batch import PolicyBatch
from dynascope.rl.objective import LossView
from dynascope.rl.risk.ranks import gathered

Scope = Literal["minibatch", "rollout", "all ranks"]
_SMALLEST = 1e-8


@dataclass(frozen=True)
class EntropyStats:
    """Where tokens' log-entropies lie: what turns an entropy into a signal, 0-dimensional tensors on the device."""

    pivot: Float[Tensor, ""]
    """Their quantile."""
    spread: Float[Tensor, ""]
    """Their standard deviation."""
    above: Float[Tensor, ""]
    """From the pivot to the highest."""
    below: Float[Tensor, ""]
    """From the lowest to the pivot."""

    @staticmethod
    def of(
        entropy: Float[Tensor, "*shape"],
        mask: Bool[Tensor, "*shape"] | None = None,
        *,
        rho: float = 0.8,
        eps: float = 1e-8,
        robust: float = 0.0,
    ) -> "EntropyStats":
        """Of the entropies where the mask is True, without waiting for the device.

        The pivot is the rho-quantile (nearest rank) of log max(entropy, eps). `robust=0.01` takes the quantiles 0.01 and
        0.99 for the extremes, as a token without any entropy would else set the scale of all that lie below the pivot.

        Raises ValueError for a rho outside [0, 1], a `robust` outside [0, 0.5), or an eps that is not positive.

        >>> EntropyStats.of(torch.tensor([0.01, 0.1, 0.5, 1.0, 2.0])).pivot
        tensor(0.)
        """
        if not 0 <= rho <= 1 or not 0 <= robust < 0.5 or eps <= 0:
            raise ValueError(f"rho={rho} must lie in [0, 1], robust={robust} in [0, 0.5), and eps={eps} be positive")
        logs = entropy.detach().clamp(min=eps).log().flatten()
        counts = torch.ones_like(logs, dtype=torch.bool) if mask is None else mask.flatten()
        if not len(logs):
            zero = logs.sum()
            return EntropyStats(zero, zero, zero, zero)
        num = counts.sum()
        # Padding goes to the end; no token at all leaves every statistic 0.
        ordered = logs.masked_fill(~counts, torch.inf).sort().values

        def at(level: float) -> Tensor:
            place = (level * (num - 1).clamp(min=0)).round().long()
            # Indexing by a tensor would wait for the device.
            return ordered.gather(0, place[None])[0].masked_fill(num == 0, 0.0)

        pivot = at(rho)
        kept = logs.where(counts, 0.0)
        mean = kept.sum() / num.clamp(min=1)
        spread = ((kept - mean).square() * counts).sum() / num.clamp(min=1)
        return EntropyStats(pivot, spread.sqrt(), at(1 - robust) - pivot, pivot - at(robust))

    def signal(
        self, entropy: Float[Tensor, "*shape"], *, eps: float = 1e-8, is_signed: bool = True
    ) -> Float[Tensor, "*shape"]:
        """Entropies as a signal in [-1, 1]; all 0 where statistics have no width.

        `is_signed=False` gives what the released code works out, whose lower branch comes out positive.

        >>> EntropyStats.of(torch.tensor([0.01, 0.1, 0.5, 1.0, 2.0])).signal(torch.tensor([0.01, 0.1, 0.5, 1.0, 2.0]))
        tensor([-1.0000, -0.5000, -0.1505,  0.0000,  1.0000])
        """
        away = entropy.detach().clamp(min=eps).log() - self.pivot
        scaled = torch.where(away > 0, away / self.above.clamp(min=_SMALLEST), away / self.below.clamp(min=_SMALLEST))
        has_width = torch.where(away > 0, self.above, self.below) > _SMALLEST
        scaled = scaled.clamp(-1, 1).where(has_width, 0.0)
        return scaled if is_signed else scaled.abs()


@dataclass(eq=False)
class EntropySignal:
    """The signal of a minibatch's tokens, 0 at padding, for slots of the loss to share: `view.once(signal)`.

    Args:
        rho: Level of the pivot.
        eps: Least entropy that counts, in nats.
        robust: As in `EntropyStats.of`.
        is_signed: As in `EntropyStats.signal`.
        scope: Whose statistics: the "minibatch"'s own, by which results depend on its size; the whole "rollout"'s, for
            which the signal also has to be in the objective's `post`; or those of the minibatches of "all ranks".

    Raises ValueError for another scope, and where the rollout has not been seen.

    >>> objective = dapo.having(clip=AdaptiveClip(EntropySignal()))
    """

    rho: float = 0.8
    eps: float = 1e-8
    robust: float = 0.0
    is_signed: bool = True
    scope: str = "minibatch"
    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})
    _stats: EntropyStats | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.scope not in get_args(Scope):
            raise ValueError(f"scope is {', '.join(get_args(Scope))}, not {self.scope!r}")

    @property
    def post(self) -> tuple["SeenInRollout", ...]:
        """What has to be in the objective's `post`: empty unless the scope is the rollout."""
        return (SeenInRollout(self),) if self.scope == "rollout" else ()

    def statistics(self, entropy: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> EntropyStats:
        """Those of these tokens, or of the tokens of all ranks."""
        if self.scope == "all ranks":
            return EntropyStats.of(gathered(entropy[mask].detach()), rho=self.rho, eps=self.eps, robust=self.robust)
        return EntropyStats.of(entropy, mask, rho=self.rho, eps=self.eps, robust=self.robust)

    def remember(self, batch: PolicyBatch) -> None:
        """Take a rollout's statistics, for its minibatches."""
        assert batch.entropy is not None
        self._stats = self.statistics(batch.entropy, batch.mask)

    def __call__(self, view: LossView) -> Float[Tensor, "N T"]:
        assert view.batch.entropy is not None
        entropy, mask = view.batch.entropy.detach(), view.batch.mask
        stats = self._stats if self.scope == "rollout" else self.statistics(entropy, mask)
        if stats is None:
            raise ValueError("scope='rollout' has seen no rollout: put signal.post into the objective's post")
        signal = stats.signal(entropy, eps=self.eps, is_signed=self.is_signed)
        view.tell("signal/pivot_entropy", stats.pivot.exp())
        return signal.masked_fill(~mask, 0.0)


@dataclass(frozen=True, eq=False)
class SeenInRollout:
    """A post-processor that changes nothing and shows a rollout to a signal."""

    signal: EntropySignal
    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})

    def __call__(self, advantage: Tensor, batch: PolicyBatch) -> Tensor:
        self.signal.remember(batch)
        return advantage
