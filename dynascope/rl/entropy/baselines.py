"""What HAPO is compared with: other ways to let a token's or a completion's entropy decide (in 2509.16591)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dynascope.rl.advantages import Groups
from dynascope.rl.batch import PolicyBatch, per_token
from dynascope.rl.entropy.signal import EntropySignal
from dynascope.rl.objective import LossView


@dataclass(frozen=True, eq=False)
class ForkingTokens:
    """Learn from tokens above the pivot alone, a fifth of them with the usual signal (2506.01939), as an `adjust` slot.

    >>> dapo.having(adjust=(ForkingTokens(EntropySignal()),))
    """

    signal: EntropySignal
    needs: ClassVar[frozenset[str]] = EntropySignal.needs

    def __call__(self, advantage: Tensor, view: LossView) -> Float[Tensor, "N T"]:
        return advantage * (view.once(self.signal) > 0)


@dataclass(frozen=True)
class TopEntropy:
    """The same once a rollout, as a `post` slot: by the entropies of the policy that sampled.

    Raises ValueError unless 0 < share <= 1.

    >>> grpo.having(post=(TopEntropy(0.2),))
    """

    share: float = 0.2
    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must be above 0 and at most 1")

    def __call__(self, advantage: Tensor, batch: PolicyBatch) -> Float[Tensor, "N T"]:
        assert batch.entropy is not None
        # By rank: torch.quantile takes no more than 16 million elements.
        ordered = batch.entropy.masked_fill(~batch.mask, -torch.inf).flatten().sort(descending=True).values
        last = (self.share * batch.mask.sum()).round().long().clamp(min=1) - 1
        least = ordered.gather(0, last[None])
        return per_token(advantage) * ((batch.entropy >= least) & batch.mask)


@dataclass(frozen=True)
class EntropyAdvantage:
    """A + min(scale · entropy, |A| / most): uncertain tokens are encouraged, and no advantage changes its sign (2506.14758).

    As an `adjust` slot; the entropy is a constant. Raises ValueError for a scale below 0, or a `most` of 1 or less.

    >>> grpo.having(adjust=(EntropyAdvantage(),))
    """

    scale: float = 0.4
    most: float = 2.0
    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})

    def __post_init__(self) -> None:
        if self.scale < 0 or self.most <= 1:
            raise ValueError(f"scale={self.scale} must not be negative, and most={self.most} must be above 1")

    def __call__(self, advantage: Tensor, view: LossView) -> Float[Tensor, "N T"]:
        batch = view.batch
        assert batch.entropy is not None
        entropy = batch.entropy.detach().masked_fill(~batch.mask, 0.0)
        return advantage + torch.minimum(self.scale * entropy, advantage.abs() / self.most)


def uncertain_in_completion(
    entropy: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"], rho: float = 0.8
) -> Bool[Tensor, "N T"]:
    """Tokens whose entropy is above the rho-quantile (nearest rank) of their own completion.

    Raises ValueError for a rho outside [0, 1].

    >>> uncertain_in_completion(torch.tensor([[0.1, 0.2, 0.9]]), torch.ones(1, 3).bool(), 0.5)
    tensor([[False, False,  True]])
    """
    _check_level(rho)
    ordered = entropy.masked_fill(~mask, torch.inf).sort(1).values
    place = (rho * (mask.sum(1, keepdim=True) - 1).clamp(min=0)).round().long()
    return (entropy > ordered.gather(1, place)) & mask


def _check_level(rho: float) -> None:
    if not 0 <= rho <= 1:
        raise ValueError(f"rho={rho} must lie in [0, 1]")


@dataclass(frozen=True)
class DualTokenClip:
    """Archer's clip (2507.15778): a wide one for tokens that are uncertain within their completion, a narrow one for others.

    Raises ValueError for a rho outside [0, 1].

    >>> dapo.having(clip=DualTokenClip())
    """

    certain: float = 0.2
    uncertain: float = 0.5
    rho: float = 0.8
    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})

    def __post_init__(self) -> None:
        _check_level(self.rho)

    def __call__(self, view: LossView) -> tuple[Tensor, Tensor]:
        assert view.batch.entropy is not None
        is_uncertain = uncertain_in_completion(view.batch.entropy, view.batch.mask, self.rho)
        bound = torch.where(is_uncertain, self.uncertain, self.certain)
        return bound, bound


@dataclass(frozen=True)
class CertainTokens:
    """The other tokens, which Archer holds to the start model: `keep` of a KL term with `also_needs=frozenset({"entropy"})`.

    Raises ValueError for a rho outside [0, 1].

    >>> KLTerm("ref", "k3", 1e-3, keep=CertainTokens(), also_needs=frozenset({"entropy"}))
    """

    rho: float = 0.8

    def __post_init__(self) -> None:
        _check_level(self.rho)

    def __call__(self, batch: PolicyBatch) -> Bool[Tensor, "N T"]:
        assert batch.entropy is not None
        return batch.mask & ~uncertain_in_completion(batch.entropy.detach(), batch.mask, self.rho)


@dataclass(frozen=True)
class CompletionEntropy:
    """EDGE-GRPO's advantage (2507.21848): over a completion's mean entropy relative to its prompt's, as a `post` slot.

    Sure and right is praised more, sure and wrong is punished more. The relative entropy is at least `floor`, so that a
    completion without entropy does not carry the whole rollout. Its correction of wrong answers is not here.

    >>> grpo.having(post=(CompletionEntropy(),))
    """

    floor: float = 0.1
    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})

    def __post_init__(self) -> None:
        if self.floor <= 0:
            raise ValueError(f"floor={self.floor} must be above 0")

    def __call__(self, advantage: Tensor, batch: PolicyBatch) -> Tensor:
        assert batch.entropy is not None
        mean = (batch.entropy * batch.mask).sum(1) / batch.mask.sum(1).clamp(min=1)
        among = Groups.by(batch.group_ids).mean(mean)
        relative = (mean / among.where(among > 0, 1.0)).clamp(min=self.floor).where(among > 0, 1.0)
        return advantage / (relative if advantage.ndim == 1 else relative[:, None])
