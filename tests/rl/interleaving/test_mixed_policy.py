"""LUFFY: a demonstration in each group, weighed by how likely it is, and plain RL where there is none."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dynascope.rl.batch import PolicyBatch
from dynascope.rl.interleaving.demonstrations import Demonstrations
from dynascope.rl.interleaving.mixed_policy import DemonstrationsInGroups
from dynascope.rl.logits import completion_logits
from dynascope.rl.loop import LoopConfig, Step, draw_rollout, train
from dynascope.rl.presets import grpo, luffy, relift_rl
from dynascope.rl.rollout import score
from dynascope.rl.tasks.arithmetic import Arithmetic
from dynascope.rl.tasks.gsm8k import WordProblems

TASK = Arithmetic((1,))
CONFIG = LoopConfig(num_steps=2, num_prompts=3, num_samples=4)
SOLVED = Demonstrations(lambda problem: problem.completion)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def weights(model: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_the_weight_of_a_demonstration_by_hand() -> None:
    """−π / (π + γ) · A on demonstrations; its gradient in log π is −π γ / (π + γ)² · A."""
    log_probs = torch.tensor([[0.5, 0.1], [0.02, 0.8]], dtype=torch.float64).log().requires_grad_()
    batch = PolicyBatch(
        mask=torch.ones(2, 2).bool(), rewards=torch.tensor([0.0, 1.0]), group_ids=torch.zeros(2).long(), max_length=2,
        advantage=torch.tensor([-1.0, 3.0]), log_probs=log_probs, is_demonstration=torch.tensor([False, True]),
    )  # fmt: skip
    objective = luffy.having(entropy_bonus=0.0)
    loss, _ = objective.loss(batch)
    loss.backward()
    # Sums over 2 completions · 2 tokens: on samples ratio · A = −1 each, on the demonstration π / (π + 0.1) · 3.
    expected = (1 + 1 - 3 * 0.02 / 0.12 - 3 * 0.8 / 0.9) / 4
    assert float(loss.detach()) == pytest.approx(expected)
    slopes = [[1.0, 1.0], [-3 * 0.02 * 0.1 / 0.12**2, -3 * 0.8 * 0.1 / 0.9**2]]
    assert log_probs.grad is not None
    torch.testing.assert_close(log_probs.grad * 4, torch.tensor(slopes, dtype=torch.float64))


def test_a_token_that_cannot_be_has_no_slope_that_is_not_finite() -> None:
    log_probs = torch.tensor([[-1e4]]).requires_grad_()
    batch = PolicyBatch(
        mask=torch.ones(1, 1).bool(), rewards=torch.ones(1), group_ids=torch.zeros(1).long(), max_length=1,
        advantage=torch.ones(1), log_probs=log_probs, is_demonstration=torch.tensor([True]),
    )  # fmt: skip
    loss, _ = luffy.having(entropy_bonus=0.0).loss(batch)
    loss.backward()
    assert log_probs.grad is not None
    assert float(loss.detach()) == 0
    assert math.isfinite(float(log_probs.grad))


def test_the_last_completion_of_each_prompt_becomes_its_demonstration(tiny_llama: Any) -> None:
    problems, rollout = draw_rollout(tiny_llama, TASK, CONFIG, generator())
    known = {problems[0].prompt: problems[0].completion, problems[8].prompt: problems[8].completion}
    mixed, is_given = DemonstrationsInGroups(tiny_llama, TASK, Demonstrations(known))(problems, rollout)
    places = [place for place in (3, 7, 11) if problems[place].prompt in known]
    assert is_given.nonzero().flatten().tolist() == places
    texts = TASK.texts(mixed.tokens)
    assert [texts[place] for place in places] == [problems[place].completion for place in places]
    assert all(TASK.are_right([problems[place] for place in places], [texts[place] for place in places]))
    width, own = rollout.tokens.shape[1], ~is_given
    assert torch.equal(mixed.tokens[own, :width], rollout.tokens[own])
    assert torch.equal(mixed.behaviour_log_probs[own, :width], rollout.behaviour_log_probs[own])
    assert not mixed.mask[own, width:].any()
    now = score(tiny_llama, mixed)["log_probs"].masked_fill(~mixed.mask, 0.0)
    torch.testing.assert_close(mixed.behaviour_log_probs, now, atol=1e-4, rtol=1e-4)


def test_monitors_look_at_samples_alone_and_learning_at_all(tiny_llama: Any) -> None:
    steps: list[Step] = []
    mix = DemonstrationsInGroups(tiny_llama, TASK, SOLVED)
    optimizer = torch.optim.AdamW(tiny_llama.parameters(), lr=3e-3)
    train(tiny_llama, luffy, TASK, optimizer, CONFIG, generator=generator(), mix=mix, look=steps.append)
    first = steps[0]
    assert float(first.metrics["rollout/demonstrations"]) == 0.25
    assert float(first.metrics["rollout/correct"]) == 0  # a model that knows nothing
    assert first.batch.correct is not None
    assert first.batch.correct.tolist() == [False, False, False, True] * 3
    assert first.drawn_correct is not None
    assert (len(first.drawn), len(first.drawn_correct)) == (9, 9)
    assert mix.budget.used == 6


def test_it_learns_where_samples_teach_nothing(tiny_llama: Any) -> None:
    """All samples are wrong: RL has no gradient, and the demonstration becomes likelier."""
    problems, rollout = draw_rollout(tiny_llama, TASK, CONFIG, generator())
    mixed, is_given = DemonstrationsInGroups(tiny_llama, TASK, SOLVED)(problems, rollout)
    shown = mixed.select(is_given)

    def likelihood(model: Any) -> float:
        return float((score(model, shown)["log_probs"].detach() * shown.mask).sum())

    alone, before = copy.deepcopy(tiny_llama), likelihood(tiny_llama)
    for model, objective, mix in (
        (alone, relift_rl.having(entropy_bonus=0.0), None),
        (tiny_llama, luffy, DemonstrationsInGroups(tiny_llama, TASK, SOLVED)),
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        train(model, objective, TASK, optimizer, CONFIG, generator=generator(), mix=mix)
    assert likelihood(alone) == before
    assert likelihood(tiny_llama) > before + 0.5


@pytest.mark.parametrize("why", ["none", "wrong", "too long"])
def test_without_demonstrations_it_is_plain_rl_bit_for_bit(why: str, tiny_llama: Any) -> None:
    source = {
        "none": Demonstrations({}),
        "wrong": Demonstrations(lambda problem: "1>1$", accept=lambda question, solution: False),
        "too long": Demonstrations(lambda problem: "1" * TASK.max_new_tokens),
    }[why]
    plain = copy.deepcopy(tiny_llama)
    mix = DemonstrationsInGroups(tiny_llama, TASK, source)
    for model, objective, mixing in ((plain, relift_rl, None), (tiny_llama, luffy, mix)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        train(model, objective, TASK, optimizer, CONFIG, generator=generator(), mix=mixing)
    assert torch.equal(weights(plain), weights(tiny_llama))
    assert (mix.num_too_long > 0) == (why == "too long")


def test_it_is_relifts_rl_but_for_shaping(tiny_llama: Any) -> None:
    assert luffy.having(shaping=None) == relift_rl
    with pytest.raises(ValueError, match="must be above 0"):
        grpo.having(shaping=0.0)
    optimizer = torch.optim.AdamW(tiny_llama.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match=r"needs is_demonstration, .*mix=DemonstrationsInGroups"):
        train(tiny_llama, luffy, TASK, optimizer, CONFIG, generator=generator())


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_trls_groups_have_their_demonstration(
    num_iterations: int, tiny_llama: Any, character_tokenizer: Any, tmp_path: Path
) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from dynascope.rl.interleaving.trl import MixedPolicyTrainer

    rows = [{"prompt": f"{first}+{second}=", "answer": str(first + second)} for first in range(4) for second in (1, 2)]
    task = WordProblems(rows, character_tokenizer, 8)
    solved = Demonstrations(
        {row["prompt"]: f"{row['prompt']}{row['answer']}" for row in rows if row["prompt"][2] == "1"}
    )
    seen: list[tuple[str, str, float]] = []

    def right(prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        told = [float(text.endswith(f"={one}")) for text, one in zip(completions, answer, strict=True)]
        seen.extend(zip(prompts, completions, told, strict=True))
        return told

    args = trl.GRPOConfig(
        output_dir=str(tmp_path), max_steps=2 * num_iterations, num_iterations=num_iterations, learning_rate=1e-2,
        per_device_train_batch_size=8, num_generations=4, max_completion_length=6, use_cpu=True, bf16=False, report_to=[],
        disable_tqdm=True, logging_steps=1, save_strategy="no", lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = MixedPolicyTrainer(
        tiny_llama, reward_funcs=right, args=args, processing_class=character_tokenizer, objective="luffy",
        train_dataset=datasets.Dataset.from_list(rows), task=task, source=solved,
    )  # fmt: skip

    def likelihood() -> float:
        given = [row["prompt"] for row in rows if row["prompt"][2] == "1"]
        tokens, mask = task.completions([f"{one}{int(one[0]) + 1}" for one in given])
        prompts, prompt_mask = task.prompts([{"prompt": one} for one in given])
        log_probs = completion_logits(tiny_llama, prompts, prompt_mask, tokens).log_softmax(-1)
        return float((log_probs.gather(2, tokens[..., None])[..., 0] * mask).sum())

    before = likelihood()
    trainer.train()
    assert len(seen) == 16
    is_given = [place % 4 == 3 and prompt[2] == "1" for place, (prompt, _, _) in enumerate(seen)]
    assert 0 < sum(is_given) == trainer.shown.budget.used
    assert all(
        told == 1 and text.startswith(prompt) for (prompt, text, told), one in zip(seen, is_given, strict=True) if one
    )
    shares = [log["rollout/demonstrations"] for log in trainer.state.log_history if "rollout/demonstrations" in log]
    assert sum(shares) * 8 == sum(is_given)
    assert likelihood() > before + 0.5
    assert not trainer.evaluate(datasets.Dataset.from_list(rows))["eval_rewards/right/mean"]
