"""Top Hessian eigenvalue by Lanczos."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynascope
from dynascope.kernels import top_eigenvalue


def test_known_spectrum() -> None:
    rotation, _ = torch.linalg.qr(torch.randn(60, 60))
    matrix = rotation @ torch.diag(torch.cat([torch.tensor([10.0, -8.0]), torch.rand(58)])) @ rotation.T
    value, vector = top_eigenvalue(lambda v: matrix @ v, torch.randn(60), iterations=15)
    assert value.item() == pytest.approx(10.0, rel=1e-4)
    torch.testing.assert_close(matrix @ vector, 10.0 * vector, rtol=1e-2, atol=1e-2)


def test_small_spaces_are_exhausted_exactly() -> None:
    matrix = torch.diag(torch.tensor([1.0, 5.0]))
    assert top_eigenvalue(lambda v: matrix @ v, torch.ones(2), iterations=10)[0].item() == pytest.approx(5.0)
    assert top_eigenvalue(lambda v: matrix @ v, torch.tensor([1.0, 0.0]), iterations=10)[0].item() == pytest.approx(1.0)


def test_start_of_zeros_is_refused() -> None:
    with pytest.raises(ValueError, match="start vector"):
        top_eigenvalue(lambda v: v, torch.zeros(3))


def test_sharpness_of_a_watched_network_is_that_of_its_hessian(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()

    def loss_at(vector: torch.Tensor) -> torch.Tensor:
        parts = vector.split([parameter.numel() for parameter in model.parameters()])
        named = {name: part.view_as(p) for (name, p), part in zip(model.named_parameters(), parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, named, x), y)

    expected = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss_at, flat))[-1].item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    with dynascope.watch(model, optimizer, run=tmp_path / "run", every=1, probes=["curvature"]):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    record = dynascope.open(tmp_path / "run")
    assert record["curvature/sharpness"].values[0] == pytest.approx(expected, rel=0.01)
    assert record["curvature/edge"].values[0] == 8.0
