"""A prompt that many completions share is worked out once, and training does not notice (arXiv 2506.05433).

Packed rows hold a prompt and all its completions; attention lets every completion see the prompt and itself. Two copies of a
model take the same policy-gradient steps on the same samples, one with packed rows and one with repeated prompts; then both
ways are timed over prompts, completions and groups of many sizes, and what they keep for the backward pass is counted.
"""

import copy
import statistics
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dynascope.nn.shared_prefix import estimate_savings
from dynascope.record import Series
from dynascope.rl.loop import LoopConfig, draw_rollout
from dynascope.rl.presets import grpo
from dynascope.rl.prompt_groups import PromptGroups
from dynascope.rl.shared_prefix import grouped_log_probs, kept_bytes
from dynascope.rl.tasks.arithmetic import Arithmetic
from dynascope.studies.harness import StudyRecord


@dataclass(frozen=True)
class Config:
    """The model, and what both ways are tried on."""

    num_layers: int = 4
    width: int = 128
    num_heads: int = 4
    num_steps: int = 30
    """Of policy gradients, with both ways side by side."""
    num_prompts: int = 4
    num_samples: int = 8
    lr: float = 1e-3
    prompts: tuple[int, ...] = (16, 128, 512)
    """Tokens of a prompt, on the grid of costs."""
    completions: tuple[int, ...] = (8, 32, 128)
    groups: tuple[int, ...] = (2, 8)
    num_repeats: int = 3
    """Of each timing, in turns; the median counts."""

    def __post_init__(self) -> None:
        if min(self.num_steps, self.num_prompts, self.num_repeats, *self.prompts, *self.completions, *self.groups) < 1:
            raise ValueError("every size must be at least 1")


@dataclass(frozen=True)
class Arm:
    """Whether training is compared, and in which precision, or cost."""

    of: Literal["training", "cost"]
    dtype: torch.dtype = torch.float32


def train(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """Compare what the arm is about."""
    if arm.of == "training":
        compare_training(config, arm.dtype, seed, record)
    else:
        compare_cost(config, seed, record)


def compare_training(config: Config, dtype: torch.dtype, seed: int, record: StudyRecord) -> None:
    """Steps of GRPO on sums from a random start, where every digit is a reward: both copies score the same samples."""
    task = Arithmetic(digits=(1,))
    torch.manual_seed(seed)
    shared = make_model(config, task.vocabulary).to(dtype)
    repeated = copy.deepcopy(shared)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=config.lr) for model in (shared, repeated)]
    generator = torch.Generator().manual_seed(seed)
    amount = LoopConfig(num_prompts=config.num_prompts, num_samples=config.num_samples)
    for step in range(config.num_steps):
        _, rollout = draw_rollout(repeated, task, amount, generator)
        rewards = torch.tensor([sum(map(str.isdigit, text)) / len(text) for text in task.texts(rollout.tokens)])
        batch = rollout.batch(rewards.to(dtype))
        batch = batch.having(advantage=grpo.advantages(batch))
        one_each = rollout.select(torch.arange(0, len(rollout), config.num_samples))
        sizes = torch.full((config.num_prompts,), config.num_samples)
        groups = PromptGroups(one_each.prompts, one_each.prompt_mask, rollout.tokens, rollout.mask, sizes)
        losses = []
        for model, optimizer, share in zip((shared, repeated), optimizers, (True, False), strict=True):
            log_probs, _ = grouped_log_probs(model, groups, share=share)
            loss, _ = grpo.loss(batch.having(log_probs=log_probs))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        record.add(
            step, {"loss": losses[1], "reward": rewards.mean(), "loss_difference": (losses[0] - losses[1]).abs()}
        )
        record.add(step, {"weight_difference": largest_difference(shared, repeated)})


def compare_cost(config: Config, seed: int, record: StudyRecord) -> None:
    """Forward and backward, in turns; what is kept for the backward pass; and what exact counting expects."""
    shape = {"prompt": config.prompts, "completion": config.completions, "group": config.groups}
    for name, description in {
        "speedup": "Time with repeated prompts over time with the automatic choice.",
        "token_ratio": "Tokens, shared over repeated.",
        "flops_ratio": "FLOPs, shared over repeated.",
        "kept_ratio": "Bytes kept for the backward pass, shared over repeated.",
    }.items():
        record.declare(Series(name, tuple(shape), "", description, shape))
    torch.manual_seed(seed)
    model = make_model(config, vocabulary=256)
    measured = [
        measure(model, prompt, completion, group, config.num_repeats)
        for prompt in config.prompts
        for completion in config.completions
        for group in config.groups
    ]
    sizes = [len(one) for one in shape.values()]
    record.add(0, {name: torch.tensor([one[name] for one in measured]).view(sizes) for name in measured[0]})


def measure(model: nn.Module, prompt: int, completion: int, group: int, num_repeats: int) -> dict[str, float]:
    """One point of the grid: one prompt, all completions as long as each other."""
    groups = PromptGroups(
        torch.randint(256, (1, prompt)),
        torch.ones(1, prompt).bool(),
        torch.randint(256, (group, completion)),
        torch.ones(group, completion).bool(),
        torch.tensor([group]),
    )
    seconds: dict[bool | None, list[float]] = {None: [], False: []}
    for repeat in range(num_repeats + 1):
        for share, taken in seconds.items():
            started = time.perf_counter()
            grouped_log_probs(model, groups, share=share)[0].sum().backward()
            if repeat:  # the first warms up
                taken.append(time.perf_counter() - started)
    saved = estimate_savings(groups.layout, model.config)
    assert saved.flops_ratio is not None
    return {
        "speedup": statistics.median(seconds[False]) / statistics.median(seconds[None]),
        "token_ratio": saved.token_ratio,
        "flops_ratio": saved.flops_ratio,
        "kept_ratio": kept_bytes(model, groups, share=True) / kept_bytes(model, groups, share=False),
    }


def make_model(config: Config, vocabulary: int) -> Any:
    """A GPT-2 of the study's size, without dropout: its layer norms work in whatever precision the model has."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_embd=config.width,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_positions=2 * max(config.prompts) + max(config.completions),
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def largest_difference(one: nn.Module, other: nn.Module) -> Tensor:
    """Between weights of two copies of a model."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return torch.stack([(a - b).abs().max() for a, b in pairs]).max().detach()
