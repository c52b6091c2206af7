"""A model's tangent at its present weights: f₀(x) + J(x) δ, trained like any module."""

import copy
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
        self._names = names
        own = dict(self.base.named_parameters())
        self.delta = nn.ParameterList([torch.zeros_like(own[name]) for name in names])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """f₀ and its directional derivative along `delta`, of every tensor that the model returns."""
        own = dict(self.base.named_parameters())
        start = {name: own[name] for name in self._names}
        function = functional(self.base, start)
        move = dict(zip(self._names, self.delta, strict=True))
        inputs = kwargs if kwargs else args
        at_start, along, *_ = jvp(lambda values: function(values, inputs), (start,), (move,))
        return tree_map(_sum, at_start, along)


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
