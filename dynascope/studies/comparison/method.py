"""Objectives on equal terms: the same start models, problems, samples, optimizer steps and seeds; the objective alone differs.

Two tasks, both of sums with written steps. `arithmetic` is reinforcement learning: a policy draws answers and is rewarded for
right ones. `arithmetic-pairs` is preference learning: the start model draws once, a right answer and a wrong one of the same
problem make a pair, and the policy never draws again while it trains. Both are tested alike.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynascope.losses.preference import MARGIN_LOSSES, PreferencePairs, margin_loss
from dynascope.record import Series
from dynascope.rl.arithmetic import Arithmetic
from dynascope.rl.base_model import BaseModel
from dynascope.rl.loop import LoopConfig, draw_rollout
from dynascope.rl.presets import PRESETS, preset
from dynascope.rl.rollout import Rollout, score
from dynascope.studies.harness import StudyRecord
from dynascope.studies.harness.policy import Evaluation, declare, measure_policy, reinforce, start_model


@dataclass(frozen=True)
class Config:
    """What all objectives share."""

    digits: tuple[int, ...] = (2,)
    num_layers: int = 2
    width: int = 64
    base_steps: int = 300
    """Of supervised learning behind the start model; more make it stronger."""
    teacher_steps: int = 1500
    """Behind the teacher of objectives that have one."""
    num_steps: int = 60
    """Rollouts, or steps on pairs."""
    num_prompts: int = 32
    """A rollout, or pairs a step."""
    num_samples: int = 8
    """Completions a prompt."""
    num_minibatches: int = 2
    num_pairs: int = 512
    """Problems that are drawn for pairs; those with both a right and a wrong answer give one each."""
    lr: float = 5e-4
    test_problems: int = 128
    test_samples: int = 16
    test_every: int = 10

    @property
    def task(self) -> Arithmetic:
        """Sums of these levels."""
        return Arithmetic(self.digits)

    @property
    def start(self) -> BaseModel:
        """The model that every objective starts from."""
        return BaseModel(self.task, num_layers=self.num_layers, width=self.width, num_steps=self.base_steps)

    @property
    def evaluation(self) -> Evaluation:
        """How policies are tested."""
        return Evaluation(self.test_problems, self.test_samples, self.test_every)


def train_policy(config: Config, arm: str, seed: int, record: StudyRecord) -> None:
    """Reinforcement learning with the preset `arm`."""
    objective = preset(arm)
    needs = objective.rollout_needs | objective.loss_needs
    start = start_model(record, config.start, seed)
    teacher = None
    if not needs.isdisjoint({"teacher_log_probs", "teacher_logits"}):
        teacher = start_model(record, dataclasses.replace(config.start, num_steps=config.teacher_steps), seed)
    reinforce(
        record,
        start_model(record, config.start, seed),
        objective,
        config.task,
        LoopConfig(config.num_steps, config.num_prompts, config.num_samples, config.num_minibatches),
        lr=config.lr,
        seed=seed,
        evaluation=config.evaluation,
        start=start,
        ref_model=start,
        teacher=teacher,
    )


def train_pairs(config: Config, arm: str, seed: int, record: StudyRecord) -> None:
    """Preference learning with the margin loss `arm`."""
    loss = margin_loss(arm)
    start, model = (start_model(record, config.start, seed) for _ in range(2))
    generator = torch.Generator().manual_seed(seed)
    amount = LoopConfig(num_prompts=config.num_pairs, num_samples=config.num_samples)
    problems, rollout = draw_rollout(start, config.task, amount, generator)
    right = torch.tensor(config.task.are_right(problems, config.task.texts(rollout.tokens)))
    chosen, rejected = pairs_of(right.view(-1, config.num_samples))
    if not len(chosen):
        raise ValueError("no problem has both a right and a wrong answer; change base_steps or digits")
    with torch.no_grad():
        reference = log_probs(start, rollout)

    declare(record, config.evaluation)
    for side in ("chosen", "rejected"):
        record.declare(Series(f"logps/{side}", unit="nats", description=f"Log-probability of {side} answers."))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    for step in range(config.num_steps + 1):
        if step % config.test_every == 0 or step == config.num_steps:
            record.add(step, measure_policy(model, config.task, config.evaluation, start=start))
        if step == config.num_steps:
            break
        drawn = torch.randint(len(chosen), (config.num_prompts,), generator=generator)
        rows = torch.cat([chosen[drawn], rejected[drawn]])
        now, before = log_probs(model, rollout.select(rows)).chunk(2), reference[rows].chunk(2)
        optimizer.zero_grad()
        mean = loss(PreferencePairs(*now, *before, *rollout.lengths[rows].chunk(2))).mean()
        mean.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        record.add(step, {"loss": mean, "logps/chosen": now[0].mean(), "logps/rejected": now[1].mean()})


def pairs_of(right: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers of a right and of a wrong answer, the first of each, for problems (problems, answers) that have both."""
    both = right.any(1) & ~right.all(1)
    first = torch.arange(len(right)) * right.shape[1]
    return (first + right.int().argmax(1))[both], (first + (~right).int().argmax(1))[both]


def log_probs(model: nn.Module, rollout: Rollout) -> Tensor:
    """Of whole answers, (N,)."""
    return (score(model, rollout)["log_probs"] * rollout.mask).sum(1)


TASKS: Mapping[str, tuple[Callable[[Config, str, int, StudyRecord], None], tuple[str, ...]]] = {
    "arithmetic": (train_policy, tuple(PRESETS)),
    "arithmetic-pairs": (train_pairs, tuple(MARGIN_LOSSES)),
}
"""What trains on a task, and the objectives that it takes."""

SETTINGS = {
    "smoke": Config(
        (1,), num_layers=1, width=32, base_steps=60, teacher_steps=120, num_steps=6, num_prompts=8, num_pairs=64,
        test_problems=16, test_samples=4, test_every=3,
    ),
    "small": Config(),
    "large": Config((3,), num_layers=4, width=128, base_steps=1000, teacher_steps=4000, num_steps=300, num_prompts=128),
}  # fmt: skip
