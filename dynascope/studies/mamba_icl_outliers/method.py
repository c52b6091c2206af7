"""Mamba's gate lets it learn in context from prompts where most examples are poisoned; linear attention fails (2510.00399).

Both are trained by SGD on the hinge loss, on prompts in which some examples carry a trigger and a coin's label, and tested on
unseen combinations of the triggers with other rules for the labels, more outliers, and outliers in the worst of places. The
linear transformer is the same layer without its gate: the paper compares no softmax attention.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dynascope.data.in_context.outliers import OutlierICL, Placement
from dynascope.nn.gated_linear_attention import GatedLinearAttentionICL
from dynascope.nn.selective_scan import MambaZOH
from dynascope.probes.mamba import ICLMechanismProbe
from dynascope.probes.views import ModelView
from dynascope.record import Series
from dynascope.studies.harness import StudyRecord, descend, log_steps
from dynascope.theory.outlier_tolerance import outlier_tolerance_curve, placement_accuracy

ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8)
RULES = ("flip", "target", "random")
PLACEMENTS: tuple[Placement, ...] = ("FQ", "R", "CQ")


@dataclass(frozen=True)
class Config:
    """Sizes, lengths and learning rates."""

    dim: int = 30
    num_relevant: int = 6
    num_irrelevant: int = 10
    length: int = 20
    batch: int = 256
    lr: float = 0.1
    two_lrs: tuple[float, float] = (0.02, 0.5)
    """Of attention and gate in the arm that trains the gate faster; found by trying five pairs on one seed."""
    gated_steps: int = 2000
    linear_steps: int = 600
    deep_batch: int = 64
    deep_steps: int = 200
    """Of the models of three layers, gated or not."""
    num_tests: int = 4000
    num_probed: int = 1000

    def __post_init__(self) -> None:
        if min(self.batch, self.gated_steps, self.linear_steps, self.deep_batch, self.deep_steps) < 1:
            raise ValueError("batches and steps must be at least 1")
        if min(self.length, self.num_tests, self.num_probed) < 2:
            raise ValueError("length, num_tests and num_probed must be at least 2")


@dataclass(frozen=True)
class Arm:
    """Whether there is a gate, how many layers there are, and what prompts train them."""

    is_gated: bool = True
    p_a: float = 0.6
    layers: int = 1
    cover: Literal["all", "cyclic"] = "all"
    has_two_lrs: bool = False


def train(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """SGD on fresh prompts, max(0, 1 - label · F); then tests."""
    torch.manual_seed(seed)
    sizes = config.dim, config.num_relevant, config.num_irrelevant
    task = OutlierICL(*sizes, p_a=arm.p_a, length=config.length, task_cover=arm.cover, seed=seed)
    generator = torch.Generator().manual_seed(10_000 + seed)
    is_deep = arm.layers > 1
    model: Any = (
        # Half of the usual start, and gradients clipped: without either the layers' outputs, which nothing normalizes, diverge.
        MambaZOH(config.dim + 1, config.dim + 1, layers=arm.layers, gated=arm.is_gated, delta=0.1)
        if is_deep
        else GatedLinearAttentionICL(config.dim, gated=arm.is_gated)
    )
    predict = model.predict if is_deep else model
    num_steps = config.deep_steps if is_deep else config.gated_steps if arm.is_gated else config.linear_steps
    batch = config.deep_batch if is_deep else config.batch
    losses: list[Tensor] = []

    def loss() -> Tensor:
        prompts = task.train_batch(batch)
        # The hinge loss is PyTorch's ranking loss against 0.
        hinge = F.margin_ranking_loss(predict(prompts.prompts), torch.zeros(batch), prompts.labels, margin=1.0)
        losses.append(hinge.detach())
        return hinge

    # Three layers take as long over a tenth of the prompts.
    num_probed = max(2, config.num_probed // 10) if is_deep else config.num_probed
    probe = ICLMechanismProbe(task.test_batch(0.5, count=num_probed, generator=generator))
    for series in probe.series:
        record.declare(series)

    @torch.no_grad()
    def look(step: int) -> None:
        record.add(step, dict(probe.measure(ModelView(step, model, (), {}, config.lr))))

    groups: Any = model.parameters()
    if arm.has_two_lrs:
        lrs = dict(zip(("W_B", "W_C", "w"), (config.two_lrs[0], *config.two_lrs), strict=True))
        groups = [{"params": [parameter], "lr": lrs[name]} for name, parameter in model.named_parameters()]
    optimizer = torch.optim.SGD(groups, lr=config.lr)
    max_norm = 1.0 if is_deep else None
    descend(optimizer, loss, num_steps, looks=log_steps(num_steps, per_decade=6), look=look, max_norm=max_norm)

    hinges = torch.stack(losses)
    reached = torch.nonzero(hinges < 0.1)
    shown = [step for step in log_steps(num_steps, per_decade=20) if step < num_steps]
    for step in shown:
        record.add(step, {"loss": hinges[step]})
    test(config, task, predict, generator, record)
    record.add(0, {"steps_to_hinge": float(reached[0]) if len(reached) else math.nan})


def test(config: Config, task: OutlierICL, predict: Any, generator: torch.Generator, record: StudyRecord) -> None:
    """Errors by share of outliers, rule, placement and pair of patterns."""
    settings: dict[str, Any] = {"count": config.num_tests, "generator": generator}
    curve = outlier_tolerance_curve(predict, ALPHAS, RULES, task=task, **settings)
    for rule in RULES:
        record.declare(Series(f"error/{rule}", ("alpha",), coords={"alpha": list(ALPHAS)}))
        record.declare(Series(f"ties/{rule}", ("alpha",), coords={"alpha": list(ALPHAS)}))
        record.add(0, {f"error/{rule}": curve.errors[rule], f"ties/{rule}": curve.ties[rule]})
    places = placement_accuracy(predict, task=task, **settings)
    record.declare(Series("accuracy/placement", ("placement",), coords={"placement": list(PLACEMENTS)}))
    record.add(0, {"accuracy/placement": torch.stack([places[place] for place in PLACEMENTS])})
    if len(task.training_tasks) < len(task.tasks("all")):
        for cover in ("seen", "unseen"):
            unseen = outlier_tolerance_curve(predict, (0.2,), ("flip",), task=task, cover=cover, **settings)
            record.add(0, {f"error/{cover}": unseen.errors["flip"][0]})
