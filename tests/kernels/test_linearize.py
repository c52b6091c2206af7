"""A model's tangent: equal at the start, linear in its parameters, with the model's own kernel for ever."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dynascope.kernels import linearize, ntk


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 2)).double()


def test_it_starts_as_the_model_and_moves_along_its_jacobian() -> None:
    model, x = network(), torch.randn(4, 3).double()
    tangent = linearize(model)
    torch.testing.assert_close(tangent(x), model(x))
    step = [torch.randn_like(parameter) for parameter in model.parameters()]
    with torch.no_grad():
        for delta, one in zip(tangent.delta, step, strict=True):
            delta.copy_(one)
    moved = copy.deepcopy(model)
    for scale in (1e-4, 1e-5):
        with torch.no_grad():
            for parameter, start, one in zip(moved.parameters(), model.parameters(), step, strict=True):
                parameter.copy_(start + scale * one)
        slope = (moved(x) - model(x)) / scale
        torch.testing.assert_close(tangent(x) - model(x), slope, rtol=1e-2, atol=100 * scale)


def test_its_kernel_is_the_models_and_stands_still() -> None:
    model, x = network(), torch.randn(4, 3).double()
    tangent = linearize(model)
    expected = ntk(model, x)
    for _ in range(2):
        torch.testing.assert_close(ntk(tangent, x, method="vp"), expected)
        with torch.no_grad():
            for delta in tangent.delta:
                delta.normal_()


def test_training_it_leaves_the_model_alone_and_survives_saving() -> None:
    model, x = network(), torch.randn(4, 3).double()
    before = copy.deepcopy(model.state_dict())
    tangent = linearize(model)
    optimizer = torch.optim.SGD(tangent.parameters(), lr=0.1)
    tangent(x).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not torch.allclose(tangent(x), model(x))
    again = linearize(network())
    again.load_state_dict(tangent.state_dict())
    torch.testing.assert_close(again(x), tangent(x))


class Outputs(nn.Module):
    """A model with keyword arguments that returns a mapping."""

    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body

    def forward(self, *, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.body(x), "ids": torch.arange(len(x))}


def test_mappings_come_back_as_mappings() -> None:
    model, x = Outputs(network()), torch.randn(4, 3).double()
    tangent = linearize(model)
    torch.testing.assert_close(tangent(x=x)["logits"], model(x=x)["logits"])
    assert torch.equal(tangent(x=x)["ids"], torch.arange(4))


def test_batch_normalization_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="batch normalization"):
        linearize(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
