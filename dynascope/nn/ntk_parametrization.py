"""Layers in NTK parametrization: standard normal weights, scaled in the forward pass (1806.07572, section 2).

The same functions as ordinary layers, with another geometry: gradients of all layers stay of one size as the width
grows, so a learning rate of order 1 fits every width, and the tangent kernel has a limit.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class NTKLinear(nn.Linear):
    """w_std / √in_features · W x + b_std · b, with W and b standard normal at first.

    >>> NTKLinear(64, 512, b_std=0.1)(torch.randn(8, 64)).shape
    torch.Size([8, 512])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        w_std: float = 1.0,
        b_std: float = 1.0,
        **factory: Any,
    ) -> None:
        self.weight_scale, self.bias_scale = w_std / math.sqrt(in_features), b_std
        super().__init__(in_features, out_features, bias and b_std != 0, **factory)

    def reset_parameters(self) -> None:
        """Standard normal weights and biases."""
        _standard_normal(self)

    def forward(self, input: Float[Tensor, "... in_features"]) -> Float[Tensor, "... out_features"]:
        bias = None if self.bias is None else self.bias_scale * self.bias
        return F.linear(input, self.weight_scale * self.weight, bias)


class NTKConv2d(nn.Conv2d):
    """A convolution whose standard normal weights are scaled by w_std / √(in_channels · kernel area / groups).

    >>> NTKConv2d(3, 16, 3, padding=1)(torch.randn(8, 3, 8, 8)).shape
    torch.Size([8, 16, 8, 8])
    """

    def __init__(self, *args: Any, w_std: float = 1.0, b_std: float = 1.0, **settings: Any) -> None:
        self.bias_scale = b_std
        super().__init__(*args, **settings)
        self.weight_scale = w_std / math.sqrt(self.weight[0].numel())

    def reset_parameters(self) -> None:
        """Standard normal weights and biases."""
        _standard_normal(self)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        scaled = None if bias is None else self.bias_scale * bias
        convolved: Tensor = super()._conv_forward(input, self.weight_scale * weight, scaled)
        return convolved


def ntk_parametrize(module: nn.Module, *, w_std: float = 1.0, b_std: float = 1.0) -> nn.Module:
    """The same network with every linear layer and 2-d convolution in NTK parametrization; its function is unchanged.

    Layers are replaced in place (a lone layer is returned anew); weights become √n / w_std times what they were, and
    biases 1 / b_std times. Make the optimizer afterwards. Raises ValueError where a scale is not above 0.

    >>> model = ntk_parametrize(nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 10)))
    """
    if w_std <= 0 or b_std <= 0:
        raise ValueError(f"w_std={w_std} and b_std={b_std} must be above 0 to keep the function")
    if type(module) in (nn.Linear, nn.Conv2d):
        return _converted(module, w_std, b_std)
    for name, child in module.named_children():
        setattr(module, name, ntk_parametrize(child, w_std=w_std, b_std=b_std))
    return module


@torch.no_grad()
def _converted(layer: nn.Module, w_std: float, b_std: float) -> nn.Module:
    has_bias = layer.bias is not None
    at = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    new: NTKLinear | NTKConv2d
    if isinstance(layer, nn.Linear):
        new = NTKLinear(layer.in_features, layer.out_features, bias=has_bias, w_std=w_std, b_std=b_std, **at)
    else:
        assert isinstance(layer, nn.Conv2d)
        new = NTKConv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            bias=has_bias,
            padding_mode=layer.padding_mode,
            w_std=w_std,
            b_std=b_std,
            **at,
        )
    new.weight.copy_(layer.weight / new.weight_scale)
    if layer.bias is not None and new.bias is not None:
        new.bias.copy_(layer.bias / b_std)
    return new.train(layer.training)


def _standard_normal(layer: nn.Linear | nn.Conv2d) -> None:
    for parameter in (layer.weight, layer.bias):
        if parameter is not None:
            nn.init.normal_(parameter)
