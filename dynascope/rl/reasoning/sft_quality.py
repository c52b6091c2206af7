"""How good a checkpoint's reasoning is, by what the base model becomes when it is taught it (arXiv 2506.14245, section 5)."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from dynascope.rl.loop import LoopConfig, Task, draw_rollout
from dynascope.rl.tasks.base_model import supervised_loss

Measured = TypeVar("Measured")


def taught_by(
    base: nn.Module,
    checkpoint: nn.Module,
    task: Task,
    *,
    num_prompts: int = 128,
    num_samples: int = 8,
    num_steps: int = 60,
    batch_size: int = 128,
    lr: float = 1e-3,
    seed: int = 0,
) -> nn.Module:
    """A copy of `base` after `num_steps` supervised steps on what `checkpoint` wrote, where its answer was right.

    Where no answer was right it is taught all of them.

    >>> student = taught_by(base, model, Arithmetic())
    """
    generator = torch.Generator().manual_seed(seed)
    amount = LoopConfig(num_prompts=num_prompts, num_samples=num_samples)
    problems, rollout = draw_rollout(checkpoint, task, amount, generator)
    is_right = torch.tensor(task.are_right(problems, task.texts(rollout.tokens)), device=rollout.tokens.device)
    written = rollout.select(is_right if bool(is_right.any()) else torch.ones_like(is_right))
    student = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr)
    for _ in range(num_steps):
        batch = written.select(torch.randint(len(written), (batch_size,), generator=generator).to(is_right.device))
        optimizer.zero_grad()
        supervised_loss(student, batch.prompts, batch.prompt_mask, batch.tokens, batch.mask).backward()
        optimizer.step()
    return student


def cot_quality_by_sft(
    base: nn.Module,
    checkpoints: Mapping[str, nn.Module],
    task: Task,
    measure: Callable[[nn.Module], Measured],
    **settings: Any,
) -> dict[str, Measured]:
    """What `measure` says of the base model after each checkpoint has taught it; settings are those of `taught_by`.

    Raises ValueError without a checkpoint.

    >>> cot_quality_by_sft(base, {"0": base, "100": model}, task, lambda student: measure_policy(student, task))
    """
    if not checkpoints:
        raise ValueError("there is no checkpoint whose reasoning could be taught")
    return {name: measure(taught_by(base, one, task, **settings)) for name, one in checkpoints.items()}
