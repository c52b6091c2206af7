"""Inner products of the gradients of pairs of examples, for all pairs of a batch in one forward and one backward pass."""

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dynascope.kernels.layerwise import Explicit, LayerTap, Use, frozen, refuse_mixing, uses
from dynascope.kernels.products import at

Reduce: TypeAlias = Callable[[str, list[Use], list[Use]], Tensor]
"""(a parameter's name, its uses by the first of each pair, by the second of each) -> (quantities, pairs)."""

Values: TypeAlias = Callable[[slice], Tensor]
"""Rows of the batch -> one number a row, (rows,), computed by the model."""


def reduce_pairs(
    model: nn.Module,
    values: Values,
    num_pairs: int,
    reduce: Reduce,
    *,
    parameters: Mapping[str, nn.Parameter],
    method: Literal["ghost", "two_backward"] = "ghost",
) -> tuple[Float[Tensor, " rows"], dict[str, Float[Tensor, "quantities pairs"]]]:
    """`reduce` of the gradients of values in pairs (row i and row num_pairs + i), parameter by parameter.

    "ghost" hands over layers' factors as soon as one backward pass of the batch meets them, and forms no gradient.
    Parameters that are used in another way than `layerwise.uses` knows are told in a warning, and take two backward
    passes a pair; "two_backward" takes these for all parameters.

    Raises ValueError for batch normalization and dropout in training mode.

    >>> reduce_pairs(model, lambda rows: model(x[rows]).sum(1), 8, reduce, parameters=dict(model.named_parameters()))
    """
    refuse_mixing(model)
    _refuse_dropout(model)
    found: dict[str, Tensor] = {}
    left_over = dict(parameters)
    if method == "ghost":
        rows, left_over = _by_layer(model, values, num_pairs, reduce, parameters, found)
        if left_over:
            names = ", ".join(left_over)
            warnings.warn(f"no ghost products for {names}: these take two backward passes a pair", stacklevel=3)
    if left_over:
        rows = _by_pair(values, num_pairs, reduce, left_over, found)
    return rows, {name: found[name] for name in parameters}


def _by_layer(
    model: nn.Module,
    values: Values,
    num_pairs: int,
    reduce: Reduce,
    parameters: Mapping[str, nn.Parameter],
    found: dict[str, Tensor],
) -> tuple[Tensor, dict[str, nn.Parameter]]:
    names = {id(parameter): name for name, parameter in parameters.items()}
    shared: dict[str, list[Use]] = {}

    def halves(of_one: list[Use]) -> tuple[list[Use], list[Use]]:
        first, second = slice(0, num_pairs), slice(num_pairs, 2 * num_pairs)
        return [at(use, first) for use in of_one], [at(use, second) for use in of_one]

    @torch.no_grad()
    def receive(module: nn.Module, incoming: Tensor, gradient: Tensor) -> None:
        # Products of low precision cancel: factors are widened first.
        if gradient.dtype in (torch.bfloat16, torch.float16):
            gradient = gradient.float()
        incoming = incoming.to(gradient.dtype) if incoming.is_floating_point() else incoming
        for name, use in uses(module, incoming, gradient):
            parameter = module._parameters[name]
            if not tap.knows(parameter):
                continue
            if tap.num_uses[id(parameter)] == 1:
                found[names[id(parameter)]] = reduce(names[id(parameter)], *halves([use]))
            else:
                shared.setdefault(names[id(parameter)], []).append(use)

    tap = LayerTap(model, parameters.values(), 2 * num_pairs, receive)
    # All that are trained, not the chosen ones alone: then the tap's anchor is the only leaf that gradients flow to.
    with frozen([one for one in model.parameters() if one.requires_grad]), torch.enable_grad():
        rows = tap.forward(lambda: values(slice(None)))
        tap.backward(rows.sum())
    for name, of_one in shared.items():
        found[name] = reduce(name, *halves(of_one))
    left_over = {name: one for name, one in parameters.items() if name not in found}
    return rows.detach(), left_over


def _by_pair(
    values: Values, num_pairs: int, reduce: Reduce, parameters: Mapping[str, nn.Parameter], found: dict[str, Tensor]
) -> Tensor:
    each: dict[str, list[Tensor]] = {name: [] for name in parameters}
    rows: list[list[Tensor]] = [[], []]
    for pair in range(num_pairs):
        sides: list[dict[str, Tensor]] = []
        for side, row in enumerate((pair, num_pairs + pair)):
            with torch.enable_grad():
                value = values(slice(row, row + 1))
            rows[side].append(value.detach())
            gradients = torch.autograd.grad(value.sum(), list(parameters.values()), allow_unused=True)
            sides.append(
                {
                    name: torch.zeros_like(parameter) if gradient is None else gradient
                    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
                }
            )
        for name in parameters:
            first, second = (Explicit(side[name][None]) for side in sides)
            with torch.no_grad():
                each[name].append(reduce(name, [first], [second]))
    found |= {name: torch.cat(parts, -1) for name, parts in each.items()}
    return torch.cat([*rows[0], *rows[1]])


def _refuse_dropout(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(f"{name} is dropout in training mode, which makes gradients random; call model.eval()")


def trained_parameters(model: nn.Module, pattern: str = "") -> dict[str, nn.Parameter]:
    """Trained parameters by name, of those whose name has a match of the regular expression.

    "lora" stands for adapters of that kind (`lora_A`, `lora_B`, …). "last_layer" for the layer that gives the logits: the one
    that the model calls its output embeddings, or else its last module with trained parameters of its own.

    Raises ValueError where there is none.

    >>> trained_parameters(model, r"layers\\.11\\.")
    """
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    if pattern == "last_layer":
        last = {id(one) for one in _last_layer(model).parameters()}
        found = {name: one for name, one in trained.items() if id(one) in last}
    else:
        expression = r"\blora_" if pattern == "lora" else pattern
        found = {name: one for name, one in trained.items() if re.search(expression, name)}
    if not found:
        raise ValueError(f"no trained parameter's name matches {pattern!r}")
    return found


def _last_layer(model: nn.Module) -> nn.Module:
    ask = getattr(model, "get_output_embeddings", None)
    told = None if ask is None else ask()
    if isinstance(told, nn.Module):
        return told
    owners = [
        module
        for module in model.modules()
        if module is not model and any(one.requires_grad for one in module.parameters(recurse=False))
    ]
    return owners[-1] if owners else model
