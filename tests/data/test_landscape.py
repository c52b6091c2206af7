"""Paths between models, and kernels that move."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dynascope.data import error_barrier, instability, linear_path
from dynascope.data.landscape import State


@pytest.fixture
def loader() -> DataLoader:
    inputs = torch.randn(40, 2)
    return DataLoader(TensorDataset(inputs, (inputs[:, 0] * inputs[:, 1] > 0).long()), batch_size=16)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 2))


def test_path_from_a_model_to_itself_is_constant(loader: DataLoader) -> None:
    model = network()
    errors = linear_path(model, copy.deepcopy(model), loader)
    assert errors.shape == (11, 40)
    assert (errors == errors[0]).all()
    assert error_barrier(errors) == 0


def test_ends_of_the_path_are_the_models_themselves(loader: DataLoader) -> None:
    models = [network().eval() for _ in range(2)]
    errors = linear_path(*models, loader, num_points=3)
    inputs, labels = loader.dataset.tensors
    for end, model in zip((0, -1), models, strict=True):
        assert torch.equal(errors[end].bool(), model(inputs).argmax(-1) != labels)


def test_middle_of_the_path_has_the_mean_of_the_weights(loader: DataLoader) -> None:
    models = [nn.Linear(2, 2) for _ in range(2)]
    middle = nn.Linear(2, 2)
    with torch.no_grad():
        for one, *ends in zip(middle.parameters(), *(model.parameters() for model in models), strict=True):
            one.copy_(sum(ends) / 2)
    inputs, labels = loader.dataset.tensors
    assert torch.equal(linear_path(*models, loader, num_points=3)[1].bool(), middle(inputs).argmax(-1) != labels)


def test_barrier_is_the_rise_above_the_chord() -> None:
    errors = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0]])  # means 0, 1, 1/2; chord 0, 1/4, 1/2
    assert error_barrier(errors).item() == pytest.approx(0.75)
    assert error_barrier(torch.tensor([[1.0], [0.0], [1.0]])).item() == 0.0


def test_models_of_different_shape_have_no_path(loader: DataLoader) -> None:
    with pytest.raises(ValueError, match="same architecture"):
        linear_path(nn.Linear(2, 2), nn.Linear(2, 3), loader)


def train(state: State, first: int, last: int, seed: int) -> State:
    model, optimizer = state
    generator = torch.Generator().manual_seed(seed)
    for _ in range(first, last):
        inputs = torch.randn(32, 2, generator=generator)
        labels = (inputs[:, 0] * inputs[:, 1] > 0).long()
        optimizer.zero_grad()
        F.cross_entropy(model.train()(inputs), labels).backward()
        optimizer.step()
    return state


def test_twins_that_part_late_are_closer_than_those_that_part_early(loader: DataLoader) -> None:
    model = network()
    start = model, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    early = instability(train, start, 0, 150, loader)
    never = instability(train, start, 150, 150, loader)
    assert error_barrier(never) == 0
    assert error_barrier(early) > 0.02
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="spawn_at"):
        instability(train, start, 200, 150, loader)
