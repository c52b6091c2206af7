"""Weights under which the chosen response rises and the rejected one falls, whatever their gradients (arXiv 2410.13828).

To first order a step of size η moves log π(y_w) by η (d_w ‖g_w‖² − d_l ⟨g_w, g_l⟩) and log π(y_l) by
η (d_w ⟨g_w, g_l⟩ − d_l ‖g_l‖²). What these remedies choose is (d_w, d_l).
"""

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from dynascope.losses.preference import Coefficients, MarginLoss, PreferencePairs

Squares = Float[Tensor, " pairs"]
Side: TypeAlias = Sequence[Tensor | None]
"""A gradient, by parameter."""


def normalized_weights(chosen_square: Squares, rejected_square: Squares, weights: Coefficients) -> Coefficients:
    """Weights c/‖g_w‖ and c/‖g_l‖: no response outweighs the other by the length of its gradient.

    To first order the chosen response then never falls and the rejected one never rises. c = (d_w ‖g_w‖ + d_l ‖g_l‖)/2
    keeps the size of the step; it is negative where the loss wants a smaller margin (IPO past its target), and the two
    responses then go the other way. A gradient of 0 gets a weight of 0.

    >>> normalized_weights(torch.tensor([2.0]), torch.tensor([5.0]), (torch.ones(1), torch.ones(1)))
    """
    chosen, rejected = chosen_square.sqrt(), rejected_square.sqrt()
    scale = (weights[0] * chosen + weights[1] * rejected) / 2
    return scale * _reciprocal(chosen), scale * _reciprocal(rejected)


def disentangled_weights(
    inner: Squares,
    chosen_square: Squares,
    rejected_square: Squares,
    weights: Coefficients,
    *,
    inside: float = 0.1,
) -> Coefficients:
    """The weights nearest to the loss's own under which both responses go the right way.

    For ⟨g_w, g_l⟩ > 0 that is so where d_w / d_l lies between ⟨g_w, g_l⟩/‖g_w‖² and ‖g_l‖²/⟨g_w, g_l⟩; the ratio is moved
    into that interval, a share `inside` of its length (in logarithms) from its ends, and the product d_w d_l is kept.
    Otherwise, and where a weight is not positive, the weights stay as they are.

    Raises ValueError for `inside` not in [0, 0.5].

    >>> disentangled_weights(inner, chosen_square, rejected_square, loss.coefficients(pairs))
    """
    if not 0 <= inside <= 0.5:
        raise ValueError(f"inside={inside}: it must lie between 0 and 0.5")
    chosen, rejected = weights
    is_entangled = (inner > 0) & (chosen > 0) & (rejected > 0)
    ones = torch.ones_like(inner)
    shared, of_chosen, of_rejected = (
        torch.where(is_entangled, one, ones) for one in (inner, chosen_square, rejected_square)
    )
    low, high = torch.log(shared / of_chosen), torch.log(of_rejected / shared)
    margin = inside * (high - low).clamp_min(0)
    ratio = torch.log(torch.where(is_entangled, chosen / rejected, ones))
    moved = torch.minimum(torch.maximum(ratio, low + margin), high - margin)
    half = torch.exp((moved - ratio) / 2)
    return torch.where(is_entangled, chosen * half, chosen), torch.where(is_entangled, rejected / half, rejected)


def _reciprocal(norm: Tensor) -> Tensor:
    return torch.where(norm > 0, 1 / norm.clamp_min(torch.finfo(norm.dtype).tiny), torch.zeros_like(norm))


class DisentangledWeights:
    """A margin loss with weights chosen pair by pair from the geometry of its gradients: its value, other gradients.

    Norms and inner products of the responses' gradients come from `dynascope.probes.entanglement.pair_products`, at the
    price of one more forward and backward pass. `is_normalized` takes `normalized_weights` instead of
    `disentangled_weights`.

    >>> loss = DisentangledWeights(margin_loss("dpo"))
    >>> products = pair_products(model, batch)
    >>> loss(pairs, products.inner, products.chosen, products.rejected).mean().backward()
    """

    def __init__(self, loss: MarginLoss, *, is_normalized: bool = False) -> None:
        self.loss, self.is_normalized = loss, is_normalized

    def __call__(
        self, pairs: PreferencePairs, inner: Squares, chosen_square: Squares, rejected_square: Squares
    ) -> Float[Tensor, " pairs"]:
        """The loss of each pair, with the remedied gradient."""
        with torch.no_grad():
            value, weights = self.loss(pairs), self.loss.coefficients(pairs)
            chosen, rejected = chosen_square.to(value.dtype), rejected_square.to(value.dtype)
            if self.is_normalized:
                pull, push = normalized_weights(chosen, rejected, weights)
            else:
                pull, push = disentangled_weights(inner.to(value.dtype), chosen, rejected, weights)
        surrogate = push * pairs.rejected - pull * pairs.chosen
        return value + surrogate - surrogate.detach()


class PairwiseNormalizedPreference:
    """A margin loss whose step pulls chosen responses up and pushes rejected ones down with equally long gradients.

    The batch's two gradients, G_w = mean d_w g_w and G_l = mean d_l g_l, are each brought to the length
    (‖G_w‖ + ‖G_l‖)/2 before they are subtracted. With one pair a batch that is `normalized_weights`; with several it
    holds for the batch as a whole, at the price of one more backward pass and of one more gradient in memory. With several
    processes the batch is that of all of them, and each gets the same gradient, in `DistributedDataParallel` or without.

    >>> loss = PairwiseNormalizedPreference(margin_loss("dpo"))
    >>> loss.backward(pairs, model.parameters()); optimizer.step()
    """

    def __init__(self, loss: MarginLoss) -> None:
        self.loss = loss

    def backward(self, pairs: PreferencePairs, parameters: Iterable[nn.Parameter]) -> Float[Tensor, ""]:
        """Adds the normalized gradient to each parameter's `grad`; returns the mean loss, detached."""
        trained = [one for one in parameters if one.requires_grad]
        with torch.no_grad():
            value, weights = self.loss(pairs), self.loss.coefficients(pairs)
        sides, (pull, push) = normalized_sides((pairs.chosen, pairs.rejected), weights, trained)
        for parameter, up, down in zip(trained, *sides, strict=True):
            step = _difference(up, down, pull, push)
            if step is not None:
                parameter.grad = -step if parameter.grad is None else parameter.grad - step
        return value.mean()


def _difference(up: Tensor | None, down: Tensor | None, pull: Tensor, push: Tensor) -> Tensor | None:
    if up is None:
        return None if down is None else -push * down
    return pull * up if down is None else pull * up - push * down


def normalized_sides(
    log_probs: tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]],
    weights: Coefficients,
    trained: Sequence[nn.Parameter],
) -> tuple[tuple[Side, Side], tuple[Float[Tensor, ""], Float[Tensor, ""]]]:
    """G_w = mean d_w g_w and G_l = mean d_l g_l by parameter, and what brings either to the length (‖G_w‖ + ‖G_l‖)/2.

    With several processes these are means over all of them, so that each scales alike. The graph is kept; a parameter that
    takes no part has None.

    >>> (up, down), (pull, push) = normalized_sides((pairs.chosen, pairs.rejected), loss.coefficients(pairs), trained)
    """
    is_shared = dist.is_available() and dist.is_initialized()
    sides: list[Side] = [
        torch.autograd.grad(
            (weight.to(one.dtype) * one).mean(),
            trained,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=is_shared,  # all processes sum the same parameters
        )
        for one, weight in zip(log_probs, weights, strict=True)
    ]
    if is_shared:
        # Gradients that are asked for do not pass the hooks by which processes share theirs.
        for gradient in (*sides[0], *sides[1]):
            assert gradient is not None
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    norms = [torch.nn.utils.get_total_norm([one for one in side if one is not None]) for side in sides]
    length = (norms[0] + norms[1]) / 2
    return (sides[0], sides[1]), (length * _reciprocal(norms[0]), length * _reciprocal(norms[1]))
