r"""Estimates of a KL divergence from the log-probabilities of sampled tokens, and the term that they make in a loss.

With R = log π_ref − log π at tokens sampled from π, autograd sees only the estimate, not the sampling, so what an
estimate is worth as a *value* and as a *loss* are two things (derived by differentiating under the expectation):

| kind | value | mean value    | mean gradient as a loss                                        |
|------|-------|---------------|----------------------------------------------------------------|
| k1   | −R    | KL(π ‖ ref)   | 0: it trains nothing. As a detached reward, R is the right one |
| k2   | R²/2  | biased        | that of KL(π ‖ ref), exactly                                   |
| k3   | eᴿ−R−1| KL(π ‖ ref)   | that of KL(ref ‖ π), the forward one, with heavy-tailed weights |
| abs  | \|R\| | biased        | that of Σ \|π − ref\|, twice the total variation                |
| full |       | KL(π ‖ ref)   | that of KL(π ‖ ref), without sampling noise                    |

Where the tokens are of an older policy μ, the ratio ρ = π/μ brings the estimate's mean back to π. As a constant it leaves the
last column as it is. With its gradient it adds E_π[estimate · ∇log π], which takes k1 and k3 to E_π[−R ∇log π], the gradient of
KL(π ‖ ref), but k2, which is there already, away from it by E_π[R²/2 ∇log π]. So ρ has its gradient for k1 and k3 alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dynascope.rl.batch import PolicyBatch, per_token

Kind = Literal["k1", "k2", "k3", "abs", "full"]


def kl_estimate(
    log_probs: Float[Tensor, "*N"],
    ref_log_probs: Float[Tensor, "*N"],
    kind: str = "k3",
    *,
    logits: Float[Tensor, "*N vocabulary"] | None = None,
    ref_logits: Float[Tensor, "*N ref_vocabulary"] | None = None,
    top: int | None = None,
    clamp: float | None = None,
    clamp_value: float | None = None,
    as_reward: bool = False,
) -> Float[Tensor, "*N"]:
    """KL(π ‖ π_ref) at every token, in nats; `ref_log_probs` and `ref_logits` are taken as constants.

    "full" is the closed form over the vocabulary and needs both logits; the others need the sampled tokens only. `top` sums
    over the policy's likeliest tokens alone, which is no divergence any more: it can be negative, and pushes the policy to
    tokens outside (2506.02208 found it unstable). Beyond
    |R| = `clamp` an estimate goes on as its tangent there, so that its gradient is bounded yet never 0; `clamp_value` holds the
    estimate itself between ± that, beyond which it has no gradient (2503.18892's program, verl's). `as_reward`
    detaches the result. The module's table says which kind is for what; k1 to k3 are Schulman's (2020).

    Raises ValueError for another kind, "full" without logits or with two vocabularies, a `top` below 1 or without "full", or
    a `clamp` or `clamp_value` that is not positive.

    >>> kl_estimate(torch.tensor([-1.0]), torch.tensor([-2.0]), "k2")
    tensor([0.5000])
    """
    if (clamp is not None and clamp <= 0) or (clamp_value is not None and clamp_value <= 0):
        raise ValueError(f"clamp={clamp} and clamp_value={clamp_value} must be positive")
    if top is not None and (top < 1 or kind != "full"):
        raise ValueError(f"top={top} must be at least 1, and is for kind='full'")
    if kind == "full":
        if logits is None or ref_logits is None:
            raise ValueError("kind='full' sums over the vocabulary and needs logits and ref_logits")
        if logits.shape != ref_logits.shape:
            raise ValueError(
                f"logits have shape {tuple(logits.shape)} and ref_logits {tuple(ref_logits.shape)}: they must be of one "
                "vocabulary; cut what pads the larger table"
            )
        own, other = logits.float().log_softmax(-1), ref_logits.detach().float().log_softmax(-1)
        if top is not None:
            likeliest = own.topk(min(top, own.shape[-1]), -1).indices
            own, other = own.gather(-1, likeliest), other.gather(-1, likeliest)
        # A token that the policy never draws adds nothing: 0 · log 0 is 0.
        estimate = (own.exp() * (own - other).masked_fill(own == -torch.inf, 0.0)).sum(-1)
        return _finished(estimate, clamp_value, as_reward)
    gap = ref_log_probs.detach().float() - log_probs.float()
    near = gap if clamp is None else gap.clamp(-clamp, clamp)
    if clamp_value is not None:
        near = near.clamp(max=_LARGEST)
    if kind == "k1":
        estimate, slope = -near, -torch.ones_like(near)
    elif kind == "k2":
        estimate, slope = near.square() / 2, near
    elif kind == "k3":
        estimate, slope = near.exp() - near - 1, near.exp() - 1
    elif kind == "abs":
        estimate, slope = near.abs(), near.sign()
    else:
        raise ValueError(f"kind is k1, k2, k3, abs or full, not {kind!r}")
    if clamp is not None:
        estimate = estimate + slope.detach() * (gap - near)
    return _finished(estimate, clamp_value, as_reward)


_LARGEST = 80.0
"""Nats whose exponential float32 holds: an infinite one would have NaN for a gradient although it is clamped."""


def _finished(estimate: Tensor, clamp_value: float | None, as_reward: bool) -> Tensor:
    estimate = estimate if clamp_value is None else estimate.clamp(-clamp_value, clamp_value)
    return estimate.detach() if as_reward else estimate


@dataclass(frozen=True)
class KLTerm:
    """Coefficient · KL(π ‖ start model, teacher, or the policy that sampled), as a term of the loss.

    `coefficient` is a number or a function of the training step. `keep` says how much each completion (N,) or token
    (N, T) of a batch counts, from 0 to 1; with `norm="all"` fewer kept ones make a weaker term, with "kept" the term is
    the mean over what is kept. `is_ratio_weighted` multiplies by the current ratio, which corrects for a policy that has moved
    since it sampled; as the module says, k1 and k3 have the gradient of KL(π ‖ other) then.

    Raises ValueError for "full" against the policy that sampled, whose logits nobody keeps.

    >>> grpo.having(kl=(KLTerm("teacher", "k2", 5e-3, keep=lambda batch: ~batch.correct),))
    """

    against: Literal["ref", "teacher", "behaviour"] = "ref"
    kind: Kind = "k3"
    coefficient: float | Callable[[int], float] = 1e-3
    clamp: float | None = None
    keep: Callable[[PolicyBatch], Tensor] | None = None
    norm: Literal["all", "kept"] = "all"
    is_ratio_weighted: bool = False
    also_needs: frozenset[str] = frozenset()
    """What `keep` reads of the batch beyond rewards and mask."""
    top: int | None = None
    """Of "full", as in `kl_estimate`."""
    clamp_value: float | None = None
    """Of the estimate, likewise."""

    def __post_init__(self) -> None:
        if self.kind == "full" and self.against == "behaviour":
            raise ValueError("kind='full' needs the other's logits, and those of the policy that sampled are not kept")

    @property
    def needs(self) -> frozenset[str]:
        """The other model's log-probabilities, or both models' logits."""
        own = {"logits", f"{self.against}_logits"} if self.kind == "full" else {f"{self.against}_log_probs"}
        return self.also_needs | own

    @property
    def is_score_weighted(self) -> bool:
        """Whether the ratio of `is_ratio_weighted` carries its gradient."""
        return self.kind in ("k1", "k3")

    def weight(self, step: int) -> float:
        """The coefficient at a step."""
        return self.coefficient(step) if callable(self.coefficient) else self.coefficient

    def by_token(self, batch: PolicyBatch) -> Float[Tensor, "N T"]:
        """The estimate at every token of a batch; padding is 0, without a gradient."""
        assert batch.log_probs is not None
        other = getattr(batch, f"{self.against}_log_probs")
        own = batch.log_probs.masked_fill(~batch.mask, 0.0)
        other = own.detach() if other is None else other.masked_fill(~batch.mask, 0.0)
        estimate = kl_estimate(
            own,
            other,
            self.kind,
            logits=batch.logits,
            ref_logits=getattr(batch, f"{self.against}_logits", None),
            top=self.top,
            clamp=self.clamp,
            clamp_value=self.clamp_value,
        )
        return estimate.masked_fill(~batch.mask, 0.0)

    def kept(self, batch: PolicyBatch) -> Float[Tensor, "N _"] | None:
        """What `keep` says, to go with (N, T)."""
        if self.keep is None:
            return None
        kept = self.keep(batch).float()
        return per_token(kept)
