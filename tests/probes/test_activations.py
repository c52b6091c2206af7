"""Size of activations, and dead units."""

import pytest
import torch
from torch import nn

from dynascope.probes.activations import DeadUnits, dead_fraction, rms
from dynascope.probes.views import ModuleOutput


def test_root_mean_square() -> None:
    assert rms(torch.tensor([[3.0, -3.0]])).item() == 3.0
    assert rms(torch.full((1000,), 300.0, dtype=torch.float16)).item() == 300.0


def test_unit_is_dead_only_when_no_position_wakes_it() -> None:
    units = torch.tensor([[0.0, 0.0, 1.0], [0.0, 2.0, 1.0]])
    assert dead_fraction(units).item() == pytest.approx(1 / 3)


def test_smooth_activations_are_dead_in_their_tail() -> None:
    outputs = nn.functional.gelu(torch.tensor([[-10.0, -1.0], [-8.0, -2.0]]))
    found = DeadUnits().measure(ModuleOutput("", None, outputs, kind="gelu"))
    assert found["activations/dead_fraction"].item() == 0.5


def test_channels_are_the_units_of_a_convolution() -> None:
    outputs = torch.zeros(2, 3, 4, 4)
    outputs[1, 2, 0, 3] = 1.0
    found = DeadUnits().measure(ModuleOutput("", None, outputs, is_channels_first=True, kind="relu"))
    assert found["activations/dead_fraction"].item() == pytest.approx(2 / 3)
