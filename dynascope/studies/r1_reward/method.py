"""REINFORCE++ made stable: log-ratios held, outlying advantages left out, consistency paid for (arXiv 2505.02835).

A small transformer judges which of two results of a sum is right, after a thought that a rule checks. It learns careless
judgements, then REINFORCE++ takes over, with one completion a prompt and several passes over each rollout. Two more worlds
force what the method is there for: a record of the sampler's log-probabilities that is wrong for one token, and pairs so
easy that nearly all rewards are equal.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from dynascope.record import Series
from dynascope.rl.advantage_filter import AdvantageFilter, advantage_health
from dynascope.rl.batch import PolicyBatch
from dynascope.rl.loop import LoopConfig, Step, draw_rollout
from dynascope.rl.loop import train as train_policy
from dynascope.rl.objective import PolicyObjective
from dynascope.rl.presets import preset
from dynascope.rl.tasks.base_model import BaseModel
from dynascope.rl.tasks.pairwise import difficulty_by_attempts, position_report, vote
from dynascope.rl.tasks.rewards import FormatReward
from dynascope.studies.harness import StudyRecord
from dynascope.studies.harness.policy import start_model
from dynascope.studies.r1_reward.judging import FORMAT, GivenPairs, Judging, SumReward

PRE_CLIP = (1e-3, 1e3)
WORLDS = {"plain": Judging(), "drift": Judging(), "easy": Judging(wrong_thought=0.02, beside=0.01, is_obvious=True)}
VOTES = (5, 15)
ATTEMPTS = 4
"""At a pair, to know how hard it is for the base model."""


@dataclass(frozen=True)
class Config:
    """Sizes, and how long the phases are."""

    width: int = 48
    num_layers: int = 2
    num_heads: int = 4
    teach_steps: int = 400
    num_steps: int = 40
    num_prompts: int = 128
    num_passes: int = 4
    lr: float = 1e-3
    forced_steps: int = 10
    """Of the two worlds that force something."""
    test_prompts: int = 256

    def __post_init__(self) -> None:
        if min(self.teach_steps, self.num_steps, self.forced_steps, self.num_passes, self.test_prompts) < 1:
            raise ValueError("every number of steps, passes and prompts must be at least 1")
        if self.num_prompts < 2 or self.width % self.num_heads:
            raise ValueError("num_prompts must be at least 2, and width a multiple of num_heads")


@dataclass(frozen=True)
class Arm:
    """Which of the three parts are on, and in which world."""

    pre_clip: bool = False
    filter: bool = False
    consistency: bool = False
    world: str = "plain"
    is_cold: bool = False
    """Without the supervised learning before."""
    is_hard: bool = False
    """Only on pairs that the base model does not judge rightly at the first attempt."""

    def objective(self) -> PolicyObjective:
        """REINFORCE++ with these parts; with both it is the preset `stable_reinforce`."""
        return preset("reinforce_pp").having(
            pre_clip=PRE_CLIP if self.pre_clip else None, post=(AdvantageFilter(),) if self.filter else ()
        )


class _NotFiniteError(Exception):
    """Training has broken; there is nothing more to see."""


def train(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """One arm: the base model of its world, REINFORCE++, and a test before and after."""
    task = WORLDS[arm.world]
    spec = BaseModel(task, config.num_layers, config.width, config.num_heads, config.teach_steps, 128, 3e-3)
    spec = replace(spec, num_steps=0) if arm.is_cold else spec
    model, start = start_model(record, spec, seed), start_model(record, spec, seed)
    generator = torch.Generator().manual_seed(seed)
    is_plain = arm.world == "plain"
    loop = LoopConfig(
        config.num_steps if is_plain else config.forced_steps,
        config.num_prompts,
        num_samples=1,
        num_minibatches=1,
        num_passes=config.num_passes,
        stops_at_nonfinite=False,
    )
    objective = arm.objective()
    for name in JUDGED:
        record.declare(Series(f"judge/{name}", description=JUDGED[name]))
    if is_plain:
        record.add(0, judged(config, model, task))
    drawn_from = hard_pairs(config, model, task) if arm.is_hard else task

    def look(step: Step) -> None:
        health = advantage_health(objective.advantage(step.batch), step.batch)
        assert step.batch.advantage is not None
        used = step.batch.advantage.masked_fill(~step.batch.mask, 0.0).abs().amax()
        norm = torch.as_tensor(step.metrics["gradient_norm"])
        is_finite = bool(norm.isfinite() & torch.as_tensor(step.metrics["policy/policy_loss"]).isfinite())
        record.add(step.number, {**step.metrics, **health, "advantage/used_max_abs": used, "finite": float(is_finite)})
        if not is_finite:
            raise _NotFiniteError

    reward = SumReward(with_consistency=arm.consistency)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    try:
        train_policy(
            model,
            objective,
            drawn_from,
            optimizer,
            loop,
            generator=generator,
            rewards=reward,
            ref_model=start,
            keep=corrupt if arm.world == "drift" else None,
            look=look,
        )
    except _NotFiniteError:
        return
    if is_plain:
        record.add(config.num_steps, judged(config, model, task))


def hard_pairs(config: Config, model: nn.Module, task: Judging) -> GivenPairs:
    """Of sixteen rollouts' pairs those that the model judges wrongly at the first of a few attempts."""
    amount = LoopConfig(num_prompts=16 * config.num_prompts, num_samples=ATTEMPTS)
    pairs, rollout = draw_rollout(model, task, amount, torch.Generator().manual_seed(2**31 + 1))
    right = torch.tensor(task.are_right(pairs, task.texts(rollout.tokens))).view(-1, ATTEMPTS)
    difficult = (difficulty_by_attempts(right) >= 2).tolist()
    kept = tuple(pair for pair, is_hard in zip(pairs[::ATTEMPTS], difficult, strict=True) if is_hard)
    if not kept:
        raise ValueError("the base model judges every pair rightly: take fewer teach_steps")
    return GivenPairs(task.wrong_thought, task.beside, task.is_obvious, kept)


def corrupt(batch: PolicyBatch) -> Tensor:
    """Keeps every completion, but makes the sampler's record of one token wrong by 120 nats."""
    assert batch.behaviour_log_probs is not None
    batch.behaviour_log_probs[0, 0] -= 120
    return torch.ones(len(batch), dtype=torch.bool)


JUDGED = {
    "accuracy": "Share of right single judgements.",
    "accuracy_first": "Of pairs whose right result comes first.",
    "accuracy_second": "Of pairs whose right result comes second.",
    "says_first": "How often the first side is named.",
    "consistent": "Of right judgements, those whose thought says the same.",
    "format": "Share of completions in the format.",
    "vote": f"Share of right majorities of {VOTES[0]} judgements.",
    "vote_more": f"Of {VOTES[1]} judgements.",
}


def judged(config: Config, model: nn.Module, task: Judging) -> dict[str, Tensor | float]:
    """What the judge can do, on the same pairs and with the same random numbers every time."""
    amount = LoopConfig(num_prompts=config.test_prompts, num_samples=VOTES[1])
    pairs, rollout = draw_rollout(model, task, amount, torch.Generator().manual_seed(2**31))
    told = list(zip(pairs, task.texts(rollout.tokens), strict=True))
    said = torch.tensor([one.said(text) for one, text in told])
    labels = torch.tensor([one.label for one in pairs])
    is_right = said == labels
    agrees = torch.tensor([one.is_consistent(text) for one, text in told])
    votes = [vote(said.view(-1, VOTES[1]), count) for count in VOTES]
    few, many = ((one == labels[:: VOTES[1]]).double().mean() for one in votes)
    return {
        **{f"judge/{name}": value for name, value in position_report(labels, said).items()},
        "judge/consistent": agrees[is_right].double().mean(),
        "judge/format": float(np.mean(FormatReward(FORMAT)([text for _, text in told]))),
        "judge/vote": few,
        "judge/vote_more": many,
    }
