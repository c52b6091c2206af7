"""Networks trained side by side are the same as one by one; moments come without the outputs."""

import copy

import pytest
import torch
from torch import Tensor, nn

from dynascope.nn import RunningMoments, TwoLayerNet, train_ensemble
from dynascope.nn.ensembles import last_layer_limit


@pytest.mark.parametrize("parametrization", ["ntk", "standard"])
@pytest.mark.parametrize("b_std", [0.0, 0.3])
@pytest.mark.parametrize("x", [torch.randn(6, 3, generator=torch.Generator().manual_seed(3)), torch.eye(3)])
def test_side_by_side_is_one_by_one(x: Tensor, b_std: float, parametrization: str) -> None:
    """In closed form, of unit inputs and others, and by autograd where there are biases."""
    torch.manual_seed(0)
    x, y, inputs = x.double(), torch.randn(len(x), 3).double(), torch.randn(4, 3).double()
    networks = [TwoLayerNet(3, 16, parametrization=parametrization, b_std=b_std).double() for _ in range(5)]
    queue = copy.deepcopy(networks)
    found = torch.cat(list(train_ensemble(lambda: queue.pop(0), x, y, inputs, 5, lr=0.02, num_steps=10, at_once=2)))
    for network, outputs in zip(networks, found, strict=True):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.02)
        for _ in range(10):
            optimizer.zero_grad()
            (0.5 * (network(x) - y).square().sum()).backward()
            optimizer.step()
        torch.testing.assert_close(outputs, network(inputs).detach())


def test_the_last_layers_limit_is_where_its_training_ends() -> None:
    torch.manual_seed(0)
    x, y, inputs = torch.eye(3).double(), torch.randn(3, 3).double(), torch.randn(4, 3).double()
    network = TwoLayerNet(3, 32, parametrization="standard").double()
    found = last_layer_limit(network, x, y, inputs)
    features = (x @ network.first.T).relu().detach()
    lr = 1 / float(torch.linalg.eigvalsh(features @ features.T)[-1])
    optimizer = torch.optim.SGD([network.second], lr=lr)
    for _ in range(3000):
        optimizer.zero_grad()
        (0.5 * (network(x) - y).square().sum()).backward()
        optimizer.step()
    torch.testing.assert_close(found, network(inputs).detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(last_layer_limit(network, x, y, x), y)
    with pytest.raises(ValueError, match="b_std=0"):
        last_layer_limit(TwoLayerNet(3, 8, b_std=0.1), x, y, x)


def test_another_loss_biases_and_stopping_early() -> None:
    x, y = torch.randn(8, 3), torch.randint(3, (8,))
    loss = nn.functional.cross_entropy
    seen: list[int] = []

    def enough(moments: RunningMoments) -> bool:
        seen.append(moments.count)
        return moments.count >= 6

    def network() -> nn.Module:
        return TwoLayerNet(3, 8, b_std=0.1)

    settings = {"lr": 0.1, "num_steps": 2, "loss_fn": loss, "at_once": 3}
    parts = list(train_ensemble(network, x, y, x, 100, stop=enough, **settings))
    assert [len(part) for part in parts] == [3, 3]
    assert seen == [3, 6]


def test_divergence_is_told() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="diverged at lr=1000"):
        list(train_ensemble(lambda: TwoLayerNet(3, 8), x, x, x, 2, lr=1000.0, num_steps=200))


def test_moments_are_those_of_everything_at_once() -> None:
    outputs = torch.randn(50, 4, 2, dtype=torch.float64) + 1e6
    moments, other = RunningMoments(), RunningMoments()
    for part in outputs[:20].split(7):
        moments.update(part)
    other.update(outputs[20:])
    moments.merge(other)
    moments.merge(RunningMoments())
    assert moments.count == 50
    torch.testing.assert_close(moments.mean, outputs.mean(0))
    torch.testing.assert_close(moments.variance, outputs.var(0))
    with pytest.raises(ValueError, match="no outputs"):
        _ = RunningMoments().variance
    one = RunningMoments()
    one.update(outputs[:1])
    assert torch.isnan(one.variance).all()


def _reduce(rank: int, rendezvous: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    outputs = torch.arange(12, dtype=torch.float64).view(6, 2)
    moments = RunningMoments()
    moments.update(outputs[:4] if rank == 0 else outputs[4:])
    moments.all_reduce()
    assert moments.count == 6
    torch.testing.assert_close(moments.mean, outputs.mean(0))
    torch.testing.assert_close(moments.variance, outputs.var(0))
    torch.distributed.destroy_process_group()


def test_moments_are_merged_over_processes(tmp_path: object) -> None:
    torch.multiprocessing.spawn(_reduce, (f"{tmp_path}/rendezvous",), nprocs=2)


def test_parametrizations_draw_the_same_functions() -> None:
    x = torch.randn(200, 6)
    spreads = []
    for parametrization in ("ntk", "standard"):
        torch.manual_seed(0)
        outputs: Tensor = TwoLayerNet(6, 512, parametrization=parametrization, w_std=1.5)(x)
        spreads.append(outputs)
    torch.testing.assert_close(spreads[0], spreads[1])
