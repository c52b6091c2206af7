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

from dynascope.kernels.layerwise import LayerTap, Use, called, frozen, functional, refuse_mixing, uses
from dynascope.kernels.products import MAX_EXPLICIT, squared_norms

LossFunction: TypeAlias = Callable[[Any, Any], Tensor]
"""(what the model returns, targets) -> one loss an example, (examples,)."""

Method: TypeAlias = Literal["ghost", "vmap", "loop"]


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
                sums.append(squared_norms([use], tap.shapes[id(parameter)]))
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
        total = total + squared_norms(of_one, tap.shapes[identity])
    return total, {name: one for name, one in parameters.items() if id(one) in tap.unknown}
