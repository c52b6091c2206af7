"""Gradient entanglement: what a preference loss does to either response of a pair, from their gradients (arXiv 2410.13828).

A step of size η down a margin loss moves log π(y_w) by η (d_w ‖g_w‖² − d_l ⟨g_w, g_l⟩) and log π(y_l) by
η (d_w ⟨g_w, g_l⟩ − d_l ‖g_l‖²), to first order; g_w and g_l are the gradients of the two log-probabilities, and (d_w, d_l) the
loss's coefficients. Where ⟨g_w, g_l⟩ is large both fall, or both rise, while the loss improves.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from dynascope.kernels import ntk
from dynascope.kernels.layerwise import Use, logits_of
from dynascope.kernels.pairs import reduce_pairs, trained_parameters
from dynascope.kernels.products import along, inner_products, squared_norms, weighted_inner_products
from dynascope.kernels.sketches import sketch
from dynascope.losses import PreferencePairs, coefficients_by_autograd, margin_loss, token_log_probs
from dynascope.losses.preference import Coefficients, PairLoss
from dynascope.probes.probe import Need, Probe
from dynascope.probes.views import ModelView
from dynascope.record import Series

Method: TypeAlias = Literal["ghost", "two_backward", "sketch"]
"""How products of gradients are found; see `pair_products`."""


class Case(IntEnum):
    """Which way a pair's responses go to first order."""

    IDEAL = 0
    """The chosen one rises and the rejected one falls."""
    BOTH_FALL = 1
    BOTH_RISE = 2
    REVERSED = 3
    """The chosen one falls and the rejected one rises; never where both coefficients are positive."""
    STILL = 4
    """Neither moves."""


@dataclass(frozen=True)
class PreferenceBatch:
    """Token ids of pairs: chosen responses in the first half of the rows, rejected ones in the second, as TRL collates.

    `mask` marks the tokens of the responses, `attention_mask` all that is not padding (default: everything).

    Raises ValueError for an odd number of sequences, and for a response without tokens.

    >>> PreferenceBatch(inputs["input_ids"], inputs["completion_mask"], inputs["attention_mask"])  # of TRL's DPOTrainer
    """

    tokens: Int[Tensor, "sequences positions"]
    mask: Shaped[Tensor, "sequences positions"]
    attention_mask: Shaped[Tensor, "sequences positions"] | None = None

    def __post_init__(self) -> None:
        if len(self.tokens) % 2:
            raise ValueError(
                f"{len(self.tokens)} sequences are no pairs: chosen ones first, as many rejected ones after"
            )
        if bool((self.mask[:, 1:].sum(1) < 1).any()):
            raise ValueError("a response has no tokens after the first position; leave such pairs out")

    @property
    def num_pairs(self) -> int:
        """How many pairs there are."""
        return len(self.tokens) // 2

    def pair(self, index: int) -> "PreferenceBatch":
        """One pair alone."""
        rows = [index, self.num_pairs + index]
        attended = None if self.attention_mask is None else self.attention_mask[rows]
        return PreferenceBatch(self.tokens[rows], self.mask[rows], attended)

    def pairs(
        self, log_probs: Float[Tensor, " sequences"], reference: Float[Tensor, " sequences"] | None = None
    ) -> PreferencePairs:
        """What a margin loss is called with, from the sequences' log-probabilities."""
        lengths = self.mask[:, 1:].sum(1).to(log_probs.dtype).chunk(2)
        references = (None, None) if reference is None else reference.chunk(2)
        return PreferencePairs(*log_probs.chunk(2), *references, *lengths)


def response_log_probs(
    model: nn.Module, batch: PreferenceBatch, rows: slice = slice(None)
) -> Float[Tensor, " sequences"]:
    """log π of each response: the sum over its tokens.

    The model is called with token ids, or as Hugging Face's causal models are; positions count from the first token
    that is attended to.

    >>> response_log_probs(model, batch)
    """
    attended = None if batch.attention_mask is None else batch.attention_mask[rows]
    tokens = batch.tokens[rows]
    return token_log_probs(_logits(model, tokens, attended), tokens, batch.mask[rows]).sum(1)


def _logits(model: nn.Module, tokens: Tensor, attended: Tensor | None) -> Tensor:
    known = inspect.signature(model.forward).parameters
    named: dict[str, Any] = {}
    if "attention_mask" in known:
        named["attention_mask"] = torch.ones_like(tokens) if attended is None else attended.long()
    if "position_ids" in known:
        # A row each, or else tables of positions are looked up once for all sequences, and have no gradients of theirs.
        steps = torch.ones_like(tokens) if attended is None else attended.long()
        named["position_ids"] = (steps.cumsum(1) - 1).clamp_min(0)
    if "use_cache" in known:
        named["use_cache"] = False
    return logits_of(model(input_ids=tokens, **named) if "input_ids" in known else model(tokens))


@dataclass(frozen=True)
class PairProducts:
    """⟨g_w, g_l⟩, ‖g_w‖² and ‖g_l‖² of each pair, a row a parameter, and the log-probabilities that came along.

    >>> PairProducts(("all",), torch.tensor([[[3.0], [2.0], [5.0]]])).inner
    tensor([3.])
    """

    names: tuple[str, ...]
    table: Float[Tensor, "parameters three pairs"]
    log_probs: Float[Tensor, " sequences"] | None = None

    @property
    def inner(self) -> Float[Tensor, " pairs"]:
        """⟨g_w, g_l⟩."""
        return self.table[:, 0].sum(0)

    @property
    def chosen(self) -> Float[Tensor, " pairs"]:
        """‖g_w‖²."""
        return self.table[:, 1].sum(0)

    @property
    def rejected(self) -> Float[Tensor, " pairs"]:
        """‖g_l‖²."""
        return self.table[:, 2].sum(0)

    @property
    def parameter_cosine(self) -> Float[Tensor, "parameters pairs"]:
        """Cosine of the two gradients within each parameter; NaN where one of them is 0."""
        return self.table[:, 0] / (self.table[:, 1] * self.table[:, 2]).sqrt()


def products_of(chosen: Float[Tensor, "pairs numbers"], rejected: Float[Tensor, "pairs numbers"]) -> PairProducts:
    """Products of gradients that are at hand.

    >>> products_of(torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 1.0]])).inner
    tensor([3.])
    """
    three = [(chosen * rejected).sum(1), chosen.square().sum(1), rejected.square().sum(1)]
    return PairProducts(("all",), torch.stack(three)[None])


def pair_products(
    model: nn.Module,
    batch: PreferenceBatch,
    *,
    parameters: str = "",
    preconditioner: Mapping[str, Tensor] | None = None,
    method: Method = "ghost",
    sketch_size: int = 4096,
    seed: int = 0,
) -> PairProducts:
    """Products of the gradients of each pair's two log-probabilities, in float64, without these gradients.

    Args:
        parameters: A regular expression that names must match, "last_layer" or "lora"; of a model with LoRA only its trained
            adapters count anyway, and their geometry is another than the whole model's (at the start, B = 0 and A has no
            gradient).
        preconditioner: By parameter, a diagonal P for ⟨g_w, P g_l⟩ (see `adam_preconditioner`): what a step of an
            optimizer that scales gradients by it does to first order.
        method: "ghost" takes one forward and one backward pass of the whole batch; "two_backward" two a pair, to
            compare with. "sketch" is as "ghost", with estimates of the products that are right on average, from `sketch_size`
            random projections of each parameter's gradients: for long responses, whose exact products are dear.
        seed: Of the projections.

    Raises ValueError for dropout in training mode, where no parameter matches, and for a sketch with a preconditioner.

    >>> products = pair_products(model.eval(), batch)
    >>> entanglement(products, loss.coefficients(batch.pairs(products.log_probs, reference))).case
    """
    if method == "sketch" and preconditioner is not None:
        raise ValueError("method='sketch' has no preconditioner; take method='ghost'")
    trained = trained_parameters(model, parameters)
    shapes = {name: one.shape for name, one in trained.items()}
    seeds = {name: seed * len(shapes) + place for place, name in enumerate(shapes)}

    def three(name: str, chosen: list[Use], rejected: list[Use]) -> Tensor:
        if preconditioner is not None:
            product = partial(weighted_inner_products, weights=preconditioner[name])
            parts = [product(chosen, rejected), product(chosen, chosen), product(rejected, rejected)]
        elif method == "sketch":
            one, two = (sketch(side, shapes[name], sketch_size, seeds[name]) for side in (chosen, rejected))
            parts = [(one * two).sum(1), one.square().sum(1), two.square().sum(1)]
        else:
            shape = shapes[name]
            parts = [
                inner_products(chosen, rejected, shape),
                squared_norms(chosen, shape),
                squared_norms(rejected, shape),
            ]
        return torch.stack(parts).double()

    values = partial(response_log_probs, model, batch)
    passes: Literal["ghost", "two_backward"] = "two_backward" if method == "two_backward" else "ghost"
    rows, found = reduce_pairs(model, values, batch.num_pairs, three, parameters=trained, method=passes)
    return PairProducts(tuple(found), torch.stack(list(found.values())), rows)


def adam_preconditioner(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """By parameter, what Adam scales a gradient by at present, without momentum: 1 / (√(v / (1 − β₂ᵗ)) + ε).

    Raises ValueError before the optimizer's first step.

    >>> pair_products(model, batch, preconditioner=adam_preconditioner(model, optimizer))
    """
    groups = {id(one): group for group in optimizer.param_groups for one in group["params"]}
    scales = {}
    for name, parameter in trained_parameters(model).items():
        state = optimizer.state.get(parameter, {})
        if "exp_avg_sq" not in state:
            raise ValueError(f"the optimizer has no second moments of {name}; take a step of Adam first")
        group = groups[id(parameter)]
        corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
        scales[name] = 1 / (corrected.sqrt() + group["eps"])
    return scales


def predicted_changes(
    model: nn.Module, batch: PreferenceBatch, update: Mapping[str, Tensor]
) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
    """⟨g_w, u⟩ and ⟨g_l, u⟩: what a whole update of the weights does to each pair's log-probabilities to first order.

    Batches, momentum and whatever else made the update are in it. One forward and one backward pass of the pairs.

    >>> predicted_changes(model, batch, {name: after[name] - before[name] for name in before})
    """
    trained = {name: one for name, one in trained_parameters(model).items() if name in update}

    def two(name: str, chosen: list[Use], rejected: list[Use]) -> Tensor:
        return torch.stack([along(chosen, update[name]), along(rejected, update[name])]).double()

    values = partial(response_log_probs, model, batch)
    _, found = reduce_pairs(model, values, batch.num_pairs, two, parameters=trained)
    chosen, rejected = torch.stack(list(found.values())).sum(0)
    return chosen, rejected


def token_map(
    model: nn.Module, batch: PreferenceBatch, index: int = 0, *, parameters: str = ""
) -> Float[Tensor, "chosen_tokens rejected_tokens"]:
    """⟨∇log π(token t of the chosen response), ∇log π(token s of the rejected one)⟩ of one pair; its sum is ⟨g_w, g_l⟩.

    One backward pass a token. A regular expression for the last layer makes it cheap.

    >>> token_map(model, batch)
    """
    pair = batch.pair(index)
    is_response = pair.mask[:, 1:].bool()
    rows = [
        (pair.tokens[[row]], pair.mask[[row]], *(() if pair.attention_mask is None else (pair.attention_mask[[row]],)))
        for row in range(2)
    ]
    trained = {f"model.{name}": one for name, one in trained_parameters(model, parameters).items()}
    kernel: Tensor = ntk(_TokenLogProbs(model), *rows, params=trained)
    # Tokens off the responses have no gradient; both sides keep their full length until here.
    return kernel[0, 0][is_response[0]][:, is_response[1]]


class _TokenLogProbs(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor, attended: Tensor | None = None) -> Tensor:
        # Autograd's own operations: torch.func, which knows the parameters that layers do not, wants no others.
        scores = _logits(self.model, tokens, attended)[:, :-1].log_softmax(-1)
        return scores.gather(-1, tokens[:, 1:, None])[..., 0] * mask[:, 1:]


@dataclass(frozen=True)
class Geometry:
    """The first-order fate of each pair, (pairs,) each; changes are in nats for a step of the given size.

    `chosen_slack` = (d_w/d_l) ‖g_w‖² − ⟨g_w, g_l⟩ and `rejected_slack` = (d_l/d_w) ‖g_l‖² − ⟨g_w, g_l⟩ are positive where that
    response goes the right way, for positive coefficients; where a coefficient is 0 they are infinite, or NaN. `score` is
    ⟨g_w, g_l⟩ over the smaller squared norm: with equal coefficients 1 or more is entangled. `case` has values of `Case`.
    """

    cosine: Float[Tensor, " pairs"]
    norm_ratio: Float[Tensor, " pairs"]
    score: Float[Tensor, " pairs"]
    chosen_slack: Float[Tensor, " pairs"]
    rejected_slack: Float[Tensor, " pairs"]
    chosen_change: Float[Tensor, " pairs"]
    rejected_change: Float[Tensor, " pairs"]
    case: Int[Tensor, " pairs"]


def entanglement(products: PairProducts, weights: Coefficients, lr: float = 1.0) -> Geometry:
    """What a step of gradient descent of size `lr` on a pair does to its two responses, to first order.

    `norm_ratio` is ‖g_l‖/‖g_w‖: above 1 an entangled pair of an even-handed loss falls, below 1 it rises. Signs are those
    of the changes, so a loss with negative coefficients (IPO past its target) is judged rightly. Equations 4 to 7.

    >>> entanglement(products_of(torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 1.0]])), (torch.ones(1), torch.ones(1))).case
    tensor([1])
    """
    inner, chosen, rejected = products.inner, products.chosen, products.rejected
    pull, push = (one.to(inner.dtype) for one in weights)
    up = lr * (pull * chosen - push * inner)
    down = lr * (pull * inner - push * rejected)
    case = torch.full_like(inner, Case.REVERSED, dtype=torch.long)
    case = case.masked_fill((up <= 0) & (down < 0), Case.BOTH_FALL).masked_fill((up > 0) & (down >= 0), Case.BOTH_RISE)
    case = case.masked_fill((up > 0) & (down < 0), Case.IDEAL).masked_fill((up == 0) & (down == 0), Case.STILL)
    return Geometry(
        cosine=inner / (chosen * rejected).sqrt(),
        norm_ratio=(rejected / chosen).sqrt(),
        score=inner / torch.minimum(chosen, rejected),
        chosen_slack=pull / push * chosen - inner,
        rejected_slack=push / pull * rejected - inner,
        chosen_change=up,
        rejected_change=down,
        case=case,
    )


def summarized(geometry: Geometry) -> dict[str, Tensor]:
    """Means over pairs, by the name that a record knows them by; medians of what may be infinite.

    >>> summarized(entanglement(pair_products(model, batch), weights, lr))["entanglement/cosine"]
    """
    shares = torch.stack([(geometry.case == case).double().mean() for case in Case])
    return {
        "entanglement/case_share": shares,
        "entanglement/cosine": geometry.cosine.nanmean(),
        "entanglement/norm_ratio": geometry.norm_ratio.nanmedian(),
        "entanglement/score": geometry.score.nanmedian(),
        "entanglement/chosen_change": geometry.chosen_change.mean(),
        "entanglement/rejected_change": geometry.rejected_change.mean(),
    }


class Entanglement(Probe):
    """How entangled the gradients of held-out preference pairs are, and what the loss would do to either response.

    Args:
        batch: The same pairs at every look.
        loss: A margin loss, or any function of `PreferencePairs`.
        reference: Log-probabilities of the reference, (sequences,); by default the model's own at the first look, which
            is where preference training starts.
        parameters: A regular expression for the parameters that count, "last_layer" or "lora".
        method: As in `pair_products`.
        keeps_weights: Also compare what the update since the last look should have done to first order with what it
            did; for that the weights of the last look are kept, once the model's memory.

    Changes are for one step of plain gradient descent at the run's learning rate on each pair alone. A pair may look ideal
    while the mean log-probability falls, by the updates of other pairs: `entanglement/log_prob` tells. Cost: a forward and
    a backward pass of the pairs (twice that with `keeps_weights`).

    >>> probe = Entanglement(PreferenceBatch(tokens, response_mask), margin_loss("dpo", beta=0.1))
    >>> dynascope.watch(model, optimizer, every=50, probes=[probe])
    """

    name = "entanglement"
    needs = frozenset({Need.MODEL})
    default = False
    series = (
        Series(
            "entanglement/case_share",
            ("case",),
            description="Share of pairs in each case.",
            coords={"case": [case.name.lower().replace("_", " ") for case in Case]},
        ),
        Series("entanglement/cosine", description="Mean cosine of the gradients of chosen and rejected responses."),
        Series("entanglement/norm_ratio", description="Median norm of the rejected gradient over the chosen one's."),
        Series("entanglement/score", description="Median inner product over the smaller squared norm; 1: entangled."),
        Series(
            "entanglement/chosen_change", unit="nat", description="Predicted change of a chosen response by a step."
        ),
        Series("entanglement/rejected_change", unit="nat", description="Predicted change of a rejected response."),
        Series("entanglement/parameter_cosine", ("parameter",), description="The cosine within each parameter."),
        Series(
            "entanglement/log_prob",
            ("side",),
            unit="nat",
            description="Mean log-probability of the responses.",
            coords={"side": ["chosen", "rejected"]},
        ),
        Series(
            "entanglement/predicted_change",
            ("side",),
            unit="nat",
            description="Mean change since the last look, to first order in the update.",
            coords={"side": ["chosen", "rejected"]},
        ),
        Series(
            "entanglement/realised_change",
            ("side",),
            unit="nat",
            description="Mean change since the last look.",
            coords={"side": ["chosen", "rejected"]},
        ),
    )

    def __init__(
        self,
        batch: PreferenceBatch,
        loss: PairLoss | None = None,
        *,
        reference: Float[Tensor, " sequences"] | None = None,
        parameters: str = "",
        method: Method = "ghost",
        keeps_weights: bool = False,
    ) -> None:
        self.batch, self.loss, self.reference = batch, loss or margin_loss("dpo"), reference
        self.parameters, self.method, self.keeps_weights = parameters, method, keeps_weights
        self._before: tuple[dict[str, Tensor], Tensor] | None = None

    def coords(self, view: ModelView) -> Mapping[str, Sequence[str]]:
        """The names of the parameters that count."""
        return {"parameter": list(trained_parameters(view.model, self.parameters))}

    def measure(self, view: ModelView) -> Mapping[str, Tensor]:
        """One look at the pairs."""
        products = pair_products(view.model, self.batch, parameters=self.parameters, method=self.method)
        assert products.log_probs is not None
        self.reference = products.log_probs if self.reference is None else self.reference
        weights = coefficients_by_autograd(self.loss, self.batch.pairs(products.log_probs, self.reference))
        measured = summarized(entanglement(products, weights, view.lr))
        measured["entanglement/parameter_cosine"] = products.parameter_cosine.nanmean(1)
        measured["entanglement/log_prob"] = _side_means(products.log_probs)
        if self.keeps_weights:
            measured |= self._changes(view.model, products.log_probs)
        return measured

    def _changes(self, model: nn.Module, log_probs: Tensor) -> dict[str, Tensor]:
        now = {name: one.detach().clone() for name, one in trained_parameters(model).items()}
        before, self._before = self._before, (now, log_probs)
        if before is None:
            return {}
        update = {name: one - before[0][name] for name, one in now.items()}
        # By the gradients of today: the update is small where first order says anything, and no weight is put back.
        predicted = torch.stack([one.mean() for one in predicted_changes(model, self.batch, update)])
        realised = _side_means(log_probs) - _side_means(before[1])
        return {"entanglement/predicted_change": predicted, "entanglement/realised_change": realised}


def _side_means(log_probs: Float[Tensor, " sequences"]) -> Float[Tensor, " side"]:
    return log_probs.view(2, -1).mean(1)
