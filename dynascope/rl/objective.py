"""A policy objective is a row of slots; a method is the slots that it changes.

rewards → advantage → post          once a rollout:   objective.advantages(batch)
log-probs → ratio → clip, adjust → surrogate + KL terms − entropy bonus → aggregation
                                    every minibatch:  objective.loss(batch)
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from dynascope.rl.advantages import GroupZScore
from dynascope.rl.aggregation import Denominator, aggregate
from dynascope.rl.batch import PolicyBatch, per_token
from dynascope.rl.kl import KLTerm
from dynascope.rl.ratios import Level, log_ratios
from dynascope.rl.surrogate import clipped_surrogate

T = TypeVar("T")
Bound: TypeAlias = float | Tensor | None
Metrics: TypeAlias = Mapping[str, Tensor]
"""Numbers without a gradient, on the device; reading one waits for it."""


@dataclass(frozen=True, eq=False)
class LossView:
    """What a slot of the loss may look at: the minibatch, the current detached ratio, and the bounds once they are known.

    Ratios are (N, T), or (N, 1) where the ratio is the completion's.
    """

    batch: PolicyBatch
    ratio: Float[Tensor, "N _"]
    log_ratio: Float[Tensor, "N _"]
    low: Bound = None
    high: Bound = None
    _known: dict[Any, Any] = field(default_factory=dict)
    told: dict[str, Tensor] = field(default_factory=dict)
    """What slots had to tell."""

    def once(self, signal: Callable[["LossView"], T]) -> T:
        """`signal(self)`, computed at most once a minibatch, so that several slots can share it.

        >>> entropy_signal = view.once(self.signal)
        """
        if signal not in self._known:
            self._known[signal] = signal(self)
        known: T = self._known[signal]
        return known

    def tell(self, name: str, value: Tensor) -> None:
        """Put a number, on the device and without a gradient, among the loss's metrics.

        >>> view.tell("redistribution/moved", has_moved.float().mean())
        """
        self.told[name] = value


Advantage: TypeAlias = Callable[[PolicyBatch], Tensor]
"""From a rollout to an advantage (N,) or (N, T). An object with a state keeps it itself, and has `state_dict`; one that has
something to tell of the last rollout has it as `metrics`."""
PostProcessor: TypeAlias = Callable[[Tensor, PolicyBatch], Tensor]
"""From a rollout's advantages and batch to advantages."""
Clip: TypeAlias = Callable[[LossView], tuple[Bound, Bound]]
"""From what a minibatch looks like now to the two distances of the clip from 1: numbers, or tensors (N, T)."""
Adjuster: TypeAlias = Callable[[Tensor, LossView], Tensor]
"""From a minibatch's advantages, (N, 1) or (N, T), and its view to advantages."""


@dataclass(frozen=True)
class PolicyObjective:
    """One policy-optimization method. What a slot needs beyond the basics it says in `needs`, and only that is computed.

    Slots are plain callables; those of a method of yours go in by `having`. `advantages` is called once a rollout,
    `loss` once a minibatch, without waiting for the device.

    >>> gspo = grpo.having(ratio="sequence", clip=(3e-4, 4e-4))
    >>> batch = batch.having(advantage=gspo.advantages(batch))
    >>> loss, metrics = gspo.loss(batch.having(log_probs=log_probs))
    """

    advantage: Advantage = GroupZScore()  # noqa: RUF009 frozen, and without a state
    """The estimator."""
    post: tuple[PostProcessor, ...] = ()
    """What is done to advantages once a rollout, in order."""
    ratio: Level = "token"
    pre_clip: tuple[float, float] | None = None
    """Two ratios between which the ratio is held before it is exponentiated."""
    clip: tuple[float | None, float | None] | Clip = (0.2, 0.2)
    """How far the ratio may fall below 1 and rise above it; None for no limit; or a function of the minibatch."""
    adjust: tuple[Adjuster, ...] = ()
    """What is done to advantages in every minibatch, once the ratio and the bounds are known, in order."""
    dual_clip: float | None = None
    policy_weight: float = 1.0
    """Of the surrogate beside the other terms."""
    kl: tuple[KLTerm, ...] = ()
    entropy_bonus: float = 0.0
    shaping: float | None = None
    """γ: tokens of demonstrations weigh π / (π + γ) in place of a ratio, unclipped, so that rare ones keep a gradient
    (2504.14945, section 3.3); None treats demonstrations as samples."""
    aggregation: Denominator = "seq-mean-token-mean"
    learns_from_truncated: bool = True
    """Whether completions cut off at the length limit are in the loss; their rewards count in the group either way. Without
    them nothing speaks against rambling (2503.18892's `remove_clip`)."""

    def __post_init__(self) -> None:
        if self.shaping is not None and self.shaping <= 0:
            raise ValueError(f"shaping={self.shaping} must be above 0; the paper's is 0.1")
        for slot in self.post:
            only: frozenset[str] = getattr(slot, "only_with", frozenset())
            if only and self.aggregation not in only:
                raise ValueError(
                    f"{type(slot).__name__} is exact with aggregation {', '.join(sorted(only))} alone, not {self.aggregation}"
                )

    def having(self, **slots: Any) -> "PolicyObjective":
        """The same method with some slots changed.

        >>> grpo.having(clip=(0.2, 0.28), aggregation="token-mean")  # DAPO
        """
        known = [one.name for one in fields(self)]
        unknown = sorted(set(slots) - set(known))
        if unknown:
            raise ValueError(f"there is no slot {', '.join(unknown)}; there are {', '.join(known)}")
        return replace(self, **slots)

    @property
    def rollout_needs(self) -> frozenset[str]:
        """Fields of the batch that `advantages` reads beside rewards, groups and mask."""
        return _needs(self.advantage, *self.post)

    @property
    def loss_needs(self) -> frozenset[str]:
        """Fields of the batch that `loss` reads beside those of the surrogate."""
        bonus = frozenset({"entropy"} if self.entropy_bonus else ())
        truncated = frozenset(() if self.learns_from_truncated else {"is_truncated"})
        given = frozenset(() if self.shaping is None else {"is_demonstration"})
        return _needs(self.clip, *self.adjust, *self.kl) | bonus | truncated | given

    @property
    def is_shaped_by_teacher(self) -> bool:
        """Whether a slot other than a KL term reads what a teacher says."""
        return "teacher_log_probs" in _needs(self.advantage, *self.post, self.clip, *self.adjust)

    def kept_by_teacher(self, batch: PolicyBatch) -> Tensor | None:
        """Which completions (N,) some slot compares with a teacher; None where that cannot be told, so all of them."""
        terms = [term for term in self.kl if term.against == "teacher"]
        if self.is_shaped_by_teacher or any(term.keep is None for term in terms):
            return None
        if any(getattr(batch, name) is None for term in terms for name in term.also_needs):
            return None
        kept = [one for term in terms if (one := term.kept(batch)) is not None]
        return torch.stack([(one > 0).any(1) for one in kept]).any(0)

    def num_kept(self, batch: PolicyBatch) -> tuple[Tensor | None, ...]:
        """How many tokens of a whole optimizer step each KL term with `norm="kept"` keeps; None for the other terms.

        Its micro-batches have it as `num_kept`, so that they add up to what the step as one batch would give.

        >>> parts = [step.having(num_kept=objective.num_kept(step)).select(rows) for rows in step.split(4)]
        """
        mask = self._learned(batch)
        kept = [term.kept(batch) if term.norm == "kept" else None for term in self.kl]
        return tuple(None if one is None else (one * mask).sum() for one in kept)

    def advantages(self, batch: PolicyBatch) -> Tensor:
        """The advantage of every completion (N,), or of every token (N, T), from a whole rollout; without a gradient.

        Raises ValueError for a batch that lacks what a slot needs or holds what is not finite.
        """
        batch.check().require(self.rollout_needs, "this objective's advantage")
        with torch.no_grad():
            advantage = self.advantage(batch)
            for process in self.post:
                advantage = process(advantage, batch)
        return advantage

    @property
    def rollout_metrics(self) -> Metrics:
        """What slots have to tell of the last rollout: the `metrics` of those that have some."""
        told: dict[str, Tensor] = {}
        for slot in (self.advantage, *self.post):
            told |= getattr(slot, "metrics", {})
        return told

    def loss(self, batch: PolicyBatch) -> tuple[Float[Tensor, ""], Metrics]:
        """The loss of a minibatch, to be minimised, and what happened in it.

        Metrics: `policy_loss`, `clip/low`, `clip/high` (shares of tokens whose gradient the clip took), `ratio/mean`,
        `ratio/max_log` (the largest |log π − log π_behaviour|, before a pre-clip), `ratio/exploded` (share of tokens where it
        exceeds 5), `kl/behaviour` (k3), `kl/ref` and `kl/teacher` where there is such a term, `entropy` where it is known,
        `pre_clipped` where there is a pre-clip.

        Raises ValueError when log-probabilities, advantages or what a slot needs are missing.
        """
        if batch.behaviour_log_probs is None and batch.log_probs is not None:
            batch = batch.having(behaviour_log_probs=batch.log_probs.detach())
        batch.require(self.loss_needs | {"log_probs", "advantage"}, "this objective's loss")
        batch = batch.having(mask=self._learned(batch))
        assert batch.log_probs is not None
        assert batch.advantage is not None
        assert batch.behaviour_log_probs is not None
        behaviour = batch.behaviour_log_probs
        log_ratio = log_ratios(batch.log_probs, behaviour, batch.mask, level=self.ratio, pre_clip=self.pre_clip)
        ratio = log_ratio.exp()

        view = LossView(batch, ratio.detach(), log_ratio.detach())
        advantage = per_token(batch.advantage)
        with torch.no_grad():
            low, high = self.clip(view) if callable(self.clip) else self.clip
            view = replace(view, low=low, high=high)
            for adjust in self.adjust:
                advantage = adjust(advantage, view)

        surrogate = clipped_surrogate(ratio, advantage, low, high, dual_clip=self.dual_clip)
        policy_loss = self._aggregate(self._shaped(surrogate.loss, advantage, batch), batch)
        loss = self.policy_weight * policy_loss
        divergences = {}
        for place, term in enumerate(self.kl):
            whole = None if batch.num_kept is None else batch.num_kept[place]
            weighed, plain = self._divergence(term, ratio, batch, whole)
            if term.against != "behaviour":  # of which every loss tells
                divergences[f"kl/{term.against}"] = plain
            loss = loss + term.weight(batch.step) * weighed
        if self.entropy_bonus:
            assert batch.entropy is not None
            loss = loss - self.entropy_bonus * self._aggregate(batch.entropy.masked_fill(~batch.mask, 0.0), batch)

        with torch.no_grad():
            # At padding log-ratios are 0 and nothing is clipped, so plain sums over (N, T) are sums over tokens; a
            # completion's one number stands for each of its tokens.
            log_ratio, lengths = view.log_ratio, batch.mask.sum(1, keepdim=True)
            count = lengths.sum().clamp(min=1)

            def total(one: Tensor) -> Tensor:
                if one.shape == batch.mask.shape:
                    return one.count_nonzero() if one.dtype == torch.bool else one.sum()
                return (one * lengths).sum()

            above = torch.expm1(log_ratio)
            raw = view.log_ratio
            if self.pre_clip is not None:
                raw = log_ratios(batch.log_probs.detach(), behaviour, batch.mask, level=self.ratio)
            averaged: dict[str, Tensor] = {
                "ratio/exploded": total(~(raw.abs() <= 5)) / count,
                "clip/low": total(surrogate.is_clipped_low) / count,
                "clip/high": total(surrogate.is_clipped_high) / count,
                "ratio/mean": 1 + total(above) / count,
                "kl/behaviour": total(above - log_ratio) / count,
            }
            if batch.entropy is not None:
                averaged["entropy"] = batch.entropy.detach().masked_fill(~batch.mask, 0.0).sum() / count
            if self.pre_clip is not None:
                low_ratio, high_ratio = self.pre_clip
                is_held = (view.ratio <= low_ratio * (1 + 1e-6)) | (view.ratio >= high_ratio * (1 - 1e-6))
                averaged["pre_clipped"] = total(is_held) / count
        return loss, {
            "policy_loss": policy_loss.detach(),
            **averaged,
            "ratio/max_log": raw.abs().amax(),
            **view.told,
            **{name: one.detach() for name, one in divergences.items()},
        }

    def _learned(self, batch: PolicyBatch) -> Tensor:
        """The tokens that are in the loss."""
        if self.learns_from_truncated:
            return batch.mask
        assert batch.is_truncated is not None
        return batch.mask & ~batch.is_truncated[:, None]

    def _shaped(self, loss: Tensor, advantage: Tensor, batch: PolicyBatch) -> Tensor:
        if self.shaping is None:
            return loss
        assert batch.log_probs is not None
        assert batch.is_demonstration is not None
        # π / (π + γ) as a sigmoid has a gradient where π itself would underflow.
        weight = (batch.log_probs.masked_fill(~batch.mask, 0.0) - math.log(self.shaping)).sigmoid()
        return torch.where(batch.is_demonstration[:, None], -weight * advantage, loss)

    def _divergence(
        self, term: KLTerm, ratio: Tensor, batch: PolicyBatch, num_kept: int | Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """A KL term as it enters the loss, and its plain mean over the tokens that it keeps, to be told.

        `num_kept` is of the whole optimizer step.
        """
        by_token, kept = term.by_token(batch), term.kept(batch)
        weights = batch.mask if kept is None else kept * batch.mask
        total = weights.sum().clamp(min=1e-9)
        plain = (by_token.detach() * weights).sum() / total
        if term.is_ratio_weighted:
            by_token = by_token * (ratio if term.is_score_weighted else ratio.detach())
        if kept is None:
            return self._aggregate(by_token, batch), plain
        by_token = by_token * kept
        if term.norm == "all":
            return self._aggregate(by_token, batch), plain
        return by_token.sum() / (total if num_kept is None else torch.as_tensor(num_kept).clamp(min=1e-9)), plain

    def _aggregate(self, values: Tensor, batch: PolicyBatch) -> Tensor:
        return aggregate(
            values,
            batch.mask,
            self.aggregation,
            num_tokens=batch.num_tokens,
            num_completions=batch.num_completions,
            max_length=batch.max_length,
            group_ids=batch.group_ids,
        )

    def state_dict(self) -> dict[str, Any]:
        """The state of every slot that has one, for a checkpoint."""
        return {name: slot.state_dict() for name, slot in self._stateful().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave. Raises ValueError when the slots with a state are others."""
        slots = self._stateful()
        if set(slots) != set(state):
            raise ValueError(
                f"the state is of slots {', '.join(sorted(state)) or 'none'}, "
                f"but this objective has a state in {', '.join(sorted(slots)) or 'none'}"
            )
        for name, slot in slots.items():
            slot.load_state_dict(state[name])

    def _stateful(self) -> dict[str, Any]:
        named: dict[str, Any] = {"advantage": self.advantage, "clip": self.clip}
        for group in ("post", "adjust", "kl"):
            named |= {f"{group}.{place}": slot for place, slot in enumerate(getattr(self, group))}
        return {name: slot for name, slot in named.items() if hasattr(slot, "state_dict")}


def _needs(*slots: Any) -> frozenset[str]:
    return frozenset().union(*(getattr(slot, "needs", frozenset()) for slot in slots))
