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
from scipy import stats
from sklearn.datasets import load_digits
from torch import Tensor, nn

import dynascope
from dynascope.kernels import KernelTraining, kernel_distance, limit_kernels, mode_times, ntk, predict_ensemble
from dynascope.kernels.limits import Activation, Dense, Erf, Identity, Layer, Relu
from dynascope.nn import NTKLinear
from dynascope.probes.tangent_kernel import TangentKernel
from dynascope.record import Series
from dynascope.studies.harness import Claim, Paper, Runs, Study, StudyRecord, descend, log_steps

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
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    probes = [TangentKernel(x, y)]
    with dynascope.watch(model, optimizer, run=record, every=max(1, config.num_steps // 10), probes=probes):
        descend(optimizer, lambda: half_mean_square(model(x), y), config.num_steps + 1)
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
    vectors = training.eigenvectors.flip(1)
    half_lives, eigenvalues, _ = mode_times(kernel, y - start, rate=lr / len(x))
    # A step takes a share, so half-lives count in steps what exp would count in time.
    discrete = math.log(0.5) / torch.log1p(-(lr / len(x)) * eigenvalues[:NUM_MODES])
    record.declare(Series("modes/error", ("mode",), "", "Error along the kernel's top eigenvectors."))
    record.declare(Series("modes/predicted_half_life", ("mode",), "steps", "As the kernel at the start predicts."))
    record.add(0, {"modes/predicted_half_life": discrete, "modes/flow_half_life": half_lives[:NUM_MODES]})
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    steps = frozenset(log_steps(config.num_mode_steps, per_decade=60))
    step = 0

    def loss() -> Tensor:
        nonlocal step
        outputs = model(x)
        if step in steps:
            error = outputs.detach() - y
            record.add(
                step,
                {
                    "modes/error": (vectors[:, :NUM_MODES].T @ error)[:, 0],
                    "modes/beside": (outputs.detach() - training.at(step)).norm() / y.sub(start).norm(),
                    "loss": half_mean_square(outputs.detach(), y),
                    "loss/predicted": half_mean_square(training.at(step), y),
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


# What the claims measure


def slope(runs: Runs, name: str, at: int = -1) -> float:
    """Slope of log quantity over log width."""
    values = [float(runs[f"circle-{width}"][name].values[at]) for width in WIDTHS]
    return float(np.polyfit(np.log(WIDTHS), np.log(values), 1)[0])


def half_lives(runs: Runs, arm: str) -> tuple[np.ndarray, np.ndarray]:
    """Measured and predicted steps to half of the first error, by mode; NaN where the run was too short."""
    record = runs[arm]
    error = record["modes/error"]
    share = np.abs(error.values / error.values[0])
    measured = np.full(share.shape[1], math.nan)
    for mode in range(share.shape[1]):
        below = np.flatnonzero(share[:, mode] <= 0.5)
        if below.size and below[0]:
            ends = slice(below[0] - 1, below[0] + 1)
            measured[mode] = np.interp(-0.5, -share[ends, mode], error.step.values[ends])
    return measured, record["modes/predicted_half_life"].values[0]


def worst_of_top_three(runs: Runs) -> float:
    """Largest relative deviation of the first three half-lives from the prediction."""
    measured, predicted = half_lives(runs, "digits-4096")
    return float(np.max(np.abs(measured[:3] / predicted[:3] - 1)))


def order_of_modes(runs: Runs) -> float:
    """Spearman correlation of measured half-lives with 1/eigenvalue over the top ten."""
    measured, predicted = half_lives(runs, "digits-4096")
    seen = np.isfinite(measured)
    return float(stats.spearmanr(measured[seen], predicted[seen]).statistic) if seen.sum() > 2 else math.nan


def standard_errors_off(runs: Runs) -> np.ndarray:
    """At each angle, how many standard errors the networks' mean is off the predicted one."""
    outputs = runs["ensemble"]["ensemble/outputs"].values[0]
    error = outputs.std(0, ddof=1) / math.sqrt(len(outputs))
    mean: np.ndarray = np.abs(outputs.mean(0) - runs["ensemble"]["predicted/mean"].values[0]) / error
    return mean


def log_variance_ratio(runs: Runs) -> float:
    """|log| of the networks' variance over the predicted one, summed over angles."""
    variance = runs["ensemble"]["ensemble/outputs"].values[0].var(0, ddof=1).sum()
    return float(abs(np.log(variance / np.square(runs["ensemble"]["predicted/std"].values[0]).sum())))


def deviation(runs: Runs, task: str, width: int) -> float:
    """Largest distance of the outputs from the constant kernel's prediction, over the first error."""
    return float(runs[f"{task}-{width}"]["modes/beside"].max())


study = Study(
    name="neural-tangent-kernel",
    paper=Paper("1806.07572", "Neural Tangent Kernel: Convergence and Generalization in Neural Networks", 2018),
    arms={
        **{f"circle-{width}": Arm("circle", width) for width in WIDTHS},
        **{f"{task}-{width}": Arm(task, width) for task in ("digits", "direction") for width in (64, 4096)},
        "ensemble": Arm("ensemble"),
        "definiteness": Arm("definiteness"),
    },
    presets={
        "smoke": Config(num_steps=3, num_digits=16, num_mode_steps=5, num_networks=3, ensemble_width=8, narrower=32),
        "small": Config(),
        "paper": Config(num_digits=512, num_networks=200, ensemble_width=1000, num_steps=1000),
    },
    train=train,
    figures="dynascope.studies.figures.neural_tangent_kernel",
    claims=[
        Claim(
            id="C1",
            statement="At initialization the kernel tends to its limit as one over the root of the width.",
            source="Theorem 1, Figure 1",
            paper_value="-1/2",
            quantity="distance of the log-log slope over widths from -1/2",
            measure=lambda runs: abs(slope(runs, "limit/error") + 0.5),
            op="<=",
            threshold=0.15,
        ),
        Claim(
            id="C2",
            statement="Training moves the kernel less, the wider the network.",
            source="Theorem 2, Figure 1",
            paper_value="-1/2 (bound of the theory for this norm)",
            quantity="log-log slope of the kernel's relative movement over widths",
            measure=lambda runs: slope(runs, "kernel/distance"),
            op="<=",
            threshold=-0.35,
        ),
        Claim(
            id="C2-4096",
            statement="At width 4096 the kernel stands still.",
            source="Theorem 2",
            paper_value="0 in the limit",
            quantity="relative movement of the kernel",
            measure=lambda runs: float(runs["circle-4096"]["kernel/distance"][-1]),
            op="<",
            threshold=0.05,
        ),
        Claim(
            id="C3",
            statement="The error decays along each eigenvector at the rate of its eigenvalue.",
            source="Section 5.1, Figure 3",
            paper_value=None,
            quantity="largest relative deviation of the first three half-lives",
            measure=worst_of_top_three,
            op="<=",
            threshold=0.15,
        ),
        Claim(
            id="C3-order",
            statement="What lies along the top eigenvectors is learnt first.",
            source="Section 5.1",
            paper_value=None,
            quantity="rank correlation of measured and predicted half-lives, ten modes",
            measure=order_of_modes,
            op=">",
            threshold=0.95,
        ),
        Claim(
            id="C4",
            statement="The mean of trained networks is kernel regression with the limiting kernel.",
            source="Section 5, Figure 2",
            paper_value=None,
            quantity="standard errors between the mean of 50 networks and the prediction",
            measure=lambda runs: float(np.mean(standard_errors_off(runs))),
            op="<",
            threshold=2.0,
        ),
        Claim(
            id="C4-variance",
            statement="Their spread is that of the predicted Gaussian.",
            source="Section 5, Figure 2",
            paper_value=None,
            quantity="|log of the ratio of variances|",
            measure=log_variance_ratio,
            op="<=",
            threshold=math.log(1.6),
        ),
        Claim(
            id="C5",
            statement="On the sphere the limiting kernel is positive definite for ReLU and erf.",
            source="Proposition 2",
            paper_value="above 0",
            quantity="smallest eigenvalue, 50 points",
            measure=lambda runs: min(float(runs["definiteness"][f"smallest/{name}"][0]) for name in ("relu", "erf")),
            op=">",
            threshold=1e-6,
        ),
        Claim(
            id="C5-polynomial",
            statement="For a linear network it has the rank of its inputs and one more.",
            source="Proposition 2",
            paper_value=11.0,
            quantity="rank, 50 points in 10 dimensions, less 11",
            measure=lambda runs: abs(float(runs["definiteness"]["rank/identity"][0]) - 11),
            op="<",
            threshold=0.5,
        ),
        Claim(
            id="C6",
            statement="A narrow network leaves the constant kernel's prediction, a wide one follows it.",
            source="Section 6.3",
            paper_value=None,
            quantity="deviation at width 64 over that at width 4096, digits",
            measure=lambda runs: deviation(runs, "digits", 64) / deviation(runs, "digits", 4096),
            op=">",
            threshold=2.0,
        ),
        Claim(
            id="C7",
            statement="A target along one eigenvector is approached on a straight line by a wide network.",
            source="Section 6.3, Figure 3",
            paper_value=None,
            quantity="deviation at width 64 over that at width 4096, second eigenvector",
            measure=lambda runs: deviation(runs, "direction", 64) / deviation(runs, "direction", 4096),
            op=">",
            threshold=2.0,
        ),
    ],
)
