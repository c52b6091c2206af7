"""Distillation from a teacher on the policy's own samples, beside rewards or instead of them (KDRL, arXiv 2506.02208).

With R = log π_teacher − log π at the sampled tokens, the k2 term β·R²/2 has the gradient of β·KL(π ‖ teacher), token by token.
It enters in one of three ways:

| integration | slot                                     | what it is                                                     |
|-------------|------------------------------------------|----------------------------------------------------------------|
| joint       | `kl=(KLTerm("teacher", "k2", β),)`       | the paper's: a term of its own, with its own mask and clamp    |
| advantage   | `adjust=(TeacherAdvantage(β),)`          | A + β·R: the same gradient at ratio 1, else weighed and clipped |
| reward      | `advantage=TeacherReward(β)`             | β·ΣR in the reward, before groups are compared                 |

A term of kind k1 trains nothing, and one of kind k3 goes towards KL(teacher ‖ π): see the table in `rl/kl.py`. A sharp
teacher far from the policy gives R of −10 to −20, and k2 weighs tokens by it: `clamp=2` bounds that weight. Who the teacher is
and what it says is in `rl/teachers.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dynascope.rl.advantages import Groups, GroupZScore, returns_to_go
from dynascope.rl.aggregation import aggregate
from dynascope.rl.batch import PolicyBatch, per_token
from dynascope.rl.kl import kl_estimate
from dynascope.rl.objective import Advantage, LossView

Credit = Literal["immediate", "return_to_go"]


@dataclass(frozen=True)
class LinearAnneal:
    """max(start − rate · step, floor): a coefficient that any slot with a schedule takes.

    By default the paper's, which is at the floor from step 80. It has no state but the step that it is asked for.
    Raises ValueError for a negative rate, or a floor above the start.

    >>> LinearAnneal(5e-3, 1e-3, 5e-5)(40)
    0.003
    """

    start: float = 5e-3
    floor: float = 1e-3
    rate: float = 5e-5

    def __post_init__(self) -> None:
        if self.rate < 0 or self.floor > self.start:
            raise ValueError(f"rate={self.rate} must not be negative, nor floor={self.floor} above start={self.start}")

    def __call__(self, step: int) -> float:
        return max(self.start - self.rate * step, self.floor)

    @staticmethod
    def over(start: float, floor: float, horizon: int) -> "LinearAnneal":
        """At the floor from the step `horizon`. Raises ValueError for a horizon below 1.

        >>> LinearAnneal.over(0.1, 0.01, 40)(20)
        0.055
        """
        if horizon < 1:
            raise ValueError(
                f"horizon={horizon} must be at least 1 step; a coefficient that never moves is a plain number"
            )
        return LinearAnneal(start, floor, (start - floor) / horizon)


def kd_mask(correct: Bool[Tensor, " N"], group_ids: Int[Tensor, " N"], mode: str = "none") -> Bool[Tensor, " N"]:
    """Which completions are distilled: all ("none"), wrong ones ("response"), those of prompts without a right one ("group").

    It goes by correctness, whatever the reward. Source: 2506.02208, section 3.4. Raises ValueError for another mode.

    >>> kd_mask(torch.tensor([True, False, False, False]), torch.tensor([0, 0, 1, 1]), "group")
    tensor([False, False,  True,  True])
    """
    if mode == "none":
        return torch.ones_like(correct)
    if mode == "response":
        return ~correct
    if mode == "group":
        return ~solved(correct, group_ids)
    raise ValueError(f"mode is none, response or group, not {mode!r}")


def solved(correct: Bool[Tensor, " N"], group_ids: Int[Tensor, " N"]) -> Bool[Tensor, " N"]:
    """Whether a completion's prompt has a right one.

    >>> solved(torch.tensor([True, False, False]), torch.tensor([0, 0, 1]))
    tensor([ True,  True, False])
    """
    return Groups.by(group_ids).sum(correct.float()) > 0


def wrong_answers(batch: PolicyBatch) -> Bool[Tensor, " N"]:
    """Mask "response" as the `keep` of a KL term, which says `also_needs=frozenset({"correct"})`.

    >>> KLTerm("teacher", "k2", 5e-3, keep=wrong_answers, also_needs=frozenset({"correct"}))
    """
    assert batch.correct is not None
    return ~batch.correct


def unsolved_prompts(batch: PolicyBatch) -> Bool[Tensor, " N"]:
    """Mask "group" likewise, with `also_needs=frozenset({"is_solved"})`: minibatches part the completions of a prompt.

    >>> KLTerm("teacher", "k2", 5e-3, keep=unsolved_prompts, also_needs=frozenset({"is_solved"}))
    """
    assert batch.is_solved is not None
    return ~batch.is_solved


def kd_rkl_loss(
    log_probs: Float[Tensor, "N T"],
    teacher_log_probs: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    estimator: str = "k2",
    keep: Bool[Tensor, " N"] | None = None,
    mask_norm: str = "all",
    is_ratio: Float[Tensor, "N T"] | None = None,
    credit: str = "immediate",
    gamma: float = 1.0,
    clamp: float | None = None,
    num_tokens: int | Tensor | None = None,
) -> Float[Tensor, ""]:
    """Distillation alone as a plain function: the token mean of an estimate of KL(π ‖ teacher) on the policy's own samples.

    Args:
        keep: Completions that are distilled, as from `kd_mask`; none gives 0.
        mask_norm: Mean over "all" tokens (fewer kept ones weaken it) or over the "kept" ones.
        is_ratio: π / π_behaviour where the policy has moved since it sampled; taken as a constant.
        credit: "immediate" is the gradient of each token's own divergence; "return_to_go" also credits a token with what
            the teacher thinks of the tokens behind it, discounted by `gamma`: the divergence of whole completions. That
            is a policy gradient, whose value means nothing, and for k2 alone.
        clamp: Of |R|.
        num_tokens: What is divided by, where these completions are a part of an optimizer step: all its tokens, or with
            `mask_norm="kept"` those of them that are kept.

    Raises ValueError for an unknown setting, or "return_to_go" with another estimator than k2.

    >>> kd_rkl_loss(log_probs, teacher_log_probs, mask, keep=kd_mask(correct, group_ids, "response"))
    """
    if mask_norm not in ("all", "kept"):
        raise ValueError(f"mask_norm is all or kept, not {mask_norm!r}")
    own, other = log_probs.masked_fill(~mask, 0.0), teacher_log_probs.masked_fill(~mask, 0.0)
    if credit == "immediate":
        by_token = kl_estimate(own, other, estimator, clamp=clamp)
    else:
        _check_credit(credit)
        if estimator != "k2":
            raise ValueError("credit='return_to_go' is a policy gradient of R, which is k2's: leave estimator='k2'")
        by_token = -teacher_credit(own.detach(), other, mask, credit=credit, gamma=gamma, clamp=clamp) * own
    if is_ratio is not None:
        by_token = by_token * is_ratio.detach()
    kept = mask if keep is None else mask & keep[:, None]
    if num_tokens is None:
        num_tokens = (kept if mask_norm == "kept" else mask).sum()
    return aggregate(by_token, kept, "token-mean", num_tokens=num_tokens)


def teacher_credit(
    log_probs: Float[Tensor, "N T"],
    teacher_log_probs: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    credit: str = "immediate",
    gamma: float = 1.0,
    clamp: float | None = None,
) -> Float[Tensor, "N T"]:
    """R at every token, or the sum of it and what comes behind; without a gradient, and 0 at padding.

    Raises ValueError for another `credit`.

    >>> advantage + 0.005 * teacher_credit(log_probs, teacher_log_probs, mask)
    """
    _check_credit(credit)
    gap = (teacher_log_probs.float() - log_probs.float()).detach().masked_fill(~mask, 0.0)
    gap = gap if clamp is None else gap.clamp(-clamp, clamp)
    return gap if credit == "immediate" else returns_to_go(gap, mask, gamma=gamma)


def _check_credit(credit: str) -> None:
    if credit not in get_args(Credit):
        raise ValueError(f"credit is immediate or return_to_go, not {credit!r}")


@dataclass(frozen=True)
class TeacherAdvantage:
    """A + β·R in every minibatch, as an `adjust` slot: integration "advantage". `keep` is of completions (N,) or tokens (N, T).

    Raises ValueError for another `credit`.

    >>> grpo.having(adjust=(TeacherAdvantage(5e-3),))
    """

    coefficient: float | Callable[[int], float] = 2e-3
    clamp: float | None = None
    credit: str = "immediate"
    gamma: float = 1.0
    keep: Callable[[PolicyBatch], Tensor] | None = None
    also_needs: frozenset[str] = frozenset()
    """What `keep` reads."""

    def __post_init__(self) -> None:
        _check_credit(self.credit)

    @property
    def needs(self) -> frozenset[str]:
        """The teacher."""
        return self.also_needs | {"teacher_log_probs"}

    def __call__(self, advantage: Tensor, view: LossView) -> Float[Tensor, "N T"]:
        batch = view.batch
        assert batch.log_probs is not None
        assert batch.teacher_log_probs is not None
        beta = self.coefficient(batch.step) if callable(self.coefficient) else self.coefficient
        added = beta * teacher_credit(
            batch.log_probs,
            batch.teacher_log_probs,
            batch.mask,
            credit=self.credit,
            gamma=self.gamma,
            clamp=self.clamp,
        )
        return advantage + (added if self.keep is None else added * per_token(self.keep(batch).float()))


@dataclass(frozen=True)
class TeacherReward:
    """Reward + β·(sum or mean of R over the completion's tokens), then any estimator: integration "reward".

    A group of equal rewards is no longer one, so prompts without a right answer teach something here too.

    >>> grpo.having(advantage=TeacherReward(1e-3))
    """

    coefficient: float | Callable[[int], float] = 2e-3
    over: Literal["sum", "mean"] = "sum"
    clamp: float | None = None
    estimator: Advantage = field(default_factory=GroupZScore)

    @property
    def needs(self) -> frozenset[str]:
        """The teacher, and the policy as it sampled."""
        own: frozenset[str] = getattr(self.estimator, "needs", frozenset())
        return own | {"behaviour_log_probs", "teacher_log_probs"}

    def __call__(self, batch: PolicyBatch) -> Tensor:
        assert batch.behaviour_log_probs is not None
        assert batch.teacher_log_probs is not None
        beta = self.coefficient(batch.step) if callable(self.coefficient) else self.coefficient
        gap = teacher_credit(batch.behaviour_log_probs, batch.teacher_log_probs, batch.mask, clamp=self.clamp).sum(1)
        gap = gap if self.over == "sum" else gap / batch.mask.sum(1).clamp(min=1)
        return self.estimator(batch.having(rewards=batch.rewards + beta * gap))
