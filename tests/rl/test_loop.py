"""The loop learns, gives each objective what it needs and nothing else, and tells what is missing."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from dynascope.rl.advantages import GroupZScore
from dynascope.rl.batch import PolicyBatch
from dynascope.rl.kl import KLTerm
from dynascope.rl.loop import LoopConfig, Step, train
from dynascope.rl.monitors import learnable_groups
from dynascope.rl.presets import dapo, grpo, preset, reinforce_pp
from dynascope.rl.rollout import score
from dynascope.rl.tasks.arithmetic import Arithmetic, answer_reward
from dynascope.rl.tasks.base_model import BaseModel, base_model

TASK = Arithmetic(digits=(1,))
QUICK = LoopConfig(num_steps=2, num_prompts=4, num_samples=4)


def run(model: Any, objective: Any, config: LoopConfig = QUICK, lr: float = 1e-3, **more: Any) -> list[Step]:
    steps: list[Step] = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(0)
    train(model, objective, TASK, optimizer, config, generator=generator, look=steps.append, **more)
    return steps


def test_it_learns_what_is_rewarded(tiny_llama: Any) -> None:
    def ones(completions: list[str], **columns: Any) -> list[float]:
        return [text.count("1") / TASK.max_new_tokens for text in completions]

    steps = run(tiny_llama, dapo, LoopConfig(num_steps=15, num_prompts=4), lr=3e-3, rewards=ones)
    rewards = [float(step.metrics["rollout/reward"]) for step in steps]
    assert rewards[0] < 0.15  # one character of sixteen, at random
    assert rewards[-1] > rewards[0] + 0.3


def test_a_small_step_raises_the_log_probs_of_better_completions(tiny_llama: Any) -> None:
    steps = run(
        tiny_llama,
        grpo,
        LoopConfig(num_steps=1, num_minibatches=1),
        lr=1e-5,
        rewards=lambda completions, **columns: [float(len(text)) for text in completions],
    )
    (step,) = steps
    with torch.no_grad():
        change = (score(tiny_llama, step.rollout)["log_probs"] - step.batch.behaviour_log_probs) * step.batch.mask
    assert float((step.batch.advantage * change.mean(1)).mean()) > 0


def test_a_base_model_is_trained_once(tmp_path: Path) -> None:
    spec = BaseModel(TASK, num_layers=1, width=16, num_heads=2, num_steps=3)
    first = base_model(spec, seed=0, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    second = base_model(spec, seed=0, folder=tmp_path)
    assert file.stat().st_mtime_ns == written
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    base_model(spec, seed=1, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce_pp", "ppo"])
def test_every_preset_runs(name: str, tiny_llama: Any) -> None:
    for step in run(tiny_llama, preset(name), ref_model=copy.deepcopy(tiny_llama)):
        assert step.metrics["policy/policy_loss"].isfinite()
        assert step.metrics["policy/entropy"] > 0


def test_the_same_seed_is_the_same_run(tiny_llama: Any) -> None:
    # Some prompts must have a right answer for anything to move; the reward here is one that differs.
    def reward(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    models = [copy.deepcopy(tiny_llama) for _ in range(2)]
    for model in models:
        run(model, grpo, rewards=reward)
    for one, other, start in zip(*(model.parameters() for model in (*models, tiny_llama)), strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, start)


def test_a_teacher_and_a_start_model_are_asked_only_when_needed(tiny_llama: Any) -> None:
    joint = dapo.having(kl=(KLTerm("teacher", "k2", 0.1), KLTerm("ref", "full", 0.1)))
    with pytest.raises(ValueError, match="ref_logits: give ref_model="):
        run(tiny_llama, joint)
    with pytest.raises(ValueError, match="teacher_log_probs: give teacher="):
        run(tiny_llama, joint, ref_model=copy.deepcopy(tiny_llama))
    teacher = copy.deepcopy(tiny_llama)
    torch.nn.init.normal_(teacher.lm_head.weight, std=0.2)
    (first, *_) = run(tiny_llama, joint, ref_model=copy.deepcopy(tiny_llama), teacher=teacher)
    assert first.batch.teacher_log_probs is not None
    assert first.batch.ref_log_probs is None
    assert run(tiny_llama, dapo)[0].batch.hidden is None


def test_a_teacher_and_a_start_model_with_another_vocabulary_are_refused(tiny_llama: Any) -> None:
    other = copy.deepcopy(tiny_llama)
    other.resize_token_embeddings(20)
    with pytest.raises(ValueError, match="the teacher has a vocabulary of 20 tokens"):
        run(tiny_llama, dapo, teacher=other)
    with pytest.raises(ValueError, match="the start model has a vocabulary of 20 tokens"):
        run(tiny_llama, dapo, ref_model=other)


def test_hidden_states_reach_a_post_processor_that_asks(tiny_llama: Any) -> None:
    class Asks:
        needs = frozenset({"hidden", "unembedding", "correct"})

        def __call__(self, advantage: torch.Tensor, batch: PolicyBatch) -> torch.Tensor:
            assert batch.hidden is not None
            assert batch.unembedding is not None
            logits = batch.hidden @ batch.unembedding.T
            log_probs = logits.log_softmax(-1).gather(2, batch.tokens[..., None])[..., 0]
            torch.testing.assert_close(
                log_probs[batch.mask], batch.behaviour_log_probs[batch.mask], atol=1e-5, rtol=1e-4
            )
            return advantage[:, None] * batch.mask

    assert run(tiny_llama, grpo.having(post=(Asks(),)))[0].batch.advantage.ndim == 2


def test_uniform_groups_can_be_left_out_and_a_rollout_of_them_takes_no_step(tiny_llama: Any) -> None:
    before = copy.deepcopy(tiny_llama)

    def keep(batch: PolicyBatch) -> torch.Tensor:
        return learnable_groups(batch.rewards, batch.group_ids)

    def same(completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    steps = run(tiny_llama, dapo, rewards=same, keep=keep)
    assert all(len(step.batch) == 0 and "policy/policy_loss" not in step.metrics for step in steps)
    for one, other in zip(tiny_llama.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other)

    def first_differs(problem: list[Any], **columns: Any) -> list[float]:
        return [float(place == 0) for place in range(len(problem))]

    (step, *_) = run(tiny_llama, dapo, rewards=first_differs, keep=keep)
    assert step.batch.group_ids.tolist() == [0, 0, 0, 0]
    assert len(step.problems) == len(step.completions) == len(step.rollout) == 4


def test_rewards_see_the_problem_and_their_errors_are_told(tiny_llama: Any) -> None:
    assert run(tiny_llama, dapo, rewards=answer_reward)[0].batch.rewards.shape == (16,)
    with pytest.raises(ValueError, match="raised ZeroDivisionError"):
        run(tiny_llama, dapo, rewards=lambda **columns: [1 / 0])


def test_a_gradient_that_is_not_finite_ends_training_in_one_line(tiny_llama: Any) -> None:
    class Explodes(GroupZScore):
        def __call__(self, batch: PolicyBatch) -> torch.Tensor:
            return torch.full_like(batch.rewards, torch.inf)

    before = copy.deepcopy(tiny_llama.state_dict())
    with pytest.raises(ValueError, match="step 0: a gradient is not finite"):
        run(tiny_llama, grpo.having(advantage=Explodes()))
    assert all(torch.equal(weight, before[name]) for name, weight in tiny_llama.state_dict().items())


def test_reinforce_pp_takes_one_completion_a_prompt(tiny_llama: Any) -> None:
    config = LoopConfig(num_steps=1, num_prompts=6, num_samples=1)
    assert len(run(tiny_llama, reinforce_pp, config, ref_model=copy.deepcopy(tiny_llama))[0].batch) == 6
    with pytest.raises(ValueError, match="every group has size 1"):
        run(tiny_llama, grpo, config)
