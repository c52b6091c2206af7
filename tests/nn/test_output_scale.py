"""The dial between lazy and rich training changes the speed of features, not that of functions."""

import copy

import pytest
import torch
from torch import nn

from dynascope.kernels import linearize
from dynascope.nn import OutputScale, lazy_param_groups


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 2)).double().eval()


def test_outputs_are_scaled_and_centred() -> None:
    model, x = network(), torch.randn(4, 3).double()
    torch.testing.assert_close(OutputScale(model, 0.3)(x), 0.3 * model(x))
    centred = OutputScale(model, 2.0, center=True)
    assert torch.equal(centred(x), torch.zeros(4, 2).double())
    first = model(x)
    with torch.no_grad():
        model[0].weight.add_(0.1)
    torch.testing.assert_close(centred(x), 2 * (model(x) - first))
    assert all(not parameter.requires_grad for parameter in centred.start.parameters())


def test_a_centred_model_survives_saving() -> None:
    centred, x = OutputScale(network(), 2.0, center=True), torch.randn(4, 3).double()
    with torch.no_grad():
        centred.module[0].weight.add_(0.1)
    other = OutputScale(copy.deepcopy(network()), 2.0, center=True)
    with torch.no_grad():
        other.module[0].weight.mul_(3)
    other.load_state_dict(centred.state_dict())
    torch.testing.assert_close(other(x), centred(x))


def test_linearized_training_crosses_function_space_at_one_speed_for_every_scale() -> None:
    x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    ends = []
    for alpha in (0.5, 8.0):
        model = OutputScale(linearize(network()), alpha, center=True)
        optimizer = torch.optim.SGD(lazy_param_groups(model.module, 0.1, alpha))
        for _ in range(20):
            optimizer.zero_grad()
            (model(x) - y).square().sum().backward()
            optimizer.step()
        ends.append(model(x).detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-8)


def test_parameter_groups_for_both_optimizers_leave_frozen_ones_out() -> None:
    model = network()
    model[0].bias.requires_grad_(False)
    (sgd,), (adam,) = lazy_param_groups(model, 1.0, 4.0), lazy_param_groups(model.parameters(), 1.0, 4.0, "adam")
    assert sgd["lr"] == 1 / 16
    assert adam["lr"] == 1 / 4
    assert len(sgd["params"]) == len(adam["params"]) == 3


def test_mappings_are_scaled_leaf_by_leaf() -> None:
    class Outputs(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": x, "ids": torch.arange(2)}

    found = OutputScale(Outputs(), 2.0)(torch.ones(2))
    assert found["logits"].tolist() == [2.0, 2.0]
    assert found["ids"].tolist() == [0, 1]


@pytest.mark.parametrize("alpha", [0.0, -1.0])
def test_scales_that_are_none_are_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        OutputScale(network(), alpha)
    with pytest.raises(ValueError, match="above 0"):
        lazy_param_groups(network(), 1.0, alpha)
