"""The ensemble probe: hand-worked numbers, the closed form of the limit, and a run under watch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dynascope
from dynascope.data import PermutationTask
from dynascope.probes.ensemble import Ensemble, ensemble_summary
from dynascope.theory.permutations import permutation_predictor


def test_summary_by_hand() -> None:
    outputs = torch.tensor([[[1.0, -1.0], [-1.0, 1.0]], [[3.0, -1.0], [2.0, 3.0]]])
    told = ensemble_summary(outputs, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert told["ensemble/mean"].tolist() == [[2.0, -1.0], [0.5, 2.0]]
    assert told["ensemble/variance"].tolist() == [[2.0, 0.0], [4.5, 2.0]]
    assert told["ensemble/margin"].tolist() == [1.0, -2.0]
    assert told["ensemble/failure"] == 0.5
    assert told["ensemble/failure_single"] == 0.5  # both networks err on the second example, none on the first
    # First example: margin 2 with deviation sqrt(2 / 2) = 1, and a sure bit. Second: 0.5/1.5, and -2/1 on the other.
    phi = torch.special.ndtr
    expected = 1 - (phi(torch.tensor(2.0)) + phi(torch.tensor(1 / 3)) * phi(torch.tensor(-2.0))) / 2
    assert told["ensemble/failure_predicted"].item() == pytest.approx(float(expected), rel=1e-5)


def test_draws_of_the_limit_fail_as_often_as_it_predicts() -> None:
    limit = permutation_predictor(5, 2)
    generator = torch.Generator().manual_seed(0)
    targets = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0]])
    means = torch.where(targets > 0, limit.one, limit.zero)
    outputs = means + limit.variance**0.5 * torch.randn(100_000, 1, 5, generator=generator)
    told = ensemble_summary(outputs, targets)
    assert told["ensemble/failure_single"].item() == pytest.approx(limit.failure(1, 2, 5), abs=5e-3)


def test_one_network_has_no_variance() -> None:
    with pytest.raises(ValueError, match="two networks or more"):
        ensemble_summary(torch.zeros(1, 4, 3), torch.zeros(4, 3))


class Networks(nn.Module):
    """Some two-layer networks side by side."""

    def __init__(self, num_networks: int, k: int, width: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(num_networks, width, k) / k**0.5)
        self.second = nn.Parameter(torch.randn(num_networks, k, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.first.mT).relu()) @ self.second.mT


def test_an_ensemble_under_watch_learns_what_it_is_trained_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = PermutationTask(4)
    x, y = (one.float() for one in task.train())
    model = Networks(16, 4, 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    with dynascope.watch(model, optimizer, run=tmp_path / "run", every=20, probes=[Ensemble(x, y, threshold=0.5)]):
        for _ in range(101):
            optimizer.zero_grad()
            (model(x) - y).square().sum().backward()
            optimizer.step()
    record = dynascope.open(tmp_path / "run")
    assert not [event for event in record.events if event.kind == "probe-off"]
    failure = record["ensemble/failure"]
    assert failure.values[0] > 0
    assert failure.values[-1] == 0
    assert record["ensemble/failure_predicted"].values[-1] < 1e-6
    assert record["ensemble/mean"].dims == ("step", "example", "bit")
