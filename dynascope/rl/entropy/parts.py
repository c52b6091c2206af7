"""HAPO's parts, each usable alone: what a token's entropy decides at every stage (2509.16591).

A. `AdaptiveTemperature`: uncertain tokens are drawn hotter.
B. `TokenGroupZScore`: rewards are compared token by token, so that long wrong answers do not outweigh the rest.
C. `Redistribution`: certain tokens that stay where they are count less, uncertain ones that move count more.
D. `AdaptiveClip`: certain tokens may fall further, uncertain ones rise further.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dynascope.rl.advantages import Groups, group_z_score
from dynascope.rl.batch import PolicyBatch, per_token
from dynascope.rl.entropy.signal import EntropySignal, EntropyStats
from dynascope.rl.objective import Bound, LossView, PolicyObjective
from dynascope.rl.token_entropy import token_entropy


def adaptive_temperature(
    entropy: Float[Tensor, "*shape"],
    stats: EntropyStats,
    *,
    tau: float = 0.05,
    base: float = 1.0,
    is_bounded: bool = True,
) -> Float[Tensor, "*shape"]:
    """base · (1 + tau · signal), so between base (1 − tau) and base (1 + tau); the likeliest token stays the likeliest.

    Unbounded it is base · (1 + tau (log entropy − pivot) / spread), the paper's equation 8, with tau = 0.1 there; held at
    a tenth of the base, since a token without entropy would get a negative temperature. Raises ValueError unless
    0 <= tau < 1 and base > 0.

    >>> adaptive_temperature(torch.tensor([2.0]), EntropyStats.of(torch.tensor([0.1, 1.0, 2.0])))
    tensor([1.0500])
    """
    if not 0 <= tau < 1 or base <= 0:
        raise ValueError(f"tau={tau} must lie in [0, 1), and base={base} be above 0")
    if is_bounded:
        return base * (1 + tau * stats.signal(entropy))
    away = (entropy.clamp(min=1e-8).log() - stats.pivot) / stats.spread.clamp(min=1e-8)
    return (base * (1 + tau * away)).clamp(min=0.1 * base)


class AdaptiveTemperature:
    """Part A, as a logits processor: Hugging Face's `generate(logits_processor=[...])`, or `sample(process=...)` here.

    Entropies are of the distribution it is given, and the statistics are the previous rollout's, which it has seen itself:
    a call that is not one token longer than the last, or has more rows, begins a new rollout (fewer rows are those that
    have not ended). The first rollout is at the base temperature. Sampling is slightly off-policy by design, since
    log-probabilities of the loss are at temperature 1; `SamplingCorrection` weighs that out.

    Args:
        ends: Numbers of the stop and padding tokens: a row whose last token is one of them is finished and counts for nothing.
        tau, base, is_bounded: As in `adaptive_temperature`.
        rho: Level of the pivot.
        robust: As in `EntropyStats.of`.

    Raises ValueError as `adaptive_temperature` does.

    >>> model.generate(ids, do_sample=True, logits_processor=[AdaptiveTemperature(ends={tokenizer.eos_token_id})])
    """

    def __init__(
        self,
        ends: Collection[int] = (),
        *,
        tau: float = 0.05,
        base: float = 1.0,
        is_bounded: bool = True,
        rho: float = 0.8,
        robust: float = 0.0,
    ) -> None:
        if not 0 <= tau < 1 or base <= 0:
            raise ValueError(f"tau={tau} must lie in [0, 1), and base={base} be above 0")
        self.ends, self.tau, self.base, self.is_bounded = tuple(ends), tau, base, is_bounded
        self.rho, self.robust = rho, robust
        self.stats: EntropyStats | None = None
        """Of the rollout before this one."""
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._shape: tuple[int, int] | None = None

    @torch.no_grad()
    def __call__(self, tokens: Int[Tensor, "N L"], scores: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """Scores over each row's temperature."""
        num, length = tokens.shape
        if self._shape is not None and not (num <= self._shape[0] and length == self._shape[1] + 1):
            self._turn()
        self._shape = num, length
        entropy = token_entropy(scores[:, None])[:, 0]
        is_finished = torch.zeros_like(tokens[:, -1], dtype=torch.bool)
        for end in self.ends:
            is_finished |= tokens[:, -1] == end
        self._seen.append((entropy, ~is_finished))
        if self.stats is None:
            return scores / self.base
        temperature = adaptive_temperature(
            entropy, self.stats, tau=self.tau, base=self.base, is_bounded=self.is_bounded
        )
        return scores / temperature[:, None].to(scores.dtype)

    def _turn(self) -> None:
        entropy, counts = (torch.cat(one) for one in zip(*self._seen, strict=True))
        self.stats = EntropyStats.of(entropy, counts, rho=self.rho, eps=1e-6, robust=self.robust)
        self._seen = []


@dataclass(frozen=True)
class SamplingCorrection:
    """A post-processor: each token's advantage times π_behaviour / (what was drawn from), at most `cap`.

    It weighs out a sampler that changed the distribution. Raises ValueError for a cap below 1.

    >>> hapo.having(post=(SamplingCorrection(),))
    """

    cap: float = 2.0
    needs: ClassVar[frozenset[str]] = frozenset({"behaviour_log_probs", "sampling_log_probs"})

    def __post_init__(self) -> None:
        if self.cap < 1:
            raise ValueError(f"cap={self.cap} must be at least 1")

    def __call__(self, advantage: Tensor, batch: PolicyBatch) -> Float[Tensor, "N T"]:
        assert batch.behaviour_log_probs is not None
        assert batch.sampling_log_probs is not None
        drift = (batch.behaviour_log_probs - batch.sampling_log_probs).masked_fill(~batch.mask, 0.0)
        by_token = per_token(advantage)
        return by_token * drift.exp().clamp(max=self.cap)


def token_group_advantage(
    rewards: Float[Tensor, " N"],
    mask: Bool[Tensor, "N T"],
    group_ids: Int[Tensor, " N"],
    *,
    eps: float = 1e-6,
    fallback: float | None = 5.0,
) -> Float[Tensor, " N"]:
    """Part B: (reward − mean) / (deviation + eps) where every *token* of the prompt's completions counts once (eq. 9).

    So the advantages of a group's tokens sum to 0, and with a token mean right and wrong answers weigh the same, however
    long. With equal lengths it is GRPO with the population's deviation. Where an advantage would reach `fallback` in
    size, the whole group has GRPO's (the sample's deviation, by completions), as in the released code; None never. Equal
    rewards give exactly 0, and so does a completion without tokens. Raises ValueError when no group has two completions, or
    for a fallback that is not positive.

    >>> lengths = torch.tensor([2, 6])
    >>> token_group_advantage(torch.tensor([1.0, 0]), torch.arange(6) < lengths[:, None], torch.zeros(2, dtype=torch.long))
    tensor([ 1.7320, -0.5773])
    """
    return _token_group_advantage(rewards, mask, group_ids, eps, fallback)[0]


def _token_group_advantage(
    rewards: Tensor, mask: Tensor, group_ids: Tensor, eps: float, fallback: float | None
) -> tuple[Tensor, Tensor]:
    """The advantage, and which completions the guard sent back to GRPO's, both (N,)."""
    if fallback is not None and fallback <= 0:
        raise ValueError(f"fallback={fallback} must be above 0, or None")
    groups, lengths = Groups.of(group_ids), mask.sum(1).to(rewards.dtype)
    tokens = groups.sum(lengths).clamp(min=1)
    away = rewards - groups.sum(lengths * rewards) / tokens
    advantage = away / ((groups.sum(lengths * away.square()) / tokens).sqrt() + eps)
    is_guarded = torch.zeros_like(rewards, dtype=torch.bool)
    if fallback is not None:
        is_far = ((advantage.abs() >= fallback) & (lengths > 0)).to(rewards.dtype)
        is_guarded = groups.sum(is_far) > 0
        advantage = torch.where(is_guarded, group_z_score(rewards, group_ids, eps=eps), advantage)
    # Where those with tokens have equal rewards, one without would be as far away as 1 / eps.
    return advantage.masked_fill(groups.is_uniform(rewards) | (lengths == 0), 0.0), is_guarded


@dataclass(eq=False)
class TokenGroupZScore:
    """Part B, as a slot.

    `metrics` say of the last rollout: `advantage/guarded`, the share of tokens in groups that the guard `fallback` sent back to
    GRPO's advantage, whose sum over tokens is not 0.

    >>> dapo.having(advantage=TokenGroupZScore(fallback=None))  # without the guard
    """

    eps: float = 1e-6
    fallback: float | None = 5.0
    metrics: Mapping[str, Tensor] = field(default_factory=dict, init=False)
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: PolicyBatch) -> Float[Tensor, " N"]:
        advantage, is_guarded = _token_group_advantage(
            batch.rewards, batch.mask, batch.group_ids, self.eps, self.fallback
        )
        guarded = (is_guarded[:, None] & batch.mask).sum() / batch.mask.sum().clamp(min=1)
        self.metrics = {"advantage/guarded": guarded}
        return advantage


def redistribute_advantage(
    advantage: Float[Tensor, "N _"],
    signal: Float[Tensor, "N T"],
    ratio: Float[Tensor, "N _"],
    low: Bound,
    high: Bound,
    *,
    beta: float = 1.0,
) -> Float[Tensor, "N T"]:
    """Part C: A (1 + beta · signal) for uncertain tokens outside the neutral zone and certain ones inside (eq. 10-11).

    The zone is 1 − low/2 < ratio < 1 + high/2, with the bounds of the clip; None is no bound. Other tokens keep A. The
    sign never changes for beta <= 1.

    >>> signal, ratio = torch.tensor([[0.5, 0.5, -0.5, -0.5]]), torch.tensor([[1.0, 1.5, 1.0, 1.5]])
    >>> redistribute_advantage(torch.full((1, 1), -2.0), signal, ratio, 0.2, 0.28)
    tensor([[-2., -3., -1., -2.]])
    """
    has_moved = outside_neutral_zone(ratio, low, high)
    counts = torch.where(signal > 0, has_moved, ~has_moved)
    return advantage * torch.where(counts, 1 + beta * signal, 1.0)


def outside_neutral_zone(ratio: Float[Tensor, "N _"], low: Bound, high: Bound) -> Bool[Tensor, "N _"]:
    """Whether a ratio has gone more than half of the way to either bound.

    >>> outside_neutral_zone(torch.tensor([[0.89, 1.0, 1.15]]), 0.2, 0.28)
    tensor([[ True, False,  True]])
    """
    none = torch.zeros_like(ratio, dtype=torch.bool)
    fell = none if low is None else ratio < 1 - low / 2
    rose = none if high is None else ratio > 1 + high / 2
    return fell | rose


@dataclass(frozen=True, eq=False)
class Redistribution:
    """Part C, as a slot. It tells `redistribution/moved`, the share of tokens outside the neutral zone: 0 says that there is
    one optimizer step a rollout, so that it only damps, and that adaptive bounds never matter."""

    signal: EntropySignal
    beta: float = 1.0
    needs: ClassVar[frozenset[str]] = EntropySignal.needs

    def __call__(self, advantage: Tensor, view: LossView) -> Float[Tensor, "N T"]:
        mask = view.batch.mask
        has_moved = outside_neutral_zone(view.ratio, view.low, view.high) & mask
        view.tell("redistribution/moved", has_moved.sum() / mask.sum().clamp(min=1))
        return redistribute_advantage(
            advantage, view.once(self.signal), view.ratio, view.low, view.high, beta=self.beta
        )


def adaptive_clip(
    signal: Float[Tensor, "N T"], low: float = 0.2, high: float = 0.28, *, alpha: float = 1.0
) -> tuple[Float[Tensor, "N T"], Float[Tensor, "N T"]]:
    """Part D: low (1 − alpha · signal) where the signal is negative, high (1 + alpha · signal) where positive (eq. 12-13).

    >>> [bound.tolist() for bound in adaptive_clip(torch.tensor([[-0.5, 0.5]]), 0.2, 0.5)]
    [[[0.30000001192092896, 0.20000000298023224]], [[0.5, 0.75]]]
    """
    return low * (1 - alpha * signal.clamp(max=0)), high * (1 + alpha * signal.clamp(min=0))


@dataclass(frozen=True, eq=False)
class AdaptiveClip:
    """Part D, as a slot."""

    signal: EntropySignal
    low: float = 0.2
    high: float = 0.28
    alpha: float = 1.0
    needs: ClassVar[frozenset[str]] = EntropySignal.needs

    def __call__(self, view: LossView) -> tuple[Tensor, Tensor]:
        return adaptive_clip(view.once(self.signal), self.low, self.high, alpha=self.alpha)


def entropy_aware(
    base: PolicyObjective,
    *,
    averages_tokens: bool = True,
    redistributes: bool = True,
    adapts_clip: bool = True,
    signal: EntropySignal | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> PolicyObjective:
    """`base` with parts B, C and D, each switched on by itself; all off it is `base`. Part A is the sampler's.

    Both parts of the loss share one signal. Raises ValueError where the bounds of `base`, which part D starts from, are
    not two numbers.

    >>> hapo = entropy_aware(dapo)
    """
    signal = EntropySignal() if signal is None else signal
    objective = replace(base, advantage=TokenGroupZScore()) if averages_tokens else base
    if redistributes:
        objective = replace(objective, adjust=(*base.adjust, Redistribution(signal, beta)))
    if adapts_clip:
        if callable(base.clip) or base.clip[0] is None or base.clip[1] is None:
            raise ValueError(f"an adaptive clip starts from two numbers, not clip={base.clip}")
        objective = replace(objective, clip=AdaptiveClip(signal, base.clip[0], base.clip[1], alpha))
    if redistributes or adapts_clip:
        objective = replace(objective, post=(*base.post, *signal.post))
    return objective
