"""Two-layer networks trained on k unit vectors permute every binary input exactly, as an ensemble (arXiv 2502.16763).

At infinite width everything is a closed form: means, variances, and how many networks must be averaged before rounding.
Sampled from the Gaussian of the limit; trained at finite width in the theory's NTK parametrization and in the standard
one, which at that width trains its last layer only (the NNGP kernel); and put to the test on every nonzero input.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from dynascope.data import PermutationTask
from dynascope.kernels import GPEnsemble, limit_kernels, predict_ensemble
from dynascope.kernels.limits import Dense, Relu
from dynascope.nn import RunningMoments, TwoLayerNet, train_ensemble
from dynascope.record import Series
from dynascope.studies.harness import StudyRecord
from dynascope.theory.permutations import (
    Kernel,
    ensemble_size,
    exact_match,
    largest_lr,
    round_ensemble,
)

DELTAS = (0.1, 0.001)
SAMPLED_K = (5, 10, 15, 20, 25, 30)
CLOSED_K = (8, 16, 32, 64, 128, 256, 512)
# Networks that the paper's own experiment needed at these k, by delta: two ones, 1000 test inputs.
PAPERS_SIZES = {0.1: (43, 69, 103, 117, 157, 175), 0.001: (43, 129, 163, 254, 308, 318)}


@dataclass(frozen=True)
class Config:
    """Sizes of the networks that are trained."""

    width: int = 2048
    num_networks: int = 512
    num_steps: int = 60
    num_tests: int = 1000
    most_sampled: int = 2500
    """Networks at most drawn from the Gaussian."""
    tolerance: float = 1e-5
    """Means up to here round to 0: what finite precision leaves of the exact zeros at the training inputs."""
    delta_all: float = 0.05
    """Chance of failure that the ensemble for all inputs is sized for."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.num_networks < 2 or self.num_steps < 1:
            raise ValueError("width and num_steps must be at least 1, and num_networks 2")
        if not 0 < self.delta_all < 1:
            raise ValueError(f"delta_all={self.delta_all} must lie between 0 and 1")


@dataclass(frozen=True)
class Arm:
    """What is done, with which kernel (or parametrization), for how many bits."""

    task: Literal["closed form", "sampled", "trained", "every input"]
    kernel: Kernel = "ntk"
    k: int = 5


def train(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """One arm."""
    if arm.task == "closed form":
        single = [float(ensemble_size(k, 0.1, 2, bound="hoeffding")) for k in CLOSED_K]
        every = [float(ensemble_size(k, 0.1, "all", bound="hoeffding")) for k in CLOSED_K]
        record.add(0, {"size/single": np.array(single), "size/all": np.array(every)})
    elif arm.task == "sampled":
        sample(config, arm, seed, record)
    elif arm.task == "trained":
        compare_moments(config, arm, seed, record)
    else:
        permute_everything(config, arm, seed, record)


def sample(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """The paper's experiment at infinite width: networks are added until whole vectors are right often enough."""
    generator = torch.Generator().manual_seed(seed)
    for k in SAMPLED_K:
        task = PermutationTask(k, seed=seed)
        x, y = task.train()
        tests, images = task.with_ones(2)
        nngp, tangent = limit_kernels([Dense(), Relu(), Dense()], torch.cat([x, tests]))
        kernel = tangent if arm.kernel == "ntk" else nngp
        mean, covariance = predict_ensemble(kernel[:k, :k], nngp[:k, :k], kernel[k:, :k], nngp[k:, :k], nngp[k:, k:], y)
        outputs = GPEnsemble(mean.float(), covariance.float()).sample(config.most_sampled, generator)
        counts = torch.arange(1, len(outputs) + 1)
        means = outputs.cumsum(0).div_(counts[:, None, None])
        right = exact_match(round_ensemble(means), images.float())
        fresh = torch.randint(len(tests), (2, config.num_tests), generator=generator)
        accuracy, again = right[:, fresh[0]].mean(1), right[:, fresh[1]].mean(1)
        for delta in DELTAS:
            reached = torch.nonzero(accuracy >= 1 - delta)
            at = int(reached[0]) if len(reached) else len(counts) - 1
            found = float(at + 1) if len(reached) else math.nan
            record.add(k, {f"size/{delta}": found, f"again/{delta}": again[at]})
    record.declare(Series("error/single"))
    record.add(0, {"error/single": (outputs[0, :, :] > 0).ne(images > 0).float().mean()})


def trained_outputs(
    config: Config, arm: Arm, seed: int, num_networks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(networks, inputs, bits) that trained networks say of every nonzero input, with inputs and images."""
    task = PermutationTask(arm.k, seed=seed)
    x, y = (one.float() for one in task.train())
    inputs, images = (one.float() for one in task.all_inputs())
    # Half of the limit's largest: some networks of finite width have a top eigenvalue a tenth above the limit's.
    lr = 0.5 * largest_lr(arm.k, arm.kernel)
    if arm.kernel == "nngp":
        lr /= config.width  # in the standard parametrization the last layer's kernel is width times the NNGP's
    parametrization = "ntk" if arm.kernel == "ntk" else "standard"

    def network() -> TwoLayerNet:
        return TwoLayerNet(arm.k, config.width, parametrization=parametrization)

    parts = train_ensemble(network, x, y, inputs, num_networks, lr=lr, num_steps=config.num_steps)
    return torch.cat(list(parts)), inputs, images


def compare_moments(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """Mean and variance of trained networks at inputs with two ones, and how often a single network errs."""
    outputs, inputs, images = trained_outputs(config, arm, seed, config.num_networks)
    moments = RunningMoments()
    moments.update(outputs)
    assert moments.mean is not None
    num_ones = (inputs > 0).sum(1)
    for count in range(1, arm.k):
        here, bits = num_ones == count, images[num_ones == count] > 0
        record.add(
            count,
            {
                "mean/one": moments.mean[here][bits].mean(),
                "mean/zero": moments.mean[here][~bits].mean(),
                "variance": moments.variance[here].mean(),
                "error/single": (outputs[:, here][:, ~bits] > 0).float().mean(),
            },
        )


def permute_everything(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """As many networks as the bound asks for, and the vectors that their mean gets wrong."""
    num_networks = ensemble_size(arm.k, config.delta_all, "all", bound="hoeffding", kernel=arm.kernel)
    outputs, inputs, images = trained_outputs(config, arm, seed, min(num_networks, 3 * config.num_networks))
    right = exact_match(round_ensemble(outputs.mean(0), config.tolerance), images)
    alone = exact_match(round_ensemble(outputs, config.tolerance), images).mean()
    record.add(0, {"wrong": (1 - right).sum(), "inputs": float(len(inputs)), "accuracy/single": alone})
