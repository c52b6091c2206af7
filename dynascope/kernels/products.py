"""Inner products of the gradients of single examples, from what `layerwise.uses` tells of a layer, without the gradients.

⟨Σ_t left_t ⊗ right_t, Σ_s left'_s ⊗ right'_s⟩ = Σ_ts ⟨left_t, left'_s⟩ ⟨right_t, right'_s⟩: two Gram matrices an example.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dynascope.kernels.layerwise import Explicit, Outer, Use

MAX_EXPLICIT = 2**26
"""Numbers of explicit gradients held at once."""


def inner_products(ones: Sequence[Use], twos: Sequence[Use], shape: torch.Size) -> Float[Tensor, " examples"]:
    """⟨gradient of one, gradient of two⟩, example by example, of a weight of this shape.

    Each side lists all uses of the weight in the model, whose gradients add up; so cross terms of shared weights count.

    >>> inner_products([chosen_use], [rejected_use], module.weight.shape)
    """
    outer = [use for use in (*ones, *twos) if isinstance(use, Outer)]
    if len(outer) < len(ones) + len(twos):
        sides = [torch.stack([use.explicit(shape) for use in uses]).sum(0).flatten(1) for uses in (ones, twos)]
        return (sides[0] * sides[1]).sum(1)
    products = [
        _inner(one, two, shape) for one in ones for two in twos if isinstance(one, Outer) and isinstance(two, Outer)
    ]
    return torch.stack(products).sum(0)


def squared_norms(uses: Sequence[Use], shape: torch.Size) -> Float[Tensor, " examples"]:
    """‖gradient‖² of each example, of a weight that is used in these ways.

    >>> squared_norms([use], module.weight.shape)
    """
    outer = [use for use in uses if isinstance(use, Outer)]
    if len(outer) < len(uses):
        return inner_products(uses, uses, shape)
    total = torch.stack([_square(use, shape) for use in outer]).sum(0)
    for index, one in enumerate(outer):
        for two in outer[index + 1 :]:
            total = total + 2 * _inner(one, two, shape)
    return total


def _square(use: Outer, shape: torch.Size) -> Float[Tensor, " examples"]:
    if use.is_lookup:
        return _square_of_lookup(use, shape[0])
    if use.gradients.shape[1] == 1:
        return use.inputs.square().sum((1, 2)) * use.gradients.square().sum((1, 2))
    if _is_short(use, use):
        return _gram(use, use)
    parts = _split((use,), shape)
    return torch.cat([torch.linalg.vector_norm(g.mT @ x, dim=(1, 2)).square() for x, g in parts])


def _square_of_lookup(use: Outer, num_rows: int) -> Float[Tensor, " examples"]:
    """What each example adds to each row that it looked up, summed before it is squared."""
    num_examples = len(use.gradients)
    offsets = num_rows * torch.arange(num_examples, device=use.inputs.device)
    rows, group = torch.unique(use.inputs + offsets[:, None], return_inverse=True)
    sums = use.gradients.new_zeros(len(rows), use.gradients.shape[-1])
    sums.index_add_(0, group.flatten(), use.gradients.flatten(0, 1))
    zeros = use.gradients.new_zeros(num_examples)
    return zeros.index_add_(0, rows // num_rows, sums.square().sum(1))


def _inner(one: Outer, two: Outer, shape: torch.Size) -> Float[Tensor, " examples"]:
    if one.is_lookup or two.is_lookup or _is_short(one, two):
        return _gram(one, two)
    parts = _split((one, two), shape)
    if one.is_input_first == two.is_input_first:
        return torch.cat([((g.mT @ x) * (h.mT @ y)).sum((1, 2)) for x, g, y, h in parts])
    return torch.cat([((g.mT @ x) * (y.mT @ h)).sum((1, 2)) for x, g, y, h in parts])


def _is_short(one: Outer, two: Outer) -> bool:
    """Whether Gram matrices take fewer multiplications than forming the gradients, which many positions are better for."""
    (num_ones, width), num_twos = one.inputs.shape[1:], two.inputs.shape[1]
    other_width = one.gradients.shape[-1]
    num_positions = num_ones if one is two else num_ones + num_twos
    return num_ones * num_twos * (width + other_width) <= num_positions * width * other_width


def _split(uses: Sequence[Outer], shape: torch.Size) -> list[tuple[Tensor, ...]]:
    """The factors, of some examples at a time."""
    size = max(1, MAX_EXPLICIT // (shape.numel() * len(uses)))
    return list(zip(*(part.split(size) for use in uses for part in (use.inputs, use.gradients)), strict=True))


def _gram(one: Outer, two: Outer) -> Float[Tensor, " examples"]:
    (left, right), (other_left, other_right) = sides(one), sides(two)
    if one.is_lookup and two.is_lookup:
        lefts = (left[:, :, None] == other_left[:, None]).to(right.dtype)
    elif one.is_lookup:
        rows = left[:, None].expand(-1, other_left.shape[1], -1)
        lefts = other_left.gather(2, rows).transpose(1, 2)
    elif two.is_lookup:
        return _gram(two, one)
    else:
        lefts = left @ other_left.transpose(1, 2)
    return (lefts * (right @ other_right.transpose(1, 2))).sum((1, 2))


def sides(use: Outer) -> tuple[Tensor, Tensor]:
    """The factors in the order of the weight's axes.

    >>> left, right = sides(use)
    """
    return (use.inputs, use.gradients) if use.is_input_first else (use.gradients, use.inputs)


def weighted_inner_products(ones: Sequence[Use], twos: Sequence[Use], weights: Tensor) -> Float[Tensor, " examples"]:
    """Σ weights · (gradient of one) · (gradient of two), example by example: the inner product under a diagonal metric.

    A diagonal metric takes the products apart no more, so gradients are formed, of some examples at a time.

    >>> weighted_inner_products([chosen_use], [rejected_use], 1 / (exp_avg_sq.sqrt() + eps))
    """
    shape, num_examples = weights.shape, len(ones[0].gradients)
    size = max(1, MAX_EXPLICIT // (2 * shape.numel()))
    parts = []
    for first in range(0, num_examples, size):
        rows = slice(first, first + size)
        sides = [torch.stack([at(use, rows).explicit(shape) for use in uses]).sum(0) for uses in (ones, twos)]
        parts.append((sides[0] * sides[1] * weights).flatten(1).sum(1))
    return torch.cat(parts)


def along(uses: Sequence[Use], direction: Tensor) -> Float[Tensor, " examples"]:
    """⟨gradient, direction⟩ of each example, for a direction in the weight's own shape.

    >>> along([use], weight_now - weight_before)
    """
    total = []
    for use in uses:
        if not isinstance(use, Outer):
            total.append(use.gradients.flatten(1) @ direction.flatten())
        elif use.is_lookup:
            total.append((direction[use.inputs] * use.gradients).sum((1, 2)))
        else:
            left, right = sides(use)
            total.append((left @ direction.flatten(1) * right).sum((1, 2)))
    return torch.stack(total).sum(0)


def at(use: Use, rows: slice) -> Use:
    """The same of some of the examples."""
    if isinstance(use, Outer):
        return Outer(use.inputs[rows], use.gradients[rows], use.is_input_first)
    return Explicit(use.gradients[rows])
