"""Adam's second moment."""

from pathlib import Path

import pytest
import torch
from torch import nn

import dynascope
from dynascope.probes.adam import adam_update_rms, epsilon_fraction


def test_update_of_a_steady_gradient_is_one() -> None:
    assert adam_update_rms(torch.full((5,), 3.0), torch.full((5,), 9.0), eps=1e-8).item() == pytest.approx(1.0)


def test_stale_moment_makes_the_update_large() -> None:
    # one element of four is ten times what the moment remembers: sqrt((3 + 100) / 4)
    rms = adam_update_rms(torch.tensor([1.0, 1.0, 1.0, 10.0]), torch.ones(4), eps=1e-8)
    assert rms.item() == pytest.approx((103 / 4) ** 0.5)


def test_share_below_epsilon() -> None:
    moment = torch.tensor([1e-20, 1e-18, 1e-10, 1.0])  # roots 1e-10, 1e-9, 1e-5, 1
    assert epsilon_fraction(moment, eps=1e-8).item() == 0.5


def test_probe_is_the_pure_functions_on_corrected_moments(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), eps=1e-2)
    expected = []
    with dynascope.watch(model, optimizer, run=tmp_path / "run", every=1, probes=["adam"]):
        for step in range(1, 4):
            optimizer.zero_grad()
            model(torch.randn(8, 5)).square().mean().backward()
            optimizer.step()
            moments = {
                name: optimizer.state[p]["exp_avg_sq"] / (1 - 0.99**step) for name, p in model.named_parameters()
            }
            expected.append([
                (adam_update_rms(p.grad, moments[name], 1e-2).item(), epsilon_fraction(moments[name], 1e-2).item())
                for name, p in model.named_parameters()
            ])  # fmt: skip
    record = dynascope.open(tmp_path / "run")
    for index, name in enumerate(("adam/update_rms", "adam/epsilon_fraction")):
        torch.testing.assert_close(torch.tensor(record[name].values), torch.tensor(expected)[..., index])


def test_optimizers_without_a_second_moment_yield_nothing(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with dynascope.watch(model, optimizer, run=tmp_path / "run", every=1, probes=["adam"]):
        model(torch.randn(2, 3)).sum().backward()
        optimizer.step()
    assert "adam/update_rms" not in dynascope.open(tmp_path / "run")
