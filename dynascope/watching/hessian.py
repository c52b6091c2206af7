"""Products with the Hessian of a loss that only the user's script knows how to compute.

The script computes `loss = l(f(w))` from the model's outputs f in its own way. Around the current weights the surrogate

    s(w) = <∇l, f(w)> + ½ (f(w) - f₀)ᵀ ∇²l (f(w) - f₀)

has exactly the Hessian of the loss, `Jᵀ ∇²l J + Σ_k ∂_k l ∇² f_k`. The derivatives of l come from the script's own
graph, which runs from the outputs to the loss; those of f from one more forward pass of the uncompiled model with the
same randomness and a twice differentiable attention.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from dynascope.probes.views import CurvatureView
from dynascope.watching.undisturbed import undisturbed


class HessianWatch:
    """What has to be kept from one forward pass so that the Hessian of its loss can be applied at `backward`.

    Made at the model's entrance; `outputs` is filled when the forward pass returns. Memory while `view` is open: the
    graphs of one more forward pass and of its gradient, on the whole batch.
    """

    def __init__(
        self, model: nn.Module, parameters: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.outputs: list[Tensor] = []
        self._model = model
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._call = args, kwargs
        device = self._parameters[0].device
        self._device = device
        self._autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        self._random = torch.get_rng_state(), random.getstate(), np.random.get_state()
        self._device_random = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def view(self, loss: Tensor, step: int, lr: float) -> Iterator[CurvatureView | None]:
        """The Hessian of `loss` at the current weights, valid inside the block; None if no output leads to it."""
        # A model that returns its own loss returns logits beside it; only one of the two is the way to the loss.
        scalars = [output for output in self.outputs if output.numel() == 1]
        ends = scalars if _leads_to(scalars, loss) else [output for output in self.outputs if output.numel() > 1]
        if not _leads_to(ends, loss):
            yield None
            return
        slopes = torch.autograd.grad(loss, ends, create_graph=True, retain_graph=True, allow_unused=True)
        used = [index for index, slope in enumerate(slopes) if slope is not None]
        ends, slopes = [ends[index] for index in used], tuple(slopes[index] for index in used)
        positions = [self._position(end) for end in ends]
        with undisturbed(self._model, training=None), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            again = self._forward_again(positions)
            product = _hessian_product(ends, slopes, again, self._parameters)
            size = sum(parameter.numel() for parameter in self._parameters)
            yield CurvatureView(step, size, product, lr, self._device)

    def _position(self, end: Tensor) -> int:
        return next(index for index, output in enumerate(self.outputs) if output is end)

    def _forward_again(self, positions: Sequence[int]) -> list[Tensor]:
        torch.set_rng_state(self._random[0])
        random.setstate(self._random[1])
        np.random.set_state(self._random[2])
        if self._device_random is not None:
            torch.cuda.set_rng_state(self._device_random, self._device)
        args, kwargs = self._call
        is_enabled, dtype = self._autocast
        with torch.autocast(self._device.type, dtype=dtype, enabled=is_enabled, cache_enabled=False):
            outputs = differentiable_leaves(self._model(*args, **kwargs))
        return [outputs[position] for position in positions]


def leaves(tree: Any) -> list[Tensor]:
    """The tensors in a model's arguments or output, in a fixed order."""
    tree = dict(tree) if isinstance(tree, Mapping) else tree
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def differentiable_leaves(output: Any) -> list[Tensor]:
    """Those through which gradients flow."""
    return [leaf for leaf in leaves(output) if leaf.is_floating_point() and leaf.grad_fn is not None]


def _leads_to(outputs: Sequence[Tensor], loss: Tensor) -> bool:
    if not outputs or loss.grad_fn is None:
        return False
    slopes = torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True)
    return any(slope is not None for slope in slopes)


def _hessian_product(
    ends: Sequence[Tensor], slopes: Sequence[Tensor], again: Sequence[Tensor], parameters: Sequence[Tensor]
) -> Callable[[Tensor], Tensor]:
    """v -> H v for the surrogate; the graphs are built once and used for every product."""
    constant = [slope.detach() for slope in slopes]
    is_curved = any(slope.requires_grad for slope in slopes)
    weights = [torch.zeros_like(output, requires_grad=True) for output in again]
    pulled = torch.autograd.grad(again, parameters, weights, create_graph=True, allow_unused=True)
    pulled = _filled(pulled, parameters)
    slope_of_model = _filled(
        torch.autograd.grad(again, parameters, constant, create_graph=True, allow_unused=True), parameters
    )

    def product(vector: Tensor) -> Tensor:
        direction = [
            part.reshape(parameter.shape).to(parameter.dtype)
            for part, parameter in zip(vector.split([p.numel() for p in parameters]), parameters, strict=True)
        ]
        result = _gradient(slope_of_model, parameters, direction)
        if is_curved:
            # The Jacobian's product with v is the derivative of its transpose's, which is linear in the weights.
            moved = _gradient(pulled, weights, direction)
            curved = [slope for slope in slopes if slope.requires_grad]
            along = [m for slope, m in zip(slopes, moved, strict=True) if slope.requires_grad]
            bent = _filled(
                torch.autograd.grad(
                    curved,
                    ends,
                    [a.to(s.dtype) for a, s in zip(along, curved, strict=True)],
                    retain_graph=True,
                    allow_unused=True,
                ),
                ends,
            )
            back = torch.autograd.grad(again, parameters, bent, retain_graph=True, allow_unused=True)
            result = [r + b for r, b in zip(result, _filled(back, parameters), strict=True)]
        return torch.cat([part.reshape(-1).float() for part in result])

    return product


def _gradient(outputs: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    live = [(output, weight) for output, weight in zip(outputs, weights, strict=True) if output.requires_grad]
    if not live:
        return [torch.zeros_like(tensor) for tensor in inputs]
    gradients = torch.autograd.grad(
        [output for output, _ in live], inputs, [weight for _, weight in live], retain_graph=True, allow_unused=True
    )
    return list(_filled(gradients, inputs))


def _filled(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(
        torch.zeros_like(tensor) if gradient is None else gradient
        for gradient, tensor in zip(gradients, like, strict=True)
    )
