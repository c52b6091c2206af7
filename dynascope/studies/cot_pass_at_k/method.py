"""Rewards for right answers alone teach right reasoning, where right reasoning pays (arXiv 2506.14245).

A bandit that only chooses between right and wrong reasoning follows the theorem. A small transformer then learns careless
scratchpads, whose answers a guess often hits, and is trained by GRPO with a reward for the answer; a rule checks every step of
what it writes, so that Pass@K and CoT-Pass@K need no other model to judge them.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dynascope.probes.reasoning import ReasoningDynamics
from dynascope.record import Series
from dynascope.rl.loop import LoopConfig, Step, draw_rollout
from dynascope.rl.presets import preset
from dynascope.rl.tasks.arithmetic import PAD, STOP, encode
from dynascope.rl.tasks.base_model import supervised_loss
from dynascope.studies.cot_pass_at_k.scratchpads import Scratchpads
from dynascope.studies.harness import StudyRecord
from dynascope.studies.harness.policy import Evaluation, measure_policy, reinforce
from dynascope.theory.logic_prior import estimate_logic_prior, simulate_policy


@dataclass(frozen=True)
class Config:
    """Sizes, and how long the phases are."""

    width: int = 48
    num_layers: int = 2
    num_heads: int = 4
    num_digits: int = 3
    teach_steps: int = 300
    """Supervised steps on careless demonstrations, which make the base model."""
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
        if self.num_samples < 2 or self.width % self.num_heads:
            raise ValueError("num_samples must be at least 2, and width a multiple of num_heads")


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
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    base = base_model(config, task, generator)
    model = copy.deepcopy(base)
    dynamics = ReasoningDynamics([1, config.num_samples])
    for series in dynamics.series:
        record.declare(series)

    def look(step: Step) -> None:
        record.add(step.number, told(step, task, config.num_samples, dynamics))

    record.add(0, sft_quality(config, task, base, model, seed))
    reinforce(
        record,
        model,
        preset("grpo"),
        task,
        LoopConfig(config.num_steps, config.num_prompts, config.num_samples, num_minibatches=1),
        lr=config.lr,
        seed=seed,
        evaluation=Evaluation(config.test_prompts, config.test_samples, config.test_every),
        look=look,
    )
    record.add(config.num_steps, sft_quality(config, task, base, model, seed))


def base_model(config: Config, task: Scratchpads, generator: torch.Generator) -> nn.Module:
    """A small Llama, taught by demonstrations."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=task.vocabulary,
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            max_position_embeddings=8 * config.num_digits,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=STOP,
            tie_word_embeddings=False,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.teach_lr)
    for _ in range(config.teach_steps):
        puzzles = task.draw(config.teach_batch, generator)
        optimizer.zero_grad()
        completions, mask = encode([one.completion for one in puzzles])
        supervised_loss(model, *task.prompts(puzzles), completions, mask).backward()
        optimizer.step()
    return model


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
        "advantage/right_chain": advantage[chains].mean(),
        "advantage/wrong_chain": advantage[~chains].mean(),
        "prior/alpha": prior.alpha.value,
        "prior/beta": prior.beta.value,
    }


def sft_quality(
    config: Config, task: Scratchpads, base: nn.Module, checkpoint: nn.Module, seed: int
) -> dict[str, Tensor]:
    """What the base model becomes when it is taught what a checkpoint wrote, where its answer was right (section 5)."""
    generator = torch.Generator().manual_seed(seed)
    amount = LoopConfig(num_prompts=config.teach_batch, num_samples=8)
    puzzles, rollout = draw_rollout(checkpoint, task, amount, generator)
    is_right = torch.tensor(task.are_right(puzzles, task.texts(rollout.tokens)))
    written = rollout.select(is_right if bool(is_right.any()) else torch.ones_like(is_right))
    model = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.teach_lr / 3)
    for _ in range(config.sft_steps):
        rows = torch.randint(len(written), (config.teach_batch,), generator=generator)
        batch = written.select(rows)
        optimizer.zero_grad()
        supervised_loss(model, batch.prompts, batch.prompt_mask, batch.tokens, batch.mask).backward()
        optimizer.step()
    measured = measure_policy(model, task, Evaluation(config.test_prompts, config.test_samples))
    return {
        "sft/correct": torch.as_tensor(measured["test/correct"]),
        "sft/chain": torch.as_tensor(measured["test/chain"]),
    }
