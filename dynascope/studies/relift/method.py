"""Reinforcement learning keeps what a model can do, fine-tuning brings what it cannot: interleave them (arXiv 2506.07527).

Sums of one and two digits with written steps. The data of the base model hold a mistake: of sums of two digits that pass a
hundred they leave the leading 1 out of the answer, so that the model never gets those right however often it tries, while the
others fall into all strata of difficulty. All arms take as many optimizer steps of their main
loss; what differs is when they fine-tune on demonstrations, and on which questions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dynascope.losses.demonstrations import DemonstrationLoss, interleaved_sft_loss
from dynascope.record import Series
from dynascope.rl.interleaving.demonstrations import Demonstrations
from dynascope.rl.interleaving.interleave import FineTuning, Interleaver, WithDemonstrations
from dynascope.rl.interleaving.mixed_policy import DemonstrationsInGroups
from dynascope.rl.logits import completion_logits
from dynascope.rl.loop import LoopConfig, Step, draw_rollout
from dynascope.rl.presets import luffy, relift_rl
from dynascope.rl.tasks.arithmetic import Arithmetic, Sum
from dynascope.rl.tasks.base_model import BaseModel
from dynascope.rl.tasks.difficulty import STRATA, DifficultyProbe, DifficultyProfile
from dynascope.studies.harness import StudyRecord
from dynascope.studies.harness.policy import reinforce, start_model


@dataclass(frozen=True)
class CarelessSum(Sum):
    """A sum as the base model's data have it: the carry out of the last column is lost where there are several columns."""

    @property
    def is_lost(self) -> bool:
        """Whether the answer lacks its first digit."""
        return passes(self)

    @property
    def completion(self) -> str:
        """The right chain, and an answer without the last carry."""
        total = str(self.first + self.second)
        return f"{','.join(self.steps)}>{total[1:].lstrip('0') or '0'}$" if self.is_lost else super().completion


def passes(problem: Sum) -> bool:
    """Whether a sum of several digits has one digit more than its numbers."""
    longest = len(str(max(problem.first, problem.second)))
    return longest > 1 and len(str(problem.first + problem.second)) > longest


@dataclass(frozen=True)
class CarelessArithmetic(Arithmetic):
    """The task of the base model's data."""

    loses_carry: bool = True

    def draw(self, num: int, generator: torch.Generator) -> list[Sum]:
        """As `Arithmetic`, with the mistake in the completions."""
        return [CarelessSum(one.first, one.second) for one in super().draw(num, generator)]


@dataclass(frozen=True)
class Config:
    """Sizes and rates."""

    digits: tuple[int, ...] = (1, 2)
    num_layers: int = 2
    width: int = 64
    base_steps: int = 200
    base_batch: int = 64
    base_lr: float = 3e-3
    num_steps: int = 60
    num_prompts: int = 24
    num_samples: int = 8
    """Rollouts of a prompt, as in the paper."""
    rl_lr: float = 5e-4
    max_grad_norm: float = 0.7
    sft_batch: int = 24
    """Demonstrations a step of fine-tuning; the paper's M."""
    sft_lr: float = 1e-3
    entropy_coef: float = 1e-4
    num_questions: int = 96
    """For validation; each is answered 8 times."""
    num_looks: int = 3
    """Validations after the first."""

    def __post_init__(self) -> None:
        if min(self.num_steps, self.num_prompts, self.num_samples, self.sft_batch, self.num_questions) < 1:
            raise ValueError("num_steps, num_prompts, num_samples, sft_batch and num_questions must be at least 1")
        if not 1 <= self.num_looks <= self.num_steps:
            raise ValueError(f"num_looks={self.num_looks} must be between 1 and num_steps={self.num_steps}")
        _ = self.base  # checks its sizes

    @property
    def task(self) -> Arithmetic:
        """All the sums."""
        return Arithmetic(self.digits)

    @property
    def base(self) -> BaseModel:
        """The model that every arm starts from."""
        return BaseModel(
            CarelessArithmetic(self.digits), num_layers=self.num_layers, width=self.width, num_steps=self.base_steps,
            batch_size=self.base_batch, lr=self.base_lr,
        )  # fmt: skip

    @property
    def looks(self) -> list[int]:
        """Steps at which is validated."""
        return [round(look * self.num_steps / self.num_looks) for look in range(self.num_looks + 1)]


@dataclass(frozen=True)
class Arm:
    """When is fine-tuned: a schedule of `rl/interleaving/schedules.py`, or one of the other ways to join both."""

    schedule: str
    joined: Literal["no", "one loss", "one after the other", "one group"] = "no"
    lacks_hardest: bool = False
    """The sums that the base model's data got wrong have no demonstration."""


VALIDATION = 8
_SEED = 2**31


def train(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """Train one arm and validate it by the stratum in which each question began."""
    model = start_model(record, config.base, seed)
    look = validation(config, model, record)
    look(0)
    source = Demonstrations(
        lambda problem: None if arm.lacks_hardest and passes(problem) else problem.completion, accept
    )
    interleaver = Interleaver(
        model,
        config.task,
        source,
        batch_size=config.sft_batch,
        schedule=arm.schedule,
        lr=config.sft_lr,
        how=FineTuning(config.entropy_coef),
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed)
    split = {"one after the other": config.num_steps // 2}.get(arm.joined, 0)
    num_alone = config.num_steps if arm.schedule == "always" and not split else split
    for number in range(num_alone):
        record.add(number, interleaver.fine_tune_only(number, generator))
        if number + 1 in config.looks:
            look(number + 1)
    if num_alone == config.num_steps:
        return

    def see(step: Step) -> None:
        taken = num_alone + step.number + 1
        if mix is None:
            record.add(step.number, {"rollout/solve_none_format": without_format(step, config.num_samples)})
        if arm.joined == "no":
            record.add(step.number, interleaver(step))
        elif arm.joined == "one loss":
            record.add(step.number, {"demonstrations/used": float(taken * config.sft_batch)})
        elif mix is not None:
            record.add(step.number, {"demonstrations/used": mix.budget.used})
        if taken in config.looks:
            look(taken)

    objective: Any = relift_rl
    if arm.joined == "one loss":
        drawn = draws(config, model, generator)
        objective = WithDemonstrations.of(relift_rl, drawn)
    mix = None
    if arm.joined == "one group":
        objective, mix = luffy, DemonstrationsInGroups(model, config.task, source)
    loop = LoopConfig(
        config.num_steps - num_alone, config.num_prompts, config.num_samples, 1, max_grad_norm=config.max_grad_norm
    )
    reinforce(
        record, model, objective, config.task, loop, lr=config.rl_lr, seed=seed, evaluation=None, look=see, mix=mix
    )


def without_format(step: Step, num_samples: int) -> float:
    """Share of prompts of which no completion is formatted."""
    pairs = zip(step.problems, step.completions, strict=True)
    formatted = torch.tensor([problem.check(text).is_formatted for problem, text in pairs])
    return float((~formatted.view(-1, num_samples).any(1)).float().mean())


def accept(problem: Sum, solution: str) -> bool:
    """A demonstration's answer must be right."""
    return problem.check(solution).is_answer_right


def draws(config: Config, model: nn.Module, generator: torch.Generator) -> Callable[[], DemonstrationLoss]:
    """The fine-tuning loss of a fresh batch each time that it is asked for."""

    def draw() -> DemonstrationLoss:
        problems = config.task.draw(config.sft_batch, generator)
        tokens, mask = config.task.completions([one.completion for one in problems])
        logits = completion_logits(model, *config.task.prompts(problems), tokens)
        return interleaved_sft_loss(logits, tokens, mask, entropy_coef=config.entropy_coef)

    return draw


def validation(config: Config, model: nn.Module, record: StudyRecord) -> Callable[[int], None]:
    """Answers to the same questions whenever it is called, by their strata at the start.

    Strata come from answers of their own: those that put a question among the hardest are not those that it is measured by.
    """
    strata = [f"began {name}" for name in STRATA]
    for name, unit, dims in (
        ("accuracy", "", 1), ("length", "tokens", 1), ("questions", "", 1), ("transitions", "", 2)
    ):  # fmt: skip
        labels: dict[str, Any] = {"stratum": strata, "later": list(STRATA)}
        axes = ("stratum", "later")[:dims]
        told = f"Of validation questions by their first stratum: {name}."
        record.declare(Series(f"difficulty/{name}", axes, unit, told, {axis: labels[axis] for axis in axes}))
    told = "Share of right answers to validation questions whose answer passes to one digit more: those that an arm may lack."
    record.declare(Series("validation/passing", description=told))
    told = "Share of a rollout's prompts of which no completion is even formatted."
    record.declare(Series("rollout/solve_none_format", description=told))
    amount = LoopConfig(num_prompts=config.num_questions, num_samples=VALIDATION)

    def profile(seed: int) -> tuple[DifficultyProfile, Tensor, Tensor]:
        # The same questions come first from every generator of one seed; the answers differ by the second.
        fixed = _Fixed(config.digits, config.num_questions)
        problems, rollout = draw_rollout(model, fixed, amount, torch.Generator().manual_seed(seed))
        right = torch.tensor(fixed.are_right(problems, fixed.texts(rollout.tokens))).view(-1, VALIDATION)
        is_passing = torch.tensor([passes(problem) for problem in problems[::VALIDATION]])
        names = list(range(config.num_questions))
        return DifficultyProfile.of(names, right, rollout.lengths.float().view(-1, VALIDATION)), right, is_passing

    probe = DifficultyProbe(profile(_SEED)[0])

    def look(step: int) -> None:
        now, right, is_passing = profile(_SEED + 1)
        record.add(step, {**probe.compare(now), "validation/correct": right.float().mean()})
        record.add(step, {"validation/length": now.length.mean()})
        record.add(step, {"validation/passing": right[is_passing].float().mean()})

    return look


@dataclass(frozen=True)
class _Fixed(Arithmetic):
    """The task with the questions of validation."""

    num: int = 1

    def draw(self, num: int, generator: torch.Generator) -> list[Sum]:
        return replace(Arithmetic(self.digits)).draw(num, torch.Generator().manual_seed(_SEED))
