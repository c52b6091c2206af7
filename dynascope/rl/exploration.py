"""Baselines that keep a policy exploring: the advantage of Pass@K, and a pull on the tokens that cost most entropy."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dynascope.rl.advantages import Groups, GroupZScore
from dynascope.rl.batch import PolicyBatch, per_token
from dynascope.rl.objective import Advantage
from dynascope.rl.reasoning.pass_at_k import pass_at_k


def pass_at_k_advantage(correct: Bool[Tensor, " N"], group_ids: Int[Tensor, " N"], k: int = 4) -> Float[Tensor, " N"]:
    """What Pass@k asks of each answer, with every set of k of the prompt's n answers rewarded where one of them is right.

    With f the share of sets without a right answer and c right ones, √(f / (1 − f)) for a right answer and −c / (n − c) of
    that for a wrong one: the sum over a prompt is 0, and so is every advantage where no set fails or all do. k = 1 is the group's
    z-score with the population's deviation. Source: the analytical form of 2508.10751, simplified.

    Raises ValueError when a prompt has fewer than k answers.

    >>> pass_at_k_advantage(torch.tensor([True, False, False, False]), torch.zeros(4).long(), k=2)
    tensor([ 1.0000, -0.3333, -0.3333, -0.3333])
    """
    groups = Groups.by(group_ids)
    right = groups.sum(correct.float())
    fails = 1 - pass_at_k(groups.sizes.long(), right.long(), k).to(right)
    size = (fails / (1 - fails)).sqrt()
    advantage = torch.where(correct, size, -size * right / (groups.sizes - right))
    return advantage.masked_fill((fails == 0) | (fails == 1), 0.0)


@dataclass(frozen=True)
class PassAtKMixed:
    """weight · the advantage of Pass@k + (1 − weight) · another estimator's, as a slot: a baseline of 2510.03669.

    >>> grpo.having(advantage=PassAtKMixed(k=4, weight=0.5))
    """

    k: int = 4
    weight: float = 0.5
    estimator: Advantage = field(default_factory=lambda: GroupZScore(std="population"))

    @property
    def needs(self) -> frozenset[str]:
        """Which answers are right, and what the other estimator needs."""
        own: frozenset[str] = getattr(self.estimator, "needs", frozenset())
        return own | {"correct"}

    def __call__(self, batch: PolicyBatch) -> Tensor:
        assert batch.correct is not None
        plain = self.estimator(batch)
        at_k = pass_at_k_advantage(batch.correct, batch.group_ids, self.k)
        return self.weight * (at_k if plain.ndim == 1 else at_k[:, None] * batch.mask) + (1 - self.weight) * plain


@dataclass(frozen=True)
class TopCovariance:
    """The share of tokens whose (log π − mean) · (A − mean) is largest, which cost most entropy: `keep` of a KL term.

    At least one token, and all that tie with the last. KL-Cov (2505.22617) pulls these alone back to the policy
    that sampled, and clips nothing.

    >>> KLTerm("behaviour", "abs", 1.0, keep=TopCovariance(2e-3))
    """

    share: float = 2e-3

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must be above 0 and at most 1")

    @torch.no_grad()
    def __call__(self, batch: PolicyBatch) -> Bool[Tensor, "N T"]:
        assert batch.log_probs is not None
        assert batch.advantage is not None
        mask, advantage = batch.mask, batch.advantage
        count = mask.sum()
        by_token = per_token(advantage).expand(mask.shape)

        def away(values: Tensor) -> Tensor:
            return values - (values.where(mask, 0.0).sum() / count.clamp(min=1))

        covariance = (away(batch.log_probs) * away(by_token)).masked_fill(~mask, -torch.inf)
        ranked = covariance.flatten().sort(descending=True).values
        place = (self.share * count).long().clamp(min=1) - 1
        # Indexing by a tensor would wait for the device.
        return (covariance >= ranked.gather(0, place[None])) & mask
