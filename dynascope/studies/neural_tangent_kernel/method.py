"""Wide networks train like kernel machines, and a kernel known in closed form says how (arXiv 1806.07572).

ReLU networks in NTK parametrization, full-batch gradient descent on half the mean squared error. On the unit circle: the
kernel at initialization against its limit, and how far training moves it, over widths. On real digits: how fast the
error falls along each of the kernel's eigenvectors. With fifty networks at once: their mean and spread against the
Gaussian that the limit predicts. And one direction of the kernel's principal components, learnt alone.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from dynascope.kernels import KernelTraining, kernel_distance, limit_kernels, mode_times, ntk, predict_ensemble
from dynascope.kernels.limits import Activation, Dense, Erf, Identity, Layer, Relu
from dynascope.nn import NTKLinear
from dynascope.probes.tangent_kernel import TangentKernel
from dynascope.probes.views import ModelView
from dynascope.record import Series
from dynascope.studies.harness import StudyRecord, descend, log_steps

NUM_MODES, DEPTH = 10, 4
TRAIN_ANGLES = (0.3, 1.4, 2.6, 4.4)
WIDTHS = (64, 256, 1024, 4096)
B_STD = 0.1


@dataclass(frozen=True)
class Config:
    """Sizes; widths are those of the arms."""

    num_steps: int = 200
    num_starts: int = 5
    """Networks whose kernels at initialization are compared with the limit, of each width."""
    num_digits: int = 256
    num_mode_steps: int = 1500
    num_networks: int = 50
    ensemble_width: int = 256
    top_rate: float = 0.1
    """Share of the error along the first eigenvector that a step on the digits takes away."""
    narrower: int = 1
    """All widths are divided by this."""

    def __post_init__(self) -> None:
        if (
            min(self.num_steps, self.num_mode_steps, self.num_starts) < 1
            or self.num_networks < 2
            or self.num_digits < NUM_MODES
        ):
            raise ValueError(f"steps and num_starts must be at least 1, num_networks 2 and num_digits {NUM_MODES}")
        if not 1 <= self.narrower <= min(WIDTHS):
            raise ValueError(f"narrower={self.narrower} must lie between 1 and {min(WIDTHS)}, the smallest width")
        if not 0 < self.top_rate < 2:
            raise ValueError(f"top_rate={self.top_rate} must lie between 0 and 2, where gradient descent is stable")


@dataclass(frozen=True)
class Arm:
    """A task, and the width of the network."""

    task: Literal["circle", "digits", "direction", "ensemble", "definiteness"]
    width: int = 0


def network(sizes: Sequence[int]) -> nn.Sequential:
    """A ReLU network in NTK parametrization."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [NTKLinear(fan_in, fan_out, b_std=B_STD), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def infinite(depth: int, activation: Activation) -> list[Layer]:
    """The same network, infinitely wide."""
    return [Dense(1.0, B_STD), *[layer for _ in range(depth - 1) for layer in (activation, Dense(1.0, B_STD))]]


def on_circle(angles: Tensor) -> Tensor:
    """Points of the unit circle."""
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def half_mean_square(outputs: Tensor, y: Tensor) -> Tensor:
    """The paper's cost for the empirical measure of the examples."""
    return 0.5 * (outputs - y).square().mean()


def train(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """One task."""
    {"circle": circle, "digits": digits, "direction": direction, "ensemble": ensemble, "definiteness": definiteness}[
        arm.task
    ](config, arm, seed, record)


def circle(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """Section 6.1: the kernel at the start against the limit, and while four points of y = x₁x₂ are learnt at lr 1."""
    model = network([2, *[arm.width // config.narrower] * (DEPTH - 1), 1])
    x = on_circle(torch.tensor(TRAIN_ANGLES))
    y = x.prod(dim=1, keepdim=True)
    sweep = on_circle(torch.linspace(-math.pi, math.pi, 65))

    limit = limit_kernels(infinite(DEPTH, Relu()), x.double())[1]
    others = [network([2, *[arm.width // config.narrower] * (DEPTH - 1), 1]) for _ in range(config.num_starts - 1)]
    errors = [kernel_distance(ntk(one, x, output="trace").double(), limit) for one in (model, *others)]
    record.add(0, {"limit/error": torch.stack(errors).mean()})
    record.declare(
        Series("circle/kernel", ("angle",), "", "Kernel between the point at angle 0 and one at each angle.")
    )
    record.add(0, {"circle/kernel": ntk(model, sweep[32:33], sweep, output="trace")[0]})
    probe = TangentKernel(x, y)
    for series in probe.series:
        record.declare(series)

    @torch.no_grad()
    def look(step: int) -> None:
        seen = probe.measure(ModelView(step, model, (), {}, lr=1.0))
        record.add(step, {**seen, "loss": half_mean_square(model(x), y)})

    optimizer, looks = torch.optim.SGD(model.parameters(), lr=1.0), log_steps(config.num_steps, per_decade=2)
    descend(optimizer, lambda: half_mean_square(model(x), y), config.num_steps, looks=looks, look=look)
    record.add(config.num_steps, {"circle/kernel": ntk(model, sweep[32:33], sweep, output="trace")[0]})


def digits(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """Section 5.1: the error on odd against even digits along each eigenvector, beside its predicted decay."""
    x, parity = digits_on_sphere(config.num_digits, seed)
    model = network([x.shape[1], arm.width // config.narrower, 1])
    track_modes(config, model, x, parity, record)


def direction(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """Section 6.3: the target is what the network says at first, plus half its kernel's second eigenvector."""
    x, _ = digits_on_sphere(config.num_digits, seed)
    model = network([x.shape[1], arm.width // config.narrower, 1])
    second = torch.linalg.eigh(ntk(model, x, output="trace")).eigenvectors[:, -2:-1]
    target = model(x).detach() + 0.5 * second * math.sqrt(len(x))
    track_modes(config, model, x, target, record)


def track_modes(config: Config, model: nn.Module, x: Tensor, y: Tensor, record: StudyRecord) -> None:
    """Gradient descent whose error is recorded along the first kernel's eigenvectors, and across all others."""
    kernel, start = ntk(model, x, output="trace"), model(x).detach()
    lr = config.top_rate * len(x) / float(torch.linalg.eigvalsh(kernel)[-1])
    training = KernelTraining(kernel, y, start, rate=lr / len(x), is_discrete=True)
    top = training.eigenvectors.flip(1)[:, :NUM_MODES].T
    half_lives, eigenvalues, _ = mode_times(kernel, y - start, rate=lr / len(x))
    # A step takes a share, so half-lives count in steps what exp would count in time.
    discrete = math.log(0.5) / torch.log1p(-(lr / len(x)) * eigenvalues[:NUM_MODES])
    record.declare(Series("modes/error", ("mode",), "", "Error along the kernel's top eigenvectors."))
    record.declare(Series("modes/predicted_half_life", ("mode",), "steps", "As the kernel at the start predicts."))
    record.add(0, {"modes/predicted_half_life": discrete, "modes/flow_half_life": half_lives[:NUM_MODES]})
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    looks = log_steps(config.num_mode_steps, per_decade=60)
    predicted, gap = dict(zip(looks, training.at(looks), strict=True)), (y - start).norm()
    step = 0

    def loss() -> Tensor:
        nonlocal step
        outputs = model(x)
        if step in predicted:
            now, expected = outputs.detach(), predicted[step]
            record.add(
                step,
                {
                    "modes/error": (top @ (now - y))[:, 0],
                    "modes/beside": (now - expected).norm() / gap,
                    "loss": half_mean_square(now, y),
                    "loss/predicted": half_mean_square(expected, y),
                },
            )
        step += 1
        return half_mean_square(outputs, y)

    descend(optimizer, loss, config.num_mode_steps)


def ensemble(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """Section 6.2: many networks trained at once, their outputs on the circle against the Gaussian of the limit."""
    x, sweep = on_circle(torch.tensor(TRAIN_ANGLES)), on_circle(torch.linspace(-math.pi, math.pi, 33)[:-1])
    y = x.prod(dim=1, keepdim=True)
    sizes = [2, *[config.ensemble_width] * (DEPTH - 1), 1]
    networks = [network(sizes) for _ in range(config.num_networks)]
    states, _ = torch.func.stack_module_state(networks)

    def outputs(inputs: Tensor) -> Tensor:
        call = lambda state: torch.func.functional_call(networks[0], state, inputs)[:, 0]  # noqa: E731
        of_all: Tensor = torch.func.vmap(call)(states)
        return of_all

    # Summed over networks, as each descends on its own cost.
    loss = lambda: config.num_networks * half_mean_square(outputs(x), y.T)  # noqa: E731
    descend(torch.optim.SGD(states.values(), lr=1.0), loss, config.num_steps)
    record.declare(Series("ensemble/outputs", ("network", "angle")))
    layers, both = infinite(DEPTH, Relu()), torch.cat([x, sweep]).double()
    nngp, tangent = limit_kernels(layers, both)
    n = len(x)
    mean, covariance = predict_ensemble(
        tangent[:n, :n],
        nngp[:n, :n],
        tangent[n:, :n],
        nngp[n:, :n],
        nngp[n:, n:],
        y.double(),
        config.num_steps,
        rate=1 / n,
        is_discrete=True,
    )
    record.add(
        0,
        {
            "ensemble/outputs": outputs(sweep).detach(),
            "predicted/mean": mean[:, 0],
            "predicted/std": covariance.diagonal().clamp_min(0).sqrt(),
        },
    )


def definiteness(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """Proposition 2: the limit is positive definite on the sphere for ReLU and erf, and of low rank for the identity."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, 10, generator=generator, dtype=torch.float64)
    x = x / x.norm(dim=1, keepdim=True)
    kernels = {name: limit_kernels(infinite(3, one), x)[1] for name, one in (("relu", Relu()), ("erf", Erf()))}
    smallest = {f"smallest/{name}": torch.linalg.eigvalsh(kernel)[0] for name, kernel in kernels.items()}
    linear = limit_kernels(infinite(3, Identity()), x)[1]
    record.add(0, {**smallest, "rank/identity": torch.linalg.matrix_rank(linear, hermitian=True)})


def digits_on_sphere(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Real digits, centred and brought to one length √64, and ±1 for odd and even."""
    images, labels = load_digits(return_X_y=True)
    chosen = np.random.default_rng(seed).permutation(len(images))[:count]
    x = torch.from_numpy(images[chosen] - images.mean(0)).float()
    x = x * math.sqrt(x.shape[1]) / x.norm(dim=1, keepdim=True)
    return x, torch.from_numpy(2.0 * (labels[chosen] % 2) - 1).float()[:, None]
