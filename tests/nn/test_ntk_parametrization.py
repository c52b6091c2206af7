"""NTK parametrization: the same functions with another geometry."""

import copy
import math

import pytest
import torch
from torch import nn

from dynascope.kernels import ntk
from dynascope.nn import NTKConv2d, NTKLinear, ntk_parametrize


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).double()


def test_the_function_is_unchanged_and_weights_are_scaled() -> None:
    model, x = convolutional(), torch.randn(5, 2, 4, 4).double()
    new = ntk_parametrize(copy.deepcopy(model), w_std=1.5, b_std=0.1)
    torch.testing.assert_close(new(x), model(x))
    assert [type(layer) for layer in new] == [NTKConv2d, nn.ReLU, NTKConv2d, nn.Flatten, NTKLinear]
    torch.testing.assert_close(new[4].weight, model[4].weight * math.sqrt(16) / 1.5)
    torch.testing.assert_close(new[4].bias, model[4].bias / 0.1)


def test_a_layers_kernel_is_scaled_by_what_its_weights_were_divided_by() -> None:
    model, x = convolutional(), torch.randn(3, 2, 4, 4).double()
    new = ntk_parametrize(copy.deepcopy(model), w_std=2.0, b_std=0.3)
    before, after = ntk(model, x, per_layer=True), ntk(new, x, per_layer=True)
    torch.testing.assert_close(before["4.weight"], after["4.weight"] * 16 / 2.0**2)
    torch.testing.assert_close(before["4.bias"], after["4.bias"] / 0.3**2)
    torch.testing.assert_close(before["0.weight"], after["0.weight"] * 18 / 2.0**2)


def test_weights_begin_standard_normal_and_outputs_of_order_one() -> None:
    torch.manual_seed(0)
    layer = NTKLinear(400, 300, b_std=0.5)
    assert float(layer.weight.std()) == pytest.approx(1.0, abs=0.01)
    assert float(layer(torch.randn(500, 400)).var()) == pytest.approx(1.25, abs=0.1)
    convolution = NTKConv2d(8, 64, 3, b_std=0.0)
    assert float(convolution.weight.std()) == pytest.approx(1.0, abs=0.03)
    assert float(convolution(torch.randn(16, 8, 8, 8)).var()) == pytest.approx(1.0, abs=0.1)


def test_a_lone_layer_is_returned_anew_and_modes_stay() -> None:
    layer = nn.Linear(3, 2).eval()
    new = ntk_parametrize(layer)
    assert isinstance(new, NTKLinear)
    assert not new.training
    assert NTKLinear(3, 2, b_std=0.0).bias is None


@pytest.mark.parametrize("scales", [{"w_std": 0.0}, {"b_std": -1.0}])
def test_scales_that_would_change_the_function_are_refused(scales: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        ntk_parametrize(nn.Linear(3, 2), **scales)
