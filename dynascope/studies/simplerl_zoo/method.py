"""Zero RL on several base models: what decides whether it grows or collapses (arXiv 2503.18892).

Base models of three strengths are taught sums of one to three digits, some answers boxed, some chains checked. Then one
recipe trains them with a reward for right answers; what differs between arms is the base, the rule of the reward, the digits
of the questions, and whether the base is first fine-tuned on plain chains. All are tested on the sums of two digits.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import nn

from dynascope.record import Series
from dynascope.rl.interleaving.interleave import FineTuning, fine_tune
from dynascope.rl.loop import LoopConfig, Step
from dynascope.rl.monitors import watch_responses
from dynascope.rl.presets import simplerl_zoo
from dynascope.rl.tasks.arithmetic import Sum
from dynascope.rl.tasks.base_model import BaseModel
from dynascope.rl.tasks.reward_rules import RewardRule
from dynascope.studies.harness import StudyRecord
from dynascope.studies.harness.policy import Evaluation, measure_policy, reinforce, start_model
from dynascope.studies.simplerl_zoo.bandits import difficulty_bandit, format_bandit
from dynascope.studies.simplerl_zoo.task import CheckLabeller, StyledArithmetic, is_boxed

Strength = Literal["weak", "middle", "strong"]
LEVELS = {"easy": (1,), "medium": (2,), "hard": (3,)}
DIFFICULTIES = (0.0, 2.0, 4.0, 8.0)
SKILLS = {"weak": -2.0, "strong": 3.0}


@dataclass(frozen=True)
class Config:
    """Sizes and lengths."""

    base_digits: tuple[int, ...] = (1, 2, 3)
    widths: tuple[int, int, int] = (48, 64, 64)
    """Of the weak, middle and strong base."""
    base_steps: tuple[int, int, int] = (240, 300, 400)
    base_batch: int = 64
    base_lr: float = 3e-3
    num_layers: int = 2
    num_steps: int = 40
    num_prompts: int = 16
    num_samples: int = 8
    lr: float = 3e-4
    short_start: int = 10
    long_start: int = 50
    """Steps of fine-tuning of the two cold starts."""
    start_lr: float = 1e-3
    num_tests: int = 48
    test_samples: int = 8
    test_every: int = 20
    bandit_steps: tuple[int, int] = (150, 200)
    """Of the format and the difficulty bandit."""

    def __post_init__(self) -> None:
        if min(self.num_steps, self.num_prompts, self.num_samples, self.test_every, *self.base_steps) < 1:
            raise ValueError("num_steps, num_prompts, num_samples, test_every and base_steps must be at least 1")
        if self.test_samples < 8:
            raise ValueError(f"test_samples={self.test_samples}: pass@8 needs at least 8")
        for strength in get_args(Strength):
            self.base(strength)  # checks its sizes

    def base(self, strength: Strength) -> BaseModel:
        """One of the zoo."""
        place = ("weak", "middle", "strong").index(strength)
        return BaseModel(
            StyledArithmetic(self.base_digits), num_layers=self.num_layers, width=self.widths[place],
            num_steps=self.base_steps[place], batch_size=self.base_batch, lr=self.base_lr,
        )  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """What the recipe is applied to."""

    base: Strength = "weak"
    rule: str = "correctness"
    level: str = "medium"
    cold_start: Literal["none", "short", "long"] = "none"
    bandit: Literal["no", "format", "difficulty"] = "no"


def train(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """GRPO with every token weighing the same and a weak pull to the start model; or a bandit."""
    generator = torch.Generator().manual_seed(seed)
    if arm.bandit != "no":
        play(config, arm, generator, record)
        return
    model = start_model(record, config.base(arm.base), seed)
    if arm.cold_start != "none":
        num = config.short_start if arm.cold_start == "short" else config.long_start
        imitate(config, model, num, generator)
    start = start_model(record, config.base(arm.base), seed)
    start.load_state_dict(model.state_dict())

    look = testing(config, model, record)
    look(0)

    def see(step: Step) -> None:
        texts = step.completions
        assert step.batch.correct is not None
        told = watch_responses(
            step.rollout.lengths,
            step.rollout.is_truncated,
            step.batch.correct,
            formatted=torch.tensor([is_boxed(text) for text in texts]),
            texts=texts,
            labeller=CheckLabeller(),
        )
        record.add(step.number, {name: told[name] for name in SHOWN_OF_TEXTS})
        taken = step.number + 1
        if taken % config.test_every == 0 or taken == config.num_steps:
            look(taken)

    rule = RewardRule.named(arm.rule)
    reinforce(
        record,
        model,
        simplerl_zoo,
        config_task(arm),
        LoopConfig(config.num_steps, config.num_prompts, config.num_samples, 1),
        lr=config.lr,
        seed=seed,
        evaluation=None,
        look=see,
        rewards=rule.as_reward(lambda text, problem: problem.check(text).is_answer_right, is_boxed, column="problem"),
        ref_model=start,
    )


SHOWN_OF_TEXTS = ("rollout/formatted", "rollout/repetitive", "rollout/behaviours")


def config_task(arm: Arm) -> StyledArithmetic:
    """What an arm is trained on."""
    return StyledArithmetic(LEVELS[arm.level])


def testing(config: Config, model: nn.Module, record: StudyRecord) -> Callable[[int], None]:
    """Tests on the same sums of two digits, whatever an arm is trained on."""
    evaluation = Evaluation(config.num_tests, config.test_samples)
    task = StyledArithmetic(LEVELS["medium"])
    labels = {"k": evaluation.ks}
    record.declare(
        Series("benchmark/pass_at_k", ("k",), "", "Chance that one of k answers is right, two digits.", labels)
    )

    def look(step: int) -> None:
        for name, value in measure_policy(model, task, evaluation).items():
            record.add(step, {name.replace("test/", "benchmark/"): value})

    return look


def imitate(config: Config, model: nn.Module, num_steps: int, generator: torch.Generator) -> None:
    """Fine-tune on short chains without a check, boxed: what a conventional data set holds."""
    task = replace(StyledArithmetic(config.base_digits), boxed_share=1.0, checked_share=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.start_lr)
    for _ in range(num_steps):
        problems: list[Sum] = task.draw(config.base_batch, generator)
        fine_tune(model, task, problems, [one.completion for one in problems], optimizer, FineTuning(0.0))


def play(config: Config, arm: Arm, generator: torch.Generator, record: StudyRecord) -> None:
    """A bandit, and what it came to."""
    if arm.bandit == "format":
        course = format_bandit(RewardRule.named(arm.rule), config.bandit_steps[0], generator)
        for step, value in enumerate(course):
            record.add(step, {"bandit/correct": value})
        return
    record.declare(Series("bandit/gain", ("difficulty",), "", "Skill gained.", {"difficulty": list(DIFFICULTIES)}))
    skill = SKILLS[arm.base]
    ends = difficulty_bandit(skill, torch.tensor(DIFFICULTIES), config.bandit_steps[1], generator)
    record.add(config.bandit_steps[1], {"bandit/gain": ends - skill})
