"""Rewards and a teacher together, on the policy's own samples (KDRL, arXiv 2506.02208).

A student that does sums with written steps rather badly learns from rewards (GRPO), from a stronger teacher by the reverse
divergence on its own samples (KD-RKL), or from both in one loss (KDRL). Arms differ in the estimator of the divergence, in the
coefficient's schedule, and in whom the teacher corrects. The weight of a token is clamped: a small teacher's R reaches −20.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from dynascope.record import Series
from dynascope.rl.distillation import LinearAnneal, unsolved_prompts, wrong_answers
from dynascope.rl.kl import Kind, KLTerm
from dynascope.rl.loop import Step, draw_rollout
from dynascope.rl.objective import PolicyObjective
from dynascope.rl.presets import grpo
from dynascope.rl.rollout import score
from dynascope.rl.tasks.base_model import BaseModel, base_model
from dynascope.rl.teachers import GAP_NAMES, TeacherScorer, exact_teacher_kl, gradient_cosine, watch_teacher
from dynascope.studies.harness import StudyRecord
from dynascope.studies.harness.policy import declare, measure_policy, reinforce, start_model
from dynascope.studies.harness.sums import SumsConfig


@dataclass(frozen=True)
class Config(SumsConfig):
    """Sizes and lengths."""

    num_layers: int = 1
    width: int = 48
    base_steps: int = 160
    """Of supervised learning behind the student; it should be right about a fifth of the time."""
    weak_steps: int = 120
    """Behind the weak student, which is right once in twenty times."""
    teacher_layers: int = 2
    teacher_width: int = 64
    teacher_steps: int = 300
    """Few enough that the teacher is not sharp."""
    beta: float = 0.03
    """Of the teacher beside rewards."""
    clamp: float = 2.0
    """Of |R| as a token's weight."""
    num_steps: int = 50
    num_prompts: int = 16
    test_every: int = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.beta, self.clamp) <= 0:
            raise ValueError("beta and clamp must be positive")
        _ = self.teacher, self.weak_start  # check their sizes

    @property
    def weak_start(self) -> BaseModel:
        """The student that knows little."""
        return replace(self.start, num_steps=self.weak_steps)

    @property
    def teacher(self) -> BaseModel:
        """One teacher for all seeds."""
        return BaseModel(self.task, self.teacher_layers, self.teacher_width, num_steps=self.teacher_steps)

    @property
    def annealing(self) -> LinearAnneal:
        """In the paper's proportions: from 2.5 to 0.5 times the constant coefficient, at the floor after 2/7 of the steps."""
        return LinearAnneal.over(2.5 * self.beta, 0.5 * self.beta, max(2 * self.num_steps // 7, 1))


@dataclass(frozen=True)
class Arm:
    """What teaches, and how."""

    from_rewards: bool = True
    kind: Kind | Literal["sft"] | None = None
    """Of the term against the teacher; "sft" imitates the teacher's own samples instead."""
    is_annealed: bool = False
    mask: Literal["none", "response", "group"] = "none"
    is_weak: bool = False
    top: int | None = None
    """Of "full": how many of the student's likeliest tokens are summed over."""


MASKS = {
    "none": (None, frozenset[str]()),
    "response": (wrong_answers, frozenset({"correct"})),
    "group": (unsolved_prompts, frozenset({"is_solved"})),
}


def objective(config: Config, arm: Arm) -> PolicyObjective:
    """GRPO over tokens, the teacher's term, or both."""
    plain = grpo.having(aggregation="token-mean", policy_weight=1.0 if arm.from_rewards else 0.0)
    if arm.kind is None or arm.kind == "sft":
        return plain
    keep, needs = MASKS[arm.mask]
    constant = config.beta if arm.from_rewards else 1.0
    coefficient = config.annealing if arm.is_annealed else constant
    term = KLTerm("teacher", arm.kind, coefficient, config.clamp, keep, also_needs=needs, top=arm.top)
    return plain.having(kl=(term,))


def train(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """One student."""
    student = start_model(record, config.weak_start if arm.is_weak else config.start, seed)
    teacher = base_model(config.teacher, 0, record.folder.parents[3] / "models")
    record.add(0, {"teacher/correct": measure_policy(teacher, config.task, config.evaluation)["test/correct"]})
    if arm.kind == "sft":
        imitate(config, student, teacher, seed, record)
        return
    record.declare(Series("teacher/gap_histogram", ("gap",), coords={"gap": list(GAP_NAMES)}))
    losses = objective(config, arm)

    asked = TeacherScorer(teacher)

    def look(step: Step) -> None:
        if step.number % 10:
            return
        exact = exact_teacher_kl(student, asked, step.rollout)[step.rollout.mask].mean()
        record.add(step.number, {"teacher/kl_exact": exact})
        if arm.kind is None or arm.mask != "none":
            return
        if step.batch.teacher_log_probs is not None:
            record.add(step.number, watch_teacher(step.batch))
        if arm.from_rewards:
            also = losses.loss_needs & {"logits"}
            alone = losses.having(kl=()), losses.having(policy_weight=0.0)
            cosine, norms = gradient_cosine(
                student,
                [lambda one=one: one.loss(step.batch.having(**score(student, step.rollout, also)))[0] for one in alone],  # type: ignore[misc]
            )
            record.add(step.number, {"gradients/reward_teacher_cosine": cosine, "gradients/teacher_norm": norms[1]})

    reinforce(
        record,
        student,
        losses,
        config.task,
        config.loop,
        lr=config.lr,
        seed=seed,
        evaluation=config.evaluation,
        teacher=asked,
        look=look,
    )


def imitate(config: Config, student: nn.Module, teacher: nn.Module, seed: int, record: StudyRecord) -> None:
    """Supervised learning on as many samples of the teacher as the other arms draw of the student."""
    declare(record, config.evaluation)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.lr)
    for step in range(config.num_steps + 1):
        if step % config.evaluation.every == 0 or step == config.num_steps:
            record.add(step, measure_policy(student, config.task, config.evaluation))
        if step == config.num_steps:
            break
        _, rollout = draw_rollout(teacher, config.task, config.loop, generator)
        for rows in torch.randperm(len(rollout), generator=generator).chunk(config.loop.num_minibatches):
            part = rollout.select(rows)
            optimizer.zero_grad()
            loss = -(score(student, part)["log_probs"] * part.mask).sum() / part.mask.sum()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), config.loop.max_grad_norm)
            optimizer.step()
        record.add(step, {"loss": loss})
