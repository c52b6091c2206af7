"""A model's tangent at its present weights: f₀(x) + J(x) δ, trained like any module."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.utils._pytree import tree_map

from dynascope.kernels.layerwise import functional, refuse_mixing


class Linearized(nn.Module):
    """The first-order expansion of a model in its weights, around those that it has now (1806.07572, section 4).

    `delta` are the only parameters: how far each weight has moved, zeros at first. What the model does in evaluation
    mode is linearized; its own weights and buffers are copied and stay.

    >>> tangent = linearize(model)
    >>> optimizer = torch.optim.SGD(tangent.parameters(), lr=0.1)
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base = copy.deepcopy(model).requires_grad_(False)
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.names = names
        own = dict(self.base.named_parameters())
        self.delta = nn.ParameterList([torch.zeros_like(own[name]) for name in names])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """f₀ and its directional derivative along `delta`, of every tensor that the model returns."""
        own = dict(self.base.named_parameters())
        start = {name: own[name] for name in self.names}
        function = functional(self.base, start)
        move = dict(zip(self.names, self.delta, strict=True))
        inputs = kwargs if kwargs else args
        at_start, along, *_ = jvp(lambda values: function(values, inputs), (start,), (move,))
        return tree_map(_sum, at_start, along)


class LinearizedTwin:
    """A model's tangent that is trained beside it, by the same kind of optimizer on the same losses.

    Where the twin falls behind the model, the model has left the lazy regime (2310.06110). Make it before training.

    >>> twin = LinearizedTwin(model, optimizer)
    >>> twin.step(lambda tangent: loss_fn(tangent(x), y))  # wherever the model takes its step
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = linearize(model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        by_name = dict(zip(self.model.names, self.model.delta, strict=True))
        groups = [
            {**group, "params": [by_name[names[id(parameter)]] for parameter in group["params"]]}
            for group in optimizer.param_groups
        ]
        self.optimizer = type(optimizer)(groups, **optimizer.defaults)
        self._followed = optimizer

    def step(self, loss: Callable[[nn.Module], Tensor]) -> Tensor:
        """One step of the twin, at the learning rates that the model's optimizer has now; returns the twin's loss."""
        for own, followed in zip(self.optimizer.param_groups, self._followed.param_groups, strict=True):
            own["lr"] = followed["lr"]
        self.optimizer.zero_grad()
        value = loss(self.model)
        value.backward()
        self.optimizer.step()
        return value.detach()


def _sum(start: Any, along: Any) -> Any:
    return start + along if isinstance(start, Tensor) and start.is_floating_point() else start


def linearize(model: nn.Module) -> Linearized:
    """The model's tangent at its present weights, as a module whose training is exactly kernel regression's.

    Raises ValueError for batch normalization in training mode.

    >>> tangent = linearize(model)
    >>> torch.equal(tangent(x), model(x))
    True
    """
    refuse_mixing(model)
    return Linearized(model)
