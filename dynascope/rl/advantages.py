"""Advantage estimators: pure functions on rewards, and beside each the small slot that reads it out of a batch.

All-equal rewards give exactly 0. Where an estimator compares completions of one prompt, a completion that has no
other beside it has nothing to be compared with and gets 0; when that is so for all of them, it is an error.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dynascope.rl.advantage_filter import normalize_advantages
from dynascope.rl.batch import PolicyBatch

Std = Literal["population", "sample", "none"]


def group_z_score(
    rewards: Float[Tensor, " N"], group_ids: Int[Tensor, " N"], *, std: str = "sample", eps: float = 1e-4
) -> Float[Tensor, " N"]:
    """(reward − group mean) / (group standard deviation + eps), or only the difference with `std="none"`.

    Groups may differ in size and lie in any order. A reward that is not finite leaves its whole group without a finite advantage;
    `PolicyObjective.advantages` refuses it. Raises ValueError for another `std`, or when every group has size 1.
    Source: 2402.03300, section 4.1; without the division 2503.20783.

    >>> group_z_score(torch.tensor([1.0, 0, 0, 0]), torch.zeros(4, dtype=torch.long), std="population", eps=0)
    tensor([ 1.7321, -0.5774, -0.5774, -0.5774])
    """
    if std not in ("population", "sample", "none"):
        raise ValueError(f"std is population, sample or none, not {std!r}")
    groups = Groups.of(group_ids)
    away = rewards - groups.mean(rewards)
    if std != "none":
        squares = groups.sum(away.square())
        away = away / ((squares / (groups.sizes - int(std == "sample")).clamp(min=1)).sqrt() + eps)
    return away.masked_fill(groups.is_uniform(rewards), 0.0)


def leave_one_out(rewards: Float[Tensor, " N"], group_ids: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Reward less the mean reward of the group's other completions (2402.14740, section 3.2).

    A reward that is not finite leaves its whole group without a finite advantage; `PolicyObjective.advantages` refuses it. Raises
    ValueError when every group has size 1.

    >>> leave_one_out(torch.tensor([1.0, 0, 0]), torch.zeros(3, dtype=torch.long))
    tensor([ 1.0000, -0.5000, -0.5000])
    """
    groups = Groups.of(group_ids)
    others = (groups.sum(rewards) - rewards) / (groups.sizes - 1).clamp(min=1)
    return (rewards - others).masked_fill(groups.is_uniform(rewards), 0.0)


class NothingToCompareError(ValueError):
    """Every group has one completion, so there is no other to compare its reward with.

    >>> Groups.of(torch.tensor([7, 3]))
    """


@dataclass(frozen=True, eq=False)
class Groups:
    """Statistics over the completions of each prompt, handed back to every completion.

    >>> Groups.of(torch.tensor([7, 3, 7])).mean(torch.tensor([1.0, 2, 3]))
    tensor([2., 2., 2.])
    """

    index: Int[Tensor, " N"]
    num: int
    sizes: Float[Tensor, " N"]

    @staticmethod
    def by(group_ids: Int[Tensor, " N"]) -> "Groups":
        """Groups of any size, in the order of their numbers."""
        _, index, counts = group_ids.unique(return_inverse=True, return_counts=True)
        return Groups(index, len(counts), counts[index].float())

    @staticmethod
    def of(group_ids: Int[Tensor, " N"]) -> "Groups":
        """Groups to compare in. Raises NothingToCompareError, a ValueError, when no group has two completions."""
        groups = Groups.by(group_ids)
        if int(groups.sizes.max()) < 2:
            raise NothingToCompareError(
                "every group has size 1, so there is nothing to compare a reward with; sample 2 or more completions a "
                "prompt, or use an estimator without groups (reinforce_pp, ppo)"
            )
        return groups

    def totals(self, values: Float[Tensor, " N"]) -> Float[Tensor, " groups"]:
        """Sums, one a group."""
        return values.new_zeros(self.num).index_add(0, self.index, values)

    def sum(self, values: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """The group's sum."""
        return self.totals(values)[self.index]

    def mean(self, values: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """The group's mean."""
        return self.sum(values) / self.sizes

    def is_uniform(self, values: Float[Tensor, " N"]) -> Bool[Tensor, " N"]:
        """Whether the group's values are all the same, exactly; rounding in a mean would say otherwise."""
        lowest, highest = (
            values.new_zeros(self.num).scatter_reduce(0, self.index, values, reduce, include_self=False)
            for reduce in ("amin", "amax")
        )
        return (lowest == highest)[self.index]


def token_rewards(
    rewards: Float[Tensor, " N"], mask: Bool[Tensor, "N T"], penalty: Float[Tensor, "N T"] | None = None
) -> Float[Tensor, "N T"]:
    """The reward at each completion's last token, less a penalty at every token. Padding is 0.

    >>> token_rewards(torch.tensor([1.0]), torch.tensor([[True, True, False]]))
    tensor([[0., 1., 0.]])
    """
    places = torch.arange(mask.shape[1], device=mask.device)
    last = (places * mask).amax(1, keepdim=True)
    spread = (rewards[:, None] * (places == last)).masked_fill(~mask, 0.0)
    return spread if penalty is None else spread - penalty.masked_fill(~mask, 0.0)


def returns_to_go(
    rewards: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"], *, gamma: float = 1.0
) -> Float[Tensor, "N T"]:
    """Σ_{s≥t} γ^{s−t} r_s at every token; padding is 0.

    >>> returns_to_go(torch.tensor([[0.0, 0, 1]]), torch.ones(1, 3).bool(), gamma=0.5)
    tensor([[0.2500, 0.5000, 1.0000]])
    """
    rewards = rewards.masked_fill(~mask, 0.0)
    if gamma == 1.0:
        returns = rewards.flip(1).cumsum(1).flip(1)
    else:
        returns = _decayed_sum(rewards, gamma)
    return returns.masked_fill(~mask, 0.0)


def generalized_advantages(
    rewards: Float[Tensor, "N T"],
    values: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> Float[Tensor, "N T"]:
    """Σ_{s≥t} (γλ)^{s−t} (r_s + γ V_{s+1} − V_s), the value after the last token being 0 (1506.02438, eq. 16).

    Tokens must be contiguous from the left. λ = 1 is return less value; λ = 0 the one-step error.

    >>> generalized_advantages(torch.tensor([[0.0, 1]]), torch.tensor([[0.5, 0.5]]), torch.ones(1, 2).bool(), lam=0.0)
    tensor([[0.0000, 0.5000]])
    """
    values = values.masked_fill(~mask, 0.0)
    after = torch.cat([values[:, 1:], values.new_zeros(len(values), 1)], 1)
    errors = (rewards + gamma * after - values).masked_fill(~mask, 0.0)
    return _decayed_sum(errors, gamma * lam).masked_fill(~mask, 0.0)


def _decayed_sum(values: Float[Tensor, "N T"], decay: float) -> Float[Tensor, "N T"]:
    carried, sums = values.new_zeros(len(values)), []
    for column in reversed(values.unbind(1)):
        carried = column + decay * carried
        sums.append(carried)
    return torch.stack(sums[::-1], 1)


@dataclass(frozen=True)
class GroupZScore:
    """The advantage of GRPO, as a slot. TRL's defaults: the sample's deviation, and 1e-4 added to it.

    >>> dr_grpo = grpo.having(advantage=GroupZScore(std="none"), aggregation="max-length")
    """

    std: Std = "sample"
    eps: float = 1e-4
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: PolicyBatch) -> Float[Tensor, " N"]:
        return group_z_score(batch.rewards, batch.group_ids, std=self.std, eps=self.eps)


@dataclass(frozen=True)
class LeaveOneOut:
    """The advantage of RLOO, as a slot.

    >>> rloo = grpo.having(advantage=LeaveOneOut(), aggregation="seq-mean-token-sum")
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: PolicyBatch) -> Float[Tensor, " N"]:
        return leave_one_out(batch.rewards, batch.group_ids)


@dataclass(frozen=True)
class WhitenedReturns:
    """The advantage of REINFORCE++ (2501.03262): KL to the start model in the reward, return-to-go, global whitening.

    The penalty is `kl_coefficient` · (log π_behaviour − log π_ref) at every token; groups play no part. `token_rewards` of a
    batch, which have it already, stand in the place of both.

    >>> reinforce_pp = grpo.having(advantage=WhitenedReturns(kl_coefficient=1e-3))
    """

    kl_coefficient: float = 1e-3
    gamma: float = 1.0

    @property
    def needs(self) -> frozenset[str]:
        """The two log-probabilities of the penalty, if there is one."""
        return frozenset({"behaviour_log_probs", "ref_log_probs"} if self.kl_coefficient else ())

    def __call__(self, batch: PolicyBatch) -> Float[Tensor, "N T"]:
        rewards = penalised_rewards(batch, self.kl_coefficient)
        return normalize_advantages(returns_to_go(rewards, batch.mask, gamma=self.gamma), batch.mask)

    def raw_mean(self, batch: PolicyBatch) -> Float[Tensor, ""]:
        """The mean return over tokens before whitening, about which the authors of 2505.02835 filter.

        >>> AdvantageFilter(center=WhitenedReturns().raw_mean)
        """
        returns = returns_to_go(penalised_rewards(batch, self.kl_coefficient), batch.mask, gamma=self.gamma)
        return returns.sum() / batch.mask.sum().clamp(min=1)


@dataclass(frozen=True)
class GAE:
    """The advantage of PPO with a critic (1506.02438), whitened over the batch; KL in the reward as in REINFORCE++.

    >>> ppo = grpo.having(advantage=GAE(lam=0.95), aggregation="token-mean")
    """

    kl_coefficient: float = 1e-3
    gamma: float = 1.0
    lam: float = 0.95

    @property
    def needs(self) -> frozenset[str]:
        """The critic's values, and the log-probabilities of the penalty if there is one."""
        return frozenset({"values"}) | WhitenedReturns(self.kl_coefficient).needs

    def __call__(self, batch: PolicyBatch) -> Float[Tensor, "N T"]:
        assert batch.values is not None
        rewards = penalised_rewards(batch, self.kl_coefficient)
        advantage = generalized_advantages(rewards, batch.values, batch.mask, gamma=self.gamma, lam=self.lam)
        return normalize_advantages(advantage, batch.mask)


def penalised_rewards(batch: PolicyBatch, kl_coefficient: float) -> Float[Tensor, "N T"]:
    """Rewards by token with the k1 estimate of KL(behaviour ‖ ref) taken off, as REINFORCE++ and PPO for text have them.

    A batch's own `token_rewards` are given back as they are.

    >>> returns_to_go(penalised_rewards(batch, 1e-3), batch.mask)
    """
    if batch.token_rewards is not None:
        return batch.token_rewards.masked_fill(~batch.mask, 0.0)
    if not kl_coefficient:
        return token_rewards(batch.rewards, batch.mask)
    assert batch.behaviour_log_probs is not None
    assert batch.ref_log_probs is not None
    penalty = kl_coefficient * (batch.behaviour_log_probs - batch.ref_log_probs)
    return token_rewards(batch.rewards, batch.mask, penalty)


def center(advantage: Tensor, batch: PolicyBatch) -> Tensor:
    """A post-processor: less the mean over the rollout, so that as much is pushed up as down. One a completion, or a token.

    >>> preset("riskpo").having(post=(center,))
    """
    if advantage.ndim == 1:
        return advantage - advantage.mean()
    mean = (advantage * batch.mask).sum() / batch.mask.sum().clamp(min=1)
    return (advantage - mean) * batch.mask


def unit_rms(advantage: Tensor, batch: PolicyBatch) -> Tensor:
    """A post-processor: over its root mean square, so that objectives with other units take steps of like size.

    All zeros stay.

    >>> preset("riskpo").having(post=(unit_rms,))
    """
    squares = advantage.square() if advantage.ndim == 1 else advantage.square()[batch.mask]
    size = squares.mean().sqrt()
    return advantage / size.where(size > 0, 1.0)
