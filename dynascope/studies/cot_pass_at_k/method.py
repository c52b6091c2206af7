"""Rewards for right answers alone teach right reasoning, where right reasoning pays (arXiv 2506.14245).

A bandit that only chooses between right and wrong reasoning follows the theorem. A small transformer then learns careless
scratchpads, whose answers a guess often hits, and is trained by GRPO with a reward for the answer; a rule checks every step of
what it writes, so that Pass@K and CoT-Pass@K need no other model to judge them.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from dynascope.probes.reasoning import ReasoningDynamics
from dynascope.record import Series
from dynascope.rl.loop import LoopConfig, Step
from dynascope.rl.presets import preset
from dynascope.rl.reasoning.sft_quality import taught_by
from dynascope.rl.tasks.base_model import BaseModel
from dynascope.studies.cot_pass_at_k.scratchpads import Scratchpads
from dynascope.studies.harness import StudyRecord
from dynascope.studies.harness.policy import Evaluation, measure_policy, reinforce, start_model
from dynascope.theory.logic_prior import estimate_logic_prior, simulate_policy


@dataclass(frozen=True)
class Config:
    """Sizes, and how long the phases are."""

    width: int = 48
    num_layers: int = 2
    num_heads: int = 4
    num_digits: int = 3
    teach_steps: int = 500
    """Supervised steps on careless demonstrations, which make the base model. After 300 one of the seeds 10 to 12 reasoned
    rightly half as often as its demonstrations; after 500 all three as often."""
    teach_batch: int = 128
    teach_lr: float = 3e-3
    num_steps: int = 100
    num_prompts: int = 32
    num_samples: int = 8
    lr: float = 1e-3
    test_prompts: int = 64
    test_samples: int = 64
    test_every: int = 20
    sft_steps: int = 60
    """Supervised steps of the base model on what a checkpoint wrote."""
    bandit_runs: int = 5
    bandit_steps: int = 300

    def __post_init__(self) -> None:
        if min(self.teach_steps, self.num_steps, self.sft_steps, self.bandit_runs, self.bandit_steps) < 1:
            raise ValueError("every number of steps and runs must be at least 1")
        if self.num_samples < 2 or self.width % (2 * self.num_heads):
            raise ValueError("num_samples must be at least 2, and width a multiple of twice num_heads")


@dataclass(frozen=True)
class Bandit:
    """A policy whose only choice is whether it reasons rightly; α and β are the chances that its answer is right then."""

    alpha: float
    beta: float
    start: float = 0.2


@dataclass(frozen=True)
class Policy:
    """A transformer taught one kind of scratchpad, then trained by GRPO."""

    kind: Literal["guess", "shortcut"]


def train(config: Config, arm: Bandit | Policy, seed: int, record: StudyRecord) -> None:
    """One arm."""
    if isinstance(arm, Bandit):
        play(config, arm, seed, record)
    else:
        reason(config, arm, seed, record)


def play(config: Config, arm: Bandit, seed: int, record: StudyRecord) -> None:
    """REINFORCE with group advantages on the bandit; groups of 8, 16 of them a step, learning rate 0.3."""
    generator = torch.Generator().manual_seed(seed)
    runs, steps = config.bandit_runs, config.bandit_steps
    path = simulate_policy(arm.start, arm.alpha, arm.beta, runs=runs, steps=steps, generator=generator)
    record.declare(Series("bandit/chain_correct", ("run",), description="Chance of right reasoning."))
    for step in range(0, config.bandit_steps + 1, max(1, config.bandit_steps // 60)):
        record.add(step, {"bandit/chain_correct": path[:, step]})


def reason(config: Config, arm: Policy, seed: int, record: StudyRecord) -> None:
    """Teach careless reasoning, reward right answers, and watch what becomes of the reasoning."""
    task = Scratchpads(arm.kind, config.num_digits)
    spec = BaseModel(
        task, num_layers=config.num_layers, width=config.width, num_heads=config.num_heads,
        num_steps=config.teach_steps, batch_size=config.teach_batch, lr=config.teach_lr,
    )  # fmt: skip
    base = start_model(record, spec, seed)
    model = copy.deepcopy(base)
    dynamics = ReasoningDynamics([1, config.num_samples])
    evaluation = Evaluation(config.test_prompts, config.test_samples, config.test_every)
    for series in (*dynamics.series, *spread_series(config.num_samples), *taught_series(evaluation)):
        record.declare(series)

    def look(step: Step) -> None:
        record.add(step.number, told(step, task, config.num_samples, dynamics))
        taken = step.number + 1
        if taken % config.test_every == 0 or taken == config.num_steps:
            record.add(taken, sft_quality(config, task, base, model, seed, evaluation))

    record.add(0, sft_quality(config, task, base, model, seed, evaluation))
    reinforce(
        record,
        model,
        preset("grpo"),
        task,
        LoopConfig(config.num_steps, config.num_prompts, config.num_samples, num_minibatches=1),
        lr=config.lr,
        seed=seed,
        evaluation=evaluation,
        look=look,
    )


def told(step: Step, task: Scratchpads, num_samples: int, dynamics: ReasoningDynamics) -> dict[str, Tensor]:
    """Of one rollout: P(CA), P(CC|CA) and the curves, the advantages of right and wrong chains, and the Logic Prior."""
    chains = torch.tensor(task.are_chains_right(step.problems, step.completions)).view(-1, num_samples)
    assert step.batch.correct is not None
    assert step.batch.advantage is not None
    answers, advantage = step.batch.correct.view(chains.shape), step.batch.advantage.view(chains.shape)
    prompt_ids = torch.tensor([one.number for one in step.problems[::num_samples]])
    prior = estimate_logic_prior(chains, answers, resamples=0)
    return {
        **dynamics.measure(prompt_ids, answers, chains),
        **spread(answers, chains),
        "advantage/right_chain": advantage[chains].mean(),
        "advantage/wrong_chain": advantage[~chains].mean(),
        "prior/alpha": prior.alpha.value,
        "prior/beta": prior.beta.value,
    }


SPREADS = {
    "answer": "P(CA)",
    "chain_solved": "P(CC|CA), all answers right",
    "chain_hard": "P(CC|CA), some answers right",
}


def spread_series(num_samples: int) -> list[Series]:
    """Distributions over the prompts of a rollout."""
    levels = {"level": [place / num_samples for place in range(num_samples + 1)]}
    return [
        Series(f"prompts/{name}", ("level",), "", f"Shares of prompts by their {what}, to the nearest level.", levels)
        for name, what in SPREADS.items()
    ]


def spread(answers: Bool[Tensor, "prompts samples"], chains: Bool[Tensor, "prompts samples"]) -> dict[str, Tensor]:
    """How P(CA), and P(CC|CA) where all answers are right and where some are not, lie over prompts (section 5)."""
    num_samples, right = answers.shape[1], answers.sum(1)
    reasoned = (answers & chains).sum(1) / right.clamp(min=1)
    of = {
        "answer": right / num_samples,
        "chain_solved": reasoned[right == num_samples],
        "chain_hard": reasoned[(right > 0) & (right < num_samples)],
    }
    return {
        f"prompts/{name}": (values * num_samples).round().long().bincount(minlength=num_samples + 1) / len(values)
        for name, values in of.items()
    }


def taught_series(evaluation: Evaluation) -> list[Series]:
    """Of the base model once a checkpoint has taught it."""
    return [
        Series(f"sft/{name}", ("k",), "", f"Chance that one of k {of} right.", {"k": evaluation.ks})
        for name, of in (("pass_at_k", "answers is"), ("cot_pass_at_k", "chains and their answer are"))
    ]


def sft_quality(
    config: Config, task: Scratchpads, base: nn.Module, checkpoint: nn.Module, seed: int, evaluation: Evaluation
) -> dict[str, Tensor]:
    """What the base model becomes when it is taught what a checkpoint wrote, where its answer was right (section 5)."""
    student = taught_by(
        base, checkpoint, task, num_prompts=config.teach_batch, num_steps=config.sft_steps,
        batch_size=config.teach_batch, lr=config.teach_lr / 3, seed=seed,
    )  # fmt: skip
    measured = measure_policy(student, task, evaluation)
    kept = ("correct", "chain", "pass_at_k", "cot_pass_at_k")
    return {f"sft/{name}": torch.as_tensor(measured[f"test/{name}"]) for name in kept}
