"""Gradient norms, cosine and noise scale."""

from pathlib import Path

import pytest
import torch
from torch import nn

import dynascope
from dynascope.probes.gradients import Gradients, gradient_cosine, gradient_noise_scale
from dynascope.probes.views import StepView


def view(gradients: dict[str, torch.Tensor], parameters: dict[str, torch.Tensor]) -> StepView:
    return StepView(0, parameters, gradients, {}, {}, {}, {})


def test_norms_are_those_of_each_parameter_and_of_all() -> None:
    parameters = {"a": torch.zeros(2), "unused": torch.zeros(3), "b": torch.zeros(1)}
    found = Gradients().measure(view({"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([12.0])}, parameters))
    torch.testing.assert_close(found["gradients/norm"], torch.tensor([5.0, torch.nan, 12.0]), equal_nan=True)
    assert found["gradients/total_norm"].item() == pytest.approx(13.0)


def test_cosine_of_equal_opposite_and_orthogonal_gradients() -> None:
    one = torch.tensor(1.0)
    assert [gradient_cosine(inner * one, one, one).item() for inner in (1, -1, 0)] == [1.0, -1.0, 0.0]
    assert gradient_cosine(0 * one, 0 * one, one).isnan()


def test_noise_scale_is_its_definition_on_a_known_gaussian() -> None:
    # Examples' gradients ~ N(G, s^2 I) in d dimensions: tr(Sigma) / |G|^2 = d s^2 / |G|^2 = 1000 * 4 / 25 = 160.
    generator = torch.Generator().manual_seed(0)
    truth = torch.zeros(1000)
    truth[0] = 5.0
    batch, pairs = 64, 200
    means = truth + 2.0 / batch**0.5 * torch.randn(2 * pairs, 1000, generator=generator)
    inner = (means[::2] * means[1::2]).sum(1).mean()
    squared = means.square().sum(1).mean()
    assert gradient_noise_scale(inner, squared, batch).item() == pytest.approx(160, rel=0.05)


def test_noise_scale_of_equal_gradients_is_zero_and_of_opposite_ones_unknown() -> None:
    one = torch.tensor(1.0)
    assert gradient_noise_scale(one, one, 8).item() == 0.0
    assert gradient_noise_scale(-one, one, 8).isnan()


def test_full_batch_training_has_no_noise(tmp_path: Path) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    x, y = torch.randn(32, 4), torch.randn(32, 1)
    with dynascope.watch(model, optimizer, run=tmp_path / "run", every=1, probes=["gradient-noise"]):
        for _ in range(5):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
    record = dynascope.open(tmp_path / "run")
    assert (record["gradients/cosine"].values > 0.999).all()
    assert (record["gradients/noise_scale"].values < 0.1).all()  # of 32 examples
