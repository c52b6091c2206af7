"""The norm of every example's own gradient, without computing those gradients one by one.

A layer's gradient for one example is a sum over positions of outer products, (gradient of the output) ⊗ (input). The
norm of such a sum follows from two small Gram matrices, so one forward and one backward of the batch are enough.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils._pytree import tree_leaves, tree_map

from dynascope.kernels.layerwise import (
    Explicit,
    LayerTap,
    Outer,
    Use,
    called,
    frozen,
    functional,
    refuse_mixing,
    uses,
)

LossFunction: TypeAlias = Callable[[Any, Any], Tensor]
"""(what the model returns, targets) -> one loss an example, (examples,)."""

Method: TypeAlias = Literal["ghost", "vmap", "loop"]

MAX_EXPLICIT = 2**26  # numbers of explicit gradients held at once


def per_example_gradient_norms(
    model: nn.Module, loss_fn: LossFunction, inputs: Any, targets: Any, *, method: Method = "ghost"
) -> Float[Tensor, " examples"]:
    """‖∇ of each example's loss‖ over all trained parameters together.

    Args:
        inputs: A tensor, or a tuple or mapping of tensors with which the model is called; examples along the first axis.
        loss_fn: One loss an example, from what the model returns and `targets`.
        method: "ghost" needs one forward and one backward; "vmap" (`torch.func`) and "loop" compute every gradient and
            are there to compare with. Ghost norms know linear, convolution, embedding and normalization layers, also
            with shared weights; parameters that are used in another way fall back to vmap, with a warning that names
            them.

    Raises ValueError for batch normalization in training mode, under which examples have no gradient of their own.

    >>> per_example_gradient_norms(model, partial(F.cross_entropy, reduction="none"), images, labels)
    """
    refuse_mixing(model)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
    if method == "vmap":
        return _by_vmap(model, loss_fn, inputs, targets, parameters).sqrt()
    if method == "loop":
        return _by_loop(model, loss_fn, inputs, targets, parameters).sqrt()
    if method != "ghost":
        raise ValueError(f"method is ghost, vmap or loop, not {method!r}")
    squares, left_over = _ghost(model, loss_fn, inputs, targets, parameters)
    if left_over:
        names = ", ".join(left_over)
        warnings.warn(f"no ghost norms for {names}: these take an additional pass with torch.func.vmap", stacklevel=2)
        squares = squares + _by_vmap(model, loss_fn, inputs, targets, left_over)
    # Rounding can leave a sum of products that should be 0 a little below.
    return squares.clamp_min(0).sqrt()


# The naive ways


def _by_vmap(
    model: nn.Module, loss_fn: LossFunction, inputs: Any, targets: Any, parameters: Mapping[str, Tensor]
) -> Float[Tensor, " examples"]:
    function = functional(model, parameters)

    def loss(chosen: Mapping[str, Tensor], one: Any, target: Any) -> Tensor:
        one, target = (tree_map(lambda leaf: leaf[None], part) for part in (one, target))
        return loss_fn(function(chosen, one), target).sum()

    detached = {name: parameter.detach() for name, parameter in parameters.items()}
    num_numbers = sum(parameter.numel() for parameter in detached.values())
    gradients = vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=max(1, MAX_EXPLICIT // max(1, num_numbers)))
    each = gradients(detached, inputs, targets)
    return torch.stack([one.flatten(1).square().sum(1) for one in each.values()]).sum(0)


def _by_loop(
    model: nn.Module, loss_fn: LossFunction, inputs: Any, targets: Any, parameters: Mapping[str, Tensor]
) -> Float[Tensor, " examples"]:
    squares = []
    for index in range(len(tree_leaves(targets)[0])):
        one, target = (tree_map(lambda leaf: leaf[index : index + 1], part) for part in (inputs, targets))  # noqa: B023
        with torch.enable_grad():
            loss = loss_fn(called(model, one), target).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        squares.append(sum((one.square().sum() for one in gradients if one is not None), loss.new_zeros(())))
    return torch.stack(squares)


# Ghost norms


def _ghost(
    model: nn.Module, loss_fn: LossFunction, inputs: Any, targets: Any, parameters: Mapping[str, nn.Parameter]
) -> tuple[Float[Tensor, " examples"], dict[str, nn.Parameter]]:
    """Squared norms over the parameters that are known, and the parameters that are not."""
    num_examples = len(tree_leaves(targets)[0])
    shared: dict[int, list[Use]] = {}
    sums: list[Tensor] = []

    @torch.no_grad()
    def receive(module: nn.Module, incoming: Tensor, gradient: Tensor) -> None:
        for name, use in uses(module, incoming, gradient):
            parameter = module._parameters[name]
            if not tap.knows(parameter):
                continue
            if tap.num_uses[id(parameter)] == 1:
                sums.append(_square(use, tap.shapes[id(parameter)]))
            else:
                shared.setdefault(id(parameter), []).append(use)

    tap = LayerTap(model, parameters.values(), num_examples, receive)
    with frozen(parameters.values()), torch.enable_grad():
        losses = tap.forward(lambda: loss_fn(called(model, inputs), targets))
        if losses.shape != (num_examples,):
            told = f"loss_fn gave shape {tuple(losses.shape)}"
            raise ValueError(f"{told}, not one loss for each of {num_examples} examples")
        tap.backward(losses.sum())
    total = torch.stack(sums).sum(0) if sums else losses.detach().new_zeros(num_examples)
    for identity, of_one in shared.items():
        total = total + _square_of_sum(of_one, tap.shapes[identity])
    return total, {name: one for name, one in parameters.items() if id(one) in tap.unknown}


def _square(use: Use, shape: torch.Size) -> Float[Tensor, " examples"]:
    if isinstance(use, Explicit):
        return use.gradients.flatten(1).square().sum(1)
    length = use.gradients.shape[1]
    if length == 1 and not use.is_lookup:
        return use.inputs.square().sum((1, 2)) * use.gradients.square().sum((1, 2))
    if use.is_lookup or length**2 <= shape[0] * shape[1:].numel():
        return _inner(use, use)
    return _explicit_square(use, shape)


def _explicit_square(use: Outer, shape: torch.Size) -> Float[Tensor, " examples"]:
    """By the gradients themselves, some examples at a time; the better way for more positions than weights."""
    size = max(1, MAX_EXPLICIT // shape.numel())
    parts = zip(use.inputs.split(size), use.gradients.split(size), strict=True)
    return torch.cat([(gradient.mT @ incoming).square().sum((1, 2)) for incoming, gradient in parts])


def _inner(one: Outer, two: Outer) -> Float[Tensor, " examples"]:
    """⟨Σ_t left_t ⊗ right_t, Σ_s left'_s ⊗ right'_s⟩ = Σ_ts ⟨left_t, left'_s⟩ ⟨right_t, right'_s⟩."""
    (left, right), (other_left, other_right) = _sides(one), _sides(two)
    if one.is_lookup and two.is_lookup:
        lefts = (left[:, :, None] == other_left[:, None]).to(right.dtype)
    elif one.is_lookup:
        rows = left[:, None].expand(-1, other_left.shape[1], -1)
        lefts = other_left.gather(2, rows).transpose(1, 2)
    elif two.is_lookup:
        return _inner(two, one)
    else:
        lefts = left @ other_left.transpose(1, 2)
    return (lefts * (right @ other_right.transpose(1, 2))).sum((1, 2))


def _sides(use: Outer) -> tuple[Tensor, Tensor]:
    """The factors in the order of the weight's axes."""
    return (use.inputs, use.gradients) if use.is_input_first else (use.gradients, use.inputs)


def _square_of_sum(of_one: list[Use], shape: torch.Size) -> Float[Tensor, " examples"]:
    """A weight that several layers share: its gradient is the sum over them, so their cross terms count."""
    outer = [use for use in of_one if isinstance(use, Outer)]
    if len(outer) < len(of_one):
        return torch.stack([use.explicit(shape) for use in of_one]).sum(0).flatten(1).square().sum(1)
    total = torch.stack([_square(use, shape) for use in outer]).sum(0)
    for index, one in enumerate(outer):
        for two in outer[index + 1 :]:
            total = total + 2 * _inner(one, two)
    return total
