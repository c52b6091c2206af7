"""Next-token training installs one step of gradient descent in linear attention, if the data allow it (arXiv 2405.16845).

One causal linear attention layer with free complex matrices predicts noiseless rotations. From a diagonal start full-batch
gradient descent keeps the structure when the first token's odd moments vanish (Gaussian, sparse) and loses it when they do
not (all ones); where it is kept, the product of the two scalars has a closed form, and whether the process is recovered is
a matter of one condition more.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn.utils import parametrize

from dynascope.data.in_context.ar_process import ARProcess
from dynascope.nn.linear_attention import LinearCausalAttention, MaskedGradient, diagonal_masks
from dynascope.probes.mesa import MesaOptimizer
from dynascope.probes.views import ModelView
from dynascope.record import Series
from dynascope.studies.harness import StudyRecord, descend, log_steps
from dynascope.theory.mesa import FullBatchLoss, ab_star, law_moments


@dataclass(frozen=True)
class Config:
    """Sizes and lengths."""

    dim: int = 3
    length: int = 20
    num_sequences: int = 4000
    num_gaussian: int = 16_000
    """Sequences of the Gaussian law, whose sixth moments want more of them."""
    num_steps: int = 300
    num_tests: int = 2000

    def __post_init__(self) -> None:
        if min(self.dim, self.num_sequences, self.num_gaussian, self.num_steps, self.num_tests) < 1 or self.length < 3:
            raise ValueError("every size must be at least 1, and length at least 3")


@dataclass(frozen=True)
class Arm:
    """The law of the first token, its scale, and where training starts."""

    law: Literal["gaussian", "sparse", "ones"]
    scale: float = 1.0
    start: tuple[float, float] = (0.5, 1.5)
    is_masked: bool = False
    """Train nothing but the diagonals of the two useful blocks (the paper's clipped gradient)."""


NUM_PROBED = 64
"""Test sequences that are looked at during training."""
STARTS = ((0.1, 0.1), (0.5, 1.5), (2.0, 2.0))
SCALES = (0.5, 1.0, 2.0)


def train(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """Full-batch gradient descent on ½ Σ_t ‖ŷ(t) − x(t+1)‖², with all matrices free unless masked."""
    generator = torch.Generator().manual_seed(seed)
    process = ARProcess(config.dim, config.length, arm.law, arm.scale)
    count = config.num_gaussian if arm.law == "gaussian" else config.num_sequences
    x = process.sample(count, generator, torch.complex64)
    tests = process.sample(config.num_tests, generator)
    model = LinearCausalAttention(config.dim, a0=arm.start[0], b0=arm.start[1])
    if arm.is_masked:
        for name, mask in zip(("kq", "pv"), diagonal_masks(config.dim), strict=True):
            parametrize.register_parametrization(model, name, MaskedGradient(mask))

    # Curvature along one scalar is the other's square times this; a² − b² is conserved, so both ends are known.
    moments = law_moments(arm.law, config.dim, arm.scale)
    expected = ab_star(moments, config.length)
    record.add(0, {"target": expected})
    square = (config.length - 2) * moments.k2 + moments.k3 * sum(1 / t for t in range(1, config.length - 1))
    gap = arm.start[0] ** 2 - arm.start[1] ** 2
    at_end = np.hypot(gap, 2 * expected)  # a² + b² where ab is the expected product
    lr = 0.5 / (square * max(at_end, arm.start[0] ** 2 + arm.start[1] ** 2))

    probe = MesaOptimizer(tests[:NUM_PROBED])
    for series in probe.series:
        record.declare(series)

    @torch.no_grad()
    def look(step: int) -> None:
        seen = probe.measure(ModelView(step, model, (), {}, lr))
        record.add(step, {**seen, "loss": 0.5 * seen["mesa/loss_by_position"].sum()})

    looks = log_steps(config.num_steps, per_decade=12)
    full_batch = FullBatchLoss(x)
    descend(
        torch.optim.SGD(model.parameters(), lr=lr), lambda: full_batch(model), config.num_steps, looks=looks, look=look
    )
    with torch.no_grad():
        predicted, truth = model(tests), tests[:, 2:]
        is_active = truth.abs() > 0
        # By position: what a prediction is of the truth, averaged; and its projection on it, which says another thing.
        ratio = (predicted / truth.where(is_active, torch.ones((), dtype=truth.dtype))).real.where(is_active, torch.nan)
        record.declare(Series("capability/mean_ratio", ("position",)))
        record.add(config.num_steps, {"capability/mean_ratio": ratio.nanmean((0, 2))})
        projection = (truth.conj() * predicted).real.sum((0, 2)) / truth.abs().square().sum((0, 2))
        record.add(config.num_steps, {"capability/projection": projection, "kq": model.kq.abs(), "pv": model.pv.abs()})
