"""Ensembles of two-layer networks side by side against one after another: `python benchmarks/exact_permutations.py`.

k = 5 unit vectors, width 2048, 60 steps of full-batch gradient descent. The recipe trains each network by autograd and, as
the authors do, takes the mean over all outputs anew whenever one more is there. Outputs are compared first. Then the limit of
training the last layer alone, by one solve a network.
"""

import argparse
import copy

import torch
from interleaved import medians, tell
from torch import Tensor

from dynascope.data import PermutationTask
from dynascope.nn import RunningMoments, TwoLayerNet, train_ensemble
from dynascope.nn.ensembles import last_layer_limit
from dynascope.theory.permutations import largest_lr

K, WIDTH, STEPS = 5, 2048, 60


def one_by_one(networks: list[TwoLayerNet], x: Tensor, y: Tensor, inputs: Tensor, lr: float) -> Tensor:
    """Every network's outputs, and on the way the mean of those so far."""
    outputs: list[Tensor] = []
    for network in copy.deepcopy(networks):
        optimizer = torch.optim.SGD(network.parameters(), lr=lr)
        for _ in range(STEPS):
            optimizer.zero_grad()
            (0.5 * (network(x) - y).square().sum()).backward()
            optimizer.step()
        outputs.append(network(inputs).detach()[None])
        torch.cat(outputs).mean(0)
    return torch.cat(outputs)


def side_by_side(networks: list[TwoLayerNet], x: Tensor, y: Tensor, inputs: Tensor, lr: float) -> Tensor:
    queue, moments = copy.deepcopy(networks), RunningMoments()
    parts = []
    for part in train_ensemble(lambda: queue.pop(0), x, y, inputs, len(networks), lr=lr, num_steps=STEPS):
        moments.update(part)
        parts.append(part)
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--networks", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task = PermutationTask(K, seed=0)
    x, y = (one.float() for one in task.train())
    inputs = task.all_inputs()[0].float()
    networks = [TwoLayerNet(K, WIDTH) for _ in range(options.networks)]
    work = networks, x, y, inputs, 0.5 * largest_lr(K)
    gap = float((one_by_one(*work) - side_by_side(*work)).abs().max())
    print(f"largest difference of outputs {gap:.1e}; {options.networks} networks")
    ways = {"side by side, no graph": lambda: side_by_side(*work), "one after another": lambda: one_by_one(*work)}
    ways["last layer alone, one solve each"] = lambda: [last_layer_limit(one, x, y, inputs) for one in networks]
    tell(medians(ways, options.turns), "side by side, no graph")


if __name__ == "__main__":
    main()
