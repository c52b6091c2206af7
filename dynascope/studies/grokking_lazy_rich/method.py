"""Grokking without weight decay: first lazy, later rich (arXiv 2310.06110).

A committee learns a quadratic task by plain gradient descent. Its laziness α, the quadratic part ε of its first features
and the number of examples decide whether generalization comes late, at once, or never; the test loss is an exact sum of
three terms, and the kernel's alignment tells when features move. Dynamical mean-field theory predicts the curves. The
same dial, an output scale with a compensated learning rate, on real digits and on modular addition.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from dynascope.data.teachers import quadratic_teacher
from dynascope.kernels import KernelTraining, kernel_alignment, kernel_distance, kernel_regression, max_learning_rate
from dynascope.nn import OutputScale, QuadraticCommittee, lazy_param_groups
from dynascope.studies.harness import StudyRecord, descend, log_steps
from dynascope.theory.committee import (
    committee_dmft,
    committee_ntk,
    committee_sweep,
    committee_test_loss,
    summary_statistics,
)

FIRST_SEED = 10
"""Thresholds were set on seeds below this one."""


@dataclass(frozen=True)
class Config:
    """Sizes and lengths."""

    dim: int = 40
    num_neurons: int = 200
    num_steps: int = 20_000
    mean_field_dim: int = 600
    mean_field_samples: int = 8000
    mean_field_steps: int = 30
    num_digit_steps: int = 4000
    num_modular_steps: int = 3000
    modulus: int = 23

    def __post_init__(self) -> None:
        if min(vars(self).values()) < 1:
            raise ValueError("every size and number of steps must be at least 1")
        if self.modulus < 3:
            raise ValueError(f"modulus={self.modulus} leaves nothing to learn; take 3 or more")


@dataclass(frozen=True)
class Arm:
    """The task, and the dials."""

    task: Literal["committee", "mean field", "digits", "modular"] = "committee"
    alpha: float = 1.0
    eps: float = 0.25
    num_examples: int = 200


ALPHAS = (0.25, 1.0, 4.0, 16.0)
FITTED, LEARNT = 0.05, 0.10
"""Losses below which the training set counts as fitted and the task as learnt."""


def train(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """One arm."""
    tasks: dict[str, Callable[[Config, Arm, int, StudyRecord], None]] = {
        "committee": committee,
        "mean field": mean_field,
        "digits": digits,
        "modular": modular,
    }
    tasks[arm.task](config, arm, FIRST_SEED + seed, record)


def committee(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """Section 3: full-batch gradient descent on the centred committee, with everything that explains it."""
    generator = torch.Generator().manual_seed(seed)
    x, y, beta = quadratic_teacher(config.dim, arm.num_examples, generator=generator)
    dials = {"alpha": arm.alpha, "eps": arm.eps}
    model = QuadraticCommittee(
        config.dim, config.num_neurons, alpha=arm.alpha, eps=arm.eps, center=True, generator=generator
    )
    start = summary_statistics(model.weight.detach().double())
    fresh = quadratic_teacher(config.dim, 500, generator=generator, beta=beta)

    def kernel(weight: Tensor, other: Tensor = x) -> Tensor:
        statistics = summary_statistics(weight.double())
        return committee_ntk(statistics, other.double(), x.double(), **dials, num_neurons=config.num_neurons)

    first = kernel(model.weight.detach())
    lr, largest = float(model.lr), max_learning_rate(first, scale=2 / len(x))
    if lr >= largest:
        raise ValueError(f"lr {lr:g} is beyond the stable {largest:g}: take a smaller alpha*eps or more examples")
    # The lazy plateau, and the curve of the linearized model on the way to it; ranks below len(x) make Θ singular.
    target, cross = y[:, None].double(), kernel(model.weight.detach(), fresh[0])
    plateau = kernel_regression(first, target, cross, ridge=1e-9)
    linear = KernelTraining(first, target, rate=2 * lr / len(x), is_discrete=True, ridge=1e-9)
    looks = log_steps(config.num_steps, per_decade=25)
    misses = linear.elsewhere(cross, looks)[..., 0] - fresh[1]
    linearized = dict(zip(looks, misses.square().mean(1), strict=True))
    # A kernel of all examples costs as much as many steps; the losses tell when things happen.
    kernel_looks = frozenset(log_steps(config.num_steps, per_decade=5))
    record.add(0, {"lazy/plateau": (plateau[:, 0] - fresh[1]).square().mean()})

    def look(step: int, residual: Tensor) -> None:
        parts = committee_test_loss(summary_statistics(model.weight.double()).since(start), beta.double(), **dials)
        record.add(
            step,
            {
                "train/loss": residual.square().mean(),
                "test/loss": parts.total,
                "test/scale": parts.scale,
                "test/misalignment": parts.misalignment,
                "test/linear": parts.linear,
                "test/linearized": linearized[step],
            },
        )
        if step in kernel_looks:
            now = kernel(model.weight)
            moved = {
                "kernel/alignment": kernel_alignment(now, target),
                "kernel/distance": kernel_distance(now, first),
            }
            record.add(step, moved)

    model.descend(x, y, config.num_steps, looks=looks, look=look)


def mean_field(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """Appendix: three neurons in many dimensions, beside the theory of infinitely many."""
    eta0, delta, neurons, steps = 0.05, 5.0, 3, config.mean_field_steps
    dials = {"alpha": arm.alpha, "eps": arm.eps}
    theory = committee_dmft(
        neurons, delta, **dials, eta0=eta0, num_steps=steps, num_samples=config.mean_field_samples, seed=seed
    )
    simulation = committee_sweep(
        [(arm.alpha, arm.eps, 4 * seed + repetition) for repetition in range(4)],
        dim=config.mean_field_dim,
        num_neurons=neurons,
        num_examples=int(delta * config.mean_field_dim),
        num_steps=steps - 1,
        looks=range(steps),
        center=False,
        pace=eta0 * config.mean_field_dim,
    )
    for step, (predicted, simulated) in enumerate(zip(theory.test, simulation.test.total.mean(1), strict=True)):
        record.add(step, {"mean_field/test": predicted, "simulated/test": simulated})


def digits(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """Section 5: a bias-free ReLU network on 200 real digits, with large first weights, under AdamW."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    x = torch.from_numpy(images[order] / 16).float()
    y = F.one_hot(torch.from_numpy(labels[order]).long(), 10).float()
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 200, bias=False),
        nn.ReLU(),
        nn.Linear(200, 200, bias=False),
        nn.ReLU(),
        nn.Linear(200, 10, bias=False),
    )
    scaled_up(model, 3.0)
    delayed(model, arm, (x[:200], y[:200]), (x[200:], y[200:]), config.num_digit_steps, record, weight_decay=0.01)


def modular(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """Section 5: addition modulo p from seven tenths of the table, by two embeddings and a quadratic layer."""
    p = config.modulus
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))]
    x = torch.cat([F.one_hot(pairs[:, 0], p), F.one_hot(pairs[:, 1], p)], dim=1).float()
    y = F.one_hot(pairs.sum(1) % p, p).float()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2 * p, 256, bias=False), Square(), nn.Linear(256, p, bias=False))
    parts = int(0.7 * len(x))
    delayed(
        model, arm, (x[:parts], y[:parts]), (x[parts:], y[parts:]), config.num_modular_steps, record, weight_decay=0.0
    )


class Square(nn.Module):
    """x²."""

    def forward(self, x: Tensor) -> Tensor:
        return x.square()


@torch.no_grad()
def scaled_up(model: nn.Module, factor: float) -> None:
    """Multiply every weight, which makes a network lazier too."""
    for parameter in model.parameters():
        parameter.mul_(factor)


def delayed(
    model: nn.Module,
    arm: Arm,
    train_set: tuple[Tensor, Tensor],
    test_set: tuple[Tensor, Tensor],
    num_steps: int,
    record: StudyRecord,
    *,
    weight_decay: float,
) -> None:
    """Train with the output scaled and centred, and record both losses over that of saying nothing."""
    scaled = OutputScale(model, arm.alpha, center=True)
    optimizer = torch.optim.AdamW(lazy_param_groups(scaled.module, 1e-3, arm.alpha, "adam"), weight_decay=weight_decay)

    @torch.no_grad()
    def look(step: int) -> None:
        losses = {
            name: F.mse_loss(scaled(x), y) / y.var() for name, (x, y) in (("train", train_set), ("test", test_set))
        }
        record.add(step, {f"{name}/loss": value for name, value in losses.items()})

    descend(
        optimizer,
        lambda: F.mse_loss(scaled(train_set[0]), train_set[1]),
        num_steps,
        looks=log_steps(num_steps, per_decade=20),
        look=look,
    )
