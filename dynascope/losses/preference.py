"""The family of margin losses on pairs of responses, and how hard each one pulls on either of them (arXiv 2410.13828).

Every loss here sees a pair only through the log-probabilities of its two responses, so its gradient in the weights is
−(d_w ∇log π(y_w) − d_l ∇log π(y_l)) with two numbers a pair: the pull on the chosen response, d_w = −∂loss/∂log π(y_w), and
the push on the rejected one, d_l = +∂loss/∂log π(y_l). Each loss knows both in closed form.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

Coefficients: TypeAlias = tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]
"""(d_w, d_l): how hard a loss pulls the chosen response up, and pushes the rejected one down."""


@dataclass(frozen=True)
class PreferencePairs:
    """Log-probabilities of chosen and rejected responses, one entry a pair, each summed over a response's tokens.

    `reference_chosen` and `reference_rejected` are those of the reference model, for losses that compare with one;
    `chosen_length` and `rejected_length` count tokens, for losses that average over them.

    `mismatched` are log-ratios to the reference of responses that were put to other prompts than their own, any number of
    them, for KTO's estimate of how far the policy is from the reference.

    Raises ValueError for fields of different lengths.

    >>> pairs = PreferencePairs(*torch.tensor([[-12.0], [-10.0], [-11.0], [-9.5], [6.0], [4.0]]))
    >>> pairs.margin
    tensor([-0.5000])
    """

    chosen: Float[Tensor, " pairs"]
    rejected: Float[Tensor, " _"]
    reference_chosen: Float[Tensor, " _"] | None = None
    reference_rejected: Float[Tensor, " _"] | None = None
    chosen_length: Shaped[Tensor, " _"] | None = None
    rejected_length: Shaped[Tensor, " _"] | None = None
    mismatched: Float[Tensor, " others"] | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "mismatched" and value is not None and value.shape != self.chosen.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, but chosen {tuple(self.chosen.shape)}")

    @property
    def ratios(self) -> tuple[Tensor, Tensor]:
        """Log-ratios of both responses to the reference. Raises ValueError without one."""
        if self.reference_chosen is None or self.reference_rejected is None:
            raise ValueError("this loss compares with a reference: give reference_chosen and reference_rejected")
        return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected

    @property
    def margin(self) -> Tensor:
        """Log-ratio of the chosen response minus that of the rejected one."""
        chosen, rejected = self.ratios
        return chosen - rejected

    @property
    def lengths(self) -> tuple[Tensor, Tensor]:
        """Numbers of tokens, or sums of their weights. Raises ValueError where they are missing or negative."""
        if self.chosen_length is None or self.rejected_length is None:
            raise ValueError("this loss counts tokens: give chosen_length and rejected_length")
        if bool((self.chosen_length < 0).any() | (self.rejected_length < 0).any()):
            raise ValueError("a length is negative; lengths are numbers of tokens, or sums of their weights")
        return self.chosen_length, self.rejected_length

    @property
    def shares(self) -> tuple[Tensor, Tensor]:
        """What one token counts in the mean of its response: 1 / length; 0 where a mask has left nothing of it."""
        return tuple(torch.where(one > 0, 1 / one.clamp_min(1e-30), 0.0) for one in self.lengths)  # type: ignore[return-value]

    @property
    def averages(self) -> tuple[Tensor, Tensor]:
        """Mean log-probability a token of both responses; 0 where a mask has left nothing of it."""
        chosen, rejected = self.shares
        return self.chosen * chosen, self.rejected * rejected


PairLoss: TypeAlias = Callable[[PreferencePairs], Float[Tensor, " pairs"]]


def coefficients_by_autograd(loss: PairLoss, pairs: PreferencePairs) -> Coefficients:
    """(d_w, d_l) of any loss of pairs, by differentiating it.

    The loss may return one value a pair, or their sum; a mean gives coefficients divided by the number of pairs.

    >>> coefficients_by_autograd(lambda pairs: -F.logsigmoid(0.1 * pairs.margin), pairs)
    """
    chosen, rejected = (one.detach().requires_grad_() for one in (pairs.chosen, pairs.rejected))
    with torch.enable_grad():
        total = loss(_with(pairs, chosen, rejected)).sum()
        gradients = torch.autograd.grad(total, (chosen, rejected), allow_unused=True)
    pull, push = (torch.zeros_like(chosen) if one is None else one for one in gradients)
    return -pull, push


def _with(pairs: PreferencePairs, chosen: Tensor, rejected: Tensor) -> PreferencePairs:
    return replace(pairs, chosen=chosen, rejected=rejected)


class MarginLoss:
    """A loss of preference pairs: called with them it gives one value a pair, and `coefficients` how hard it pulls."""

    def __call__(self, pairs: PreferencePairs) -> Float[Tensor, " pairs"]:
        """The loss of each pair."""
        raise TypeError(f"{type(self).__name__} must define __call__(pairs)")

    def coefficients(self, pairs: PreferencePairs) -> Coefficients:
        """(d_w, d_l) of each pair, in closed form."""
        raise TypeError(f"{type(self).__name__} must define coefficients(pairs)")


@dataclass(frozen=True)
class DPO(MarginLoss):
    """−log σ(β · margin) (2305.18290). Both responses are pulled alike.

    >>> DPO()(pairs)  # as in `PreferencePairs`
    tensor([0.7185])
    """

    beta: float = 0.1

    def __call__(self, pairs: PreferencePairs) -> Tensor:
        return -F.logsigmoid(self.beta * pairs.margin)

    def coefficients(self, pairs: PreferencePairs) -> Coefficients:
        both = self.beta * torch.sigmoid(-self.beta * pairs.margin)
        return both, both


@dataclass(frozen=True)
class Hinge(MarginLoss):
    """max(0, 1 − β · margin) (2309.06657, as TRL's DPOTrainer has it).

    >>> Hinge()(pairs)  # as in `PreferencePairs`
    tensor([1.0500])
    """

    beta: float = 0.1

    def __call__(self, pairs: PreferencePairs) -> Tensor:
        return torch.relu(1 - self.beta * pairs.margin)

    def coefficients(self, pairs: PreferencePairs) -> Coefficients:
        both = self.beta * (self.beta * pairs.margin < 1).to(pairs.chosen.dtype)
        return both, both


@dataclass(frozen=True)
class IPO(MarginLoss):
    """(margin − 1/(2τ))² (2310.12036). Both coefficients are negative once the margin is past its target.

    `is_averaged` takes log-ratios a token, which is what TRL's "ipo" does.

    >>> IPO()(pairs)  # as in `PreferencePairs`
    tensor([30.2500])
    """

    tau: float = 0.1
    is_averaged: bool = False

    def _scales(self, pairs: PreferencePairs) -> tuple[Tensor, Tensor]:
        if not self.is_averaged:
            return torch.ones_like(pairs.chosen), torch.ones_like(pairs.rejected)
        return pairs.shares

    def _missing(self, pairs: PreferencePairs) -> Tensor:
        (chosen, rejected), scales = pairs.ratios, self._scales(pairs)
        return 1 / (2 * self.tau) - (chosen * scales[0] - rejected * scales[1])

    def __call__(self, pairs: PreferencePairs) -> Tensor:
        return self._missing(pairs).square()

    def coefficients(self, pairs: PreferencePairs) -> Coefficients:
        missing, (chosen, rejected) = 2 * self._missing(pairs), self._scales(pairs)
        return missing * chosen, missing * rejected


@dataclass(frozen=True)
class SimPO(MarginLoss):
    """−log σ(β (mean log π(y_w) − mean log π(y_l)) − γ), without a reference (2405.14734).

    The longer response is pulled less: d_w / d_l = |y_l| / |y_w|.

    >>> SimPO()(pairs)  # as in `PreferencePairs`
    tensor([0.6931])
    """

    beta: float = 2.0
    gamma: float = 1.0

    def _logit(self, pairs: PreferencePairs) -> Tensor:
        chosen, rejected = pairs.averages
        return self.beta * (chosen - rejected) - self.gamma

    def __call__(self, pairs: PreferencePairs) -> Tensor:
        return -F.logsigmoid(self._logit(pairs))

    def coefficients(self, pairs: PreferencePairs) -> Coefficients:
        both, (chosen, rejected) = self.beta * torch.sigmoid(-self._logit(pairs)), pairs.shares
        return both * chosen, both * rejected


@dataclass(frozen=True)
class RDPO(MarginLoss):
    """−log σ(β · margin + α (|y_w| − |y_l|)) (2403.19159): lengths move how hard, not which way.

    >>> RDPO()(pairs)  # as in `PreferencePairs`
    tensor([0.5334])
    """

    beta: float = 0.1
    alpha: float = 0.2

    def _logit(self, pairs: PreferencePairs) -> Tensor:
        chosen, rejected = pairs.lengths
        return self.beta * pairs.margin + self.alpha * (chosen - rejected)

    def __call__(self, pairs: PreferencePairs) -> Tensor:
        return -F.logsigmoid(self._logit(pairs))

    def coefficients(self, pairs: PreferencePairs) -> Coefficients:
        both = self.beta * torch.sigmoid(-self._logit(pairs))
        return both, both


@dataclass(frozen=True)
class SLiC(MarginLoss):
    """max(0, δ − log π(y_w) + log π(y_l)) − λ log π(y_w) (2305.10425).

    >>> SLiC()(pairs)  # as in `PreferencePairs`
    tensor([4.2000])
    """

    delta: float = 1.0
    weight: float = 0.1

    def __call__(self, pairs: PreferencePairs) -> Tensor:
        return torch.relu(self.delta - pairs.chosen + pairs.rejected) - self.weight * pairs.chosen

    def coefficients(self, pairs: PreferencePairs) -> Coefficients:
        is_active = (pairs.chosen - pairs.rejected < self.delta).to(pairs.chosen.dtype)
        return is_active + self.weight, is_active


@dataclass(frozen=True)
class CPO(MarginLoss):
    """−log σ(β (log π(y_w) − log π(y_l))) − λ log π(y_w), without a reference (2401.08417).

    The likelihood term is summed over tokens as in the paper; `is_averaged` divides it by the chosen response's length
    instead, which is nearer to TRL's CPOTrainer (that one averages over all chosen tokens of the batch).

    >>> CPO()(pairs)  # as in `PreferencePairs`
    tensor([12.7981])
    """

    beta: float = 0.1
    weight: float = 1.0
    is_averaged: bool = False

    def _term(self, pairs: PreferencePairs) -> Tensor:
        return self.weight * pairs.shares[0] if self.is_averaged else torch.full_like(pairs.chosen, self.weight)

    def __call__(self, pairs: PreferencePairs) -> Tensor:
        return -F.logsigmoid(self.beta * (pairs.chosen - pairs.rejected)) - self._term(pairs) * pairs.chosen

    def coefficients(self, pairs: PreferencePairs) -> Coefficients:
        both = self.beta * torch.sigmoid(-self.beta * (pairs.chosen - pairs.rejected))
        return both + self._term(pairs), both


@dataclass(frozen=True)
class RRHF(MarginLoss):
    """max(0, mean log π(y_l) − mean log π(y_w)) − λ log π(y_w) (2304.05302).

    >>> RRHF()(pairs)  # as in `PreferencePairs`
    tensor([12.])
    """

    weight: float = 1.0

    def __call__(self, pairs: PreferencePairs) -> Tensor:
        chosen, rejected = pairs.averages
        return torch.relu(rejected - chosen) - self.weight * pairs.chosen

    def coefficients(self, pairs: PreferencePairs) -> Coefficients:
        chosen, rejected = pairs.averages
        is_active = (rejected > chosen).to(chosen.dtype)
        return is_active * pairs.shares[0] + self.weight, is_active * pairs.shares[1]


@dataclass(frozen=True)
class ORPO(MarginLoss):
    """−mean log π(y_w) − λ log σ(log odds(y_w) − log odds(y_l)), odds of p = exp(mean log π) (2403.07691).

    Odds are infinite where p = 1; log-probabilities are kept a rounding error below 0. A response of which a mask has left
    nothing has even odds.

    >>> ORPO()(pairs)  # as in `PreferencePairs`
    tensor([2.0452])
    """

    weight: float = 0.1

    def _parts(self, pairs: PreferencePairs) -> tuple[Tensor, Tensor, Tensor]:
        """Both responses' log(1 − p), and the difference of their log-odds."""
        averages = [one.clamp(max=-torch.finfo(one.dtype).eps) for one in pairs.averages]
        others = [torch.log(-torch.expm1(one)) for one in averages]
        odds = [
            (average - other) * (length > 0)
            for average, other, length in zip(averages, others, pairs.lengths, strict=True)
        ]
        return others[0], others[1], odds[0] - odds[1]

    def __call__(self, pairs: PreferencePairs) -> Tensor:
        return -pairs.averages[0] - self.weight * F.logsigmoid(self._parts(pairs)[2])

    def coefficients(self, pairs: PreferencePairs) -> Coefficients:
        not_chosen, not_rejected, odds = self._parts(pairs)
        pull, (chosen, rejected) = self.weight * torch.sigmoid(-odds), pairs.shares
        return (1 + pull * torch.exp(-not_chosen)) * chosen, pull * torch.exp(-not_rejected) * rejected


@dataclass(frozen=True)
class KTO(MarginLoss):
    """λ_w (1 − σ(β (r_w − z₀))) + λ_l (1 − σ(β (z₀ − r_l))) with log-ratios r (2402.01306), seen pair by pair.

    `baseline` is z₀, the divergence from the reference, through which no gradient goes. None estimates it from the batch as the
    paper does (section 4.1): max(0, mean log-ratio of responses to other prompts than theirs), `PreferencePairs.mismatched`
    (`mismatched_responses` makes them).

    >>> KTO()(pairs)  # as in `PreferencePairs`
    tensor([1.0125])
    """

    beta: float = 0.1
    baseline: float | None = 0.0
    chosen_weight: float = 1.0
    rejected_weight: float = 1.0

    def _values(self, pairs: PreferencePairs) -> tuple[Tensor, Tensor]:
        (chosen, rejected), baseline = pairs.ratios, self._baseline(pairs)
        return torch.sigmoid(self.beta * (chosen - baseline)), torch.sigmoid(self.beta * (baseline - rejected))

    def _baseline(self, pairs: PreferencePairs) -> Tensor | float:
        if self.baseline is not None:
            return self.baseline
        if pairs.mismatched is None:
            raise ValueError("KTO with baseline=None needs log-ratios of responses to other prompts: give mismatched")
        return pairs.mismatched.detach().mean().clamp(min=0)

    def __call__(self, pairs: PreferencePairs) -> Tensor:
        chosen, rejected = self._values(pairs)
        return self.chosen_weight * (1 - chosen) + self.rejected_weight * (1 - rejected)

    def coefficients(self, pairs: PreferencePairs) -> Coefficients:
        chosen, rejected = (self.beta * value * (1 - value) for value in self._values(pairs))
        return self.chosen_weight * chosen, self.rejected_weight * rejected


@dataclass(frozen=True)
class SPPO(MarginLoss):
    """(r_w − 1/(2β))² + (r_l + 1/(2β))² with log-ratios r, the hard form (2405.00675).

    >>> SPPO()(pairs)  # as in `PreferencePairs`
    tensor([56.2500])
    """

    beta: float = 0.1

    def __call__(self, pairs: PreferencePairs) -> Tensor:
        chosen, rejected = pairs.ratios
        return (chosen - 0.5 / self.beta).square() + (rejected + 0.5 / self.beta).square()

    def coefficients(self, pairs: PreferencePairs) -> Coefficients:
        chosen, rejected = pairs.ratios
        return 2 * (0.5 / self.beta - chosen), 2 * (rejected + 0.5 / self.beta)


@dataclass(frozen=True)
class DPOP(MarginLoss):
    """−log σ(β (margin − λ max(0, log π_ref(y_w) − log π(y_w)))): DPO that minds the chosen response (2402.13228).

    >>> DPOP()(pairs)  # as in `PreferencePairs`
    tensor([5.0564])
    """

    beta: float = 0.1
    weight: float = 50.0

    def _logit(self, pairs: PreferencePairs) -> Tensor:
        return self.beta * (pairs.margin - self.weight * torch.relu(-pairs.ratios[0]))

    def __call__(self, pairs: PreferencePairs) -> Tensor:
        return -F.logsigmoid(self._logit(pairs))

    def coefficients(self, pairs: PreferencePairs) -> Coefficients:
        push = self.beta * torch.sigmoid(-self._logit(pairs))
        return push * (1 + self.weight * (pairs.ratios[0] < 0)), push


MARGIN_LOSSES: dict[str, type[MarginLoss]] = {
    "dpo": DPO,
    "hinge": Hinge,
    "ipo": IPO,
    "simpo": SimPO,
    "rdpo": RDPO,
    "slic": SLiC,
    "cpo": CPO,
    "rrhf": RRHF,
    "orpo": ORPO,
    "kto": KTO,
    "sppo": SPPO,
    "dpop": DPOP,
}


def margin_loss(name: str, **settings: Any) -> MarginLoss:
    """A loss by its name, with its own settings. Raises ValueError for a name that is not in `MARGIN_LOSSES`, or a setting that
    the loss has not.

    >>> margin_loss("cpo", beta=0.1)
    CPO(beta=0.1, weight=1.0, is_averaged=False)
    """
    if name not in MARGIN_LOSSES:
        raise ValueError(f"there is no margin loss {name!r}; there are {', '.join(MARGIN_LOSSES)}")
    known = [one.name for one in fields(MARGIN_LOSSES[name])]  # type: ignore[arg-type]
    unknown = [one for one in settings if one not in known]
    if unknown:
        raise ValueError(f"{name} has no setting {', '.join(unknown)}; it has {', '.join(known)}")
    return MARGIN_LOSSES[name](**settings)
