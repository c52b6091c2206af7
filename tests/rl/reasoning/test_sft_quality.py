"""A base model becomes what a checkpoint teaches it."""

import copy
from typing import Any

import pytest
import torch

from dynascope.rl.reasoning.sft_quality import cot_quality_by_sft, taught_by
from dynascope.rl.rollout import Rollout, score
from dynascope.rl.tasks.arithmetic import Arithmetic
from tests.rl.test_rollout import drawn


def chance(model: Any, rollout: Rollout) -> float:
    """Mean log-probability of what was written."""
    with torch.no_grad():
        return float((score(model, rollout)["log_probs"] * rollout.mask).sum() / rollout.mask.sum())


def test_what_a_checkpoint_writes_becomes_likelier_and_the_base_stays_as_it_was(tiny_llama: Any) -> None:
    base, checkpoint = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    checkpoint.lm_head.weight.data.mul_(40)  # a policy that is surer of itself
    written = drawn(checkpoint)
    before = copy.deepcopy(base.state_dict())
    student = taught_by(base, checkpoint, Arithmetic((1,)), num_prompts=16, num_steps=40, batch_size=64, lr=1e-2)
    assert chance(student, written) > chance(base, written) + 0.2
    assert all(torch.equal(one, before[name]) for name, one in base.state_dict().items())


def test_every_checkpoint_is_measured_and_none_is_refused(tiny_llama: Any) -> None:
    told = cot_quality_by_sft(
        tiny_llama, {"a": tiny_llama, "b": tiny_llama}, Arithmetic((1,)), lambda student: student.lm_head.weight.norm(),
        num_prompts=4, num_steps=2, batch_size=8,
    )  # fmt: skip
    assert told["a"] == told["b"] != tiny_llama.lm_head.weight.norm()
    with pytest.raises(ValueError, match="no checkpoint"):
        cot_quality_by_sft(tiny_llama, {}, Arithmetic((1,)), lambda student: 0)
