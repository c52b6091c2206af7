"""Slots that steer by the hidden reward of tokens (arXiv 2510.03669, 2505.18830), and the baselines without it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from dynascope.rl.advantages import Groups
from dynascope.rl.batch import PolicyBatch, per_token
from dynascope.rl.hidden_reward import (
    HiddenReward,
    Normalise,
    Vocabulary,
    Weighting,
    nthr_reweight,
    thr_reweight,
    token_hidden_reward,
)


@dataclass(frozen=True)
class _Measured:
    """What the two slots measure alike."""

    beta: float = 1.0
    vocabulary: Vocabulary = "full"
    normalise: Normalise = "none"
    threshold: float | None = None
    """Answers count as right by their reward above this; None goes by `anchors`."""
    anchors: Literal["correct", "advantage"] = "correct"
    """What makes an answer right: "correct"; or, for rewards that are not 0 or 1, "advantage": as much as max(A, 0)."""
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None and self.anchors == "advantage":
            raise ValueError("answers are right by threshold= or by anchors='advantage', not by both")

    @property
    def needs(self) -> frozenset[str]:
        """What the policy's own pass over the rollout gives."""
        goes_by_correct = self.threshold is None and self.anchors == "correct"
        return frozenset({"hidden", "unembedding", "tokens"} | ({"correct"} if goes_by_correct else set()))

    def right(self, batch: PolicyBatch, advantage: Tensor) -> Shaped[Tensor, " N"]:
        """How much each completion counts as one that is to become likelier; True or False where that is all."""
        if self.threshold is not None:
            return batch.rewards > self.threshold
        if self.anchors == "advantage":
            total = (per_token(advantage) * batch.mask).sum(1)
            return (total / batch.mask.sum(1).clamp(min=1)).clamp(min=0)
        assert batch.correct is not None
        return batch.correct

    def of(self, batch: PolicyBatch, advantage: Tensor, weighting: Weighting = "sign") -> HiddenReward:
        """The hidden rewards of a rollout; groups that are all right or all wrong are not worked out, and 0."""
        right = self.right(batch, advantage)
        rows = (~Groups.by(batch.group_ids).is_uniform((right > 0).float())).nonzero().flatten()
        zero = torch.zeros_like(batch.mask, dtype=torch.float32)
        lowest = torch.full_like(zero[:, 0], -torch.inf)
        if not len(rows):
            return HiddenReward(zero, zero, lowest, zero[:, 0])
        assert batch.hidden is not None
        assert batch.tokens is not None
        told = token_hidden_reward(
            batch.hidden[rows],
            batch.tokens[rows],
            batch.mask[rows],
            right[rows],
            batch.group_ids[rows],
            unembedding=batch.unembedding,
            temperature=batch.temperature,
            advantage=advantage[rows],
            weighting=weighting,
            vocabulary=self.vocabulary,
            normalise=self.normalise,
            beta=self.beta,
            chunk=self.chunk,
        )

        def put(whole: Tensor, part: Tensor) -> Tensor:
            return whole.to(part.dtype).index_put((rows,), part)

        return HiddenReward(
            put(zero, told.thr), put(zero, told.influence), put(lowest, told.tau), put(zero[:, 0], told.anchors)
        )


@dataclass(eq=False)
class HoldEntropy:
    """A tilt that holds the entropy: p = gain · (entropy − target), within ±`most`.

    Above the target it exploits, below it explores. The entropy is estimated from the sampled tokens, in nats; `last` is the
    p of the last rollout. Raises ValueError for a gain that is not positive, or a `most` outside (0, 1).

    >>> HiddenRewardSteering(p=HoldEntropy(target=0.3))
    """

    target: float
    gain: float = 5.0
    most: float = 0.5
    last: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if self.gain <= 0 or not 0 < self.most < 1:
            raise ValueError(f"gain={self.gain} must be above 0, and most={self.most} between 0 and 1")

    def of(self, batch: PolicyBatch) -> float:
        """p for a rollout."""
        assert batch.behaviour_log_probs is not None
        entropy = -float(batch.behaviour_log_probs[batch.mask].mean())
        self.last = max(-self.most, min(self.most, self.gain * (entropy - self.target)))
        return self.last


@dataclass(frozen=True)
class HiddenRewardSteering(_Measured):
    """Steer between exploitation (`p` above 0) and exploration (below 0) by the hidden reward of tokens, as a `post` slot.

    Worked out once a rollout from the policy that sampled. `p` is a number, a function of the training step, or adapts to the
    rollout (`HoldEntropy`, which is told as the metric `thr/p`). With p = 0 and nothing masked it needs nothing and changes
    nothing; `mask_small=True` with p = 0 trains on dominant tokens only.

    >>> grpo.having(post=(HiddenRewardSteering(p=-0.2),))
    """

    p: float | Callable[[int], float] | HoldEntropy = 0.2
    mask_small: bool = False
    weighting: Weighting = "sign"

    @property
    def needs(self) -> frozenset[str]:
        """Nothing where it does nothing."""
        if self.p == 0 and not self.mask_small:
            return frozenset()
        return super().needs | ({"behaviour_log_probs"} if isinstance(self.p, HoldEntropy) else frozenset())

    @property
    def metrics(self) -> Mapping[str, Tensor]:
        """An adaptive p."""
        return {"thr/p": torch.tensor(self.p.last)} if isinstance(self.p, HoldEntropy) else {}

    def __call__(self, advantage: Tensor, batch: PolicyBatch) -> Tensor:
        if isinstance(self.p, HoldEntropy):
            p = self.p.of(batch)
        else:
            p = self.p(batch.step) if callable(self.p) else self.p
        if p == 0 and not self.mask_small:
            return advantage
        told = self.of(batch, advantage, self.weighting)
        return thr_reweight(advantage, told.thr, p=p, tau=told.tau, mask_small=self.mask_small)


@dataclass(frozen=True)
class SharedTokenRelief(_Measured):
    """NTHR as a `post` slot: wrong answers are punished less for what they share with right ones (2505.18830).

    >>> grpo.having(post=(SharedTokenRelief(),))
    """

    def __call__(self, advantage: Tensor, batch: PolicyBatch) -> Tensor:
        right, told = self.right(batch, advantage) > 0, self.of(batch, advantage)
        tau = torch.where(told.is_mixed, told.tau, torch.inf)
        return nthr_reweight(advantage, told.influence, right, batch.group_ids, tau)


def positive_only(advantage: Tensor, batch: PolicyBatch) -> Tensor:
    """Learn from what was better than expected alone, as a `post` slot: NTHR's baseline.

    >>> grpo.having(post=(positive_only,))
    """
    return advantage.clamp(min=0)


@dataclass(frozen=True)
class RandomTokens:
    """Drop a share of tokens at random, others in every rollout, as a `post` slot: NTHR's other baseline.

    Raises ValueError for a share outside [0, 1).

    >>> grpo.having(post=(RandomTokens(0.2),))
    """

    share: float = 0.2
    seed: int = 0
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"share={self.share} must lie in [0, 1)")

    def __call__(self, advantage: Tensor, batch: PolicyBatch) -> Float[Tensor, "N T"]:
        # On the CPU, so that a seed means the same on every device.
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + batch.step)
        is_kept = torch.rand(batch.mask.shape, generator=generator).to(advantage.device) >= self.share
        return per_token(advantage) * (is_kept & batch.mask)
