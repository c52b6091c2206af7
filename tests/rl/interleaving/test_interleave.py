"""ReLIFT: plain RL where nothing is hard, one step of fine-tuning at most, its own optimizer, and TRL's trainer."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from dynascope.losses.demonstrations import interleaved_sft_loss
from dynascope.rl.advantages import group_z_score
from dynascope.rl.batch import PolicyBatch
from dynascope.rl.interleaving.demonstrations import Demonstrations
from dynascope.rl.interleaving.hardest import HardestQuestionBuffer
from dynascope.rl.interleaving.interleave import (
    FineTuning,
    Interleaver,
    TeachableTask,
    WithDemonstrations,
    fine_tune,
    prompt_of,
)
from dynascope.rl.logits import completion_logits
from dynascope.rl.loop import LoopConfig, train
from dynascope.rl.monitors import learnable_groups
from dynascope.rl.presets import dapo, dr_grpo, grpo, relift_rl
from dynascope.rl.tasks.arithmetic import Arithmetic, Sum
from dynascope.rl.tasks.gsm8k import WordProblems

TASK = Arithmetic((1,))
CONFIG = LoopConfig(num_steps=4, num_prompts=4, num_samples=4)
SOLVED = Demonstrations(lambda problem: problem.completion)


def weights(model: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def run(model: Any, look: Any = None, objective: Any = relift_rl, **more: Any) -> list[Any]:
    told: list[Any] = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(
        model, objective, TASK, optimizer, CONFIG, generator=torch.Generator().manual_seed(0),
        look=(lambda step: told.append(look(step))) if look else (lambda step: None), **more,
    )  # fmt: skip
    return told


class AllSolved(Arithmetic):
    def are_right(self, problems: Any, completions: Any) -> list[bool]:
        return [True] * len(problems)


@pytest.mark.parametrize("why", ["never", "nothing is hard", "no demonstrations", "wrong demonstrations", "too long"])
def test_without_demonstrations_it_is_plain_rl_bit_for_bit(why: str, tiny_llama: Any) -> None:
    plain = copy.deepcopy(tiny_llama)
    run(plain)
    source = {
        "no demonstrations": Demonstrations({}),
        "wrong demonstrations": Demonstrations(lambda problem: "1>1$", accept=lambda question, solution: False),
        "too long": Demonstrations(lambda problem: "1" * TASK.max_new_tokens),
    }.get(why, Demonstrations(lambda problem: problem.completion))
    schedule = "never" if why == "never" else "threshold(1)" if why == "no demonstrations" else "relift"
    relift = Interleaver(tiny_llama, TASK, source, batch_size=2, schedule=schedule, lr=1e-2)

    def look(step: Any) -> Any:
        if why == "nothing is hard":
            step = copy.copy(step)
            object.__setattr__(step, "drawn_correct", torch.ones_like(step.drawn_correct))
        return relift(step)

    told = run(tiny_llama, look)
    assert torch.equal(weights(plain), weights(tiny_llama))
    assert all(one["demonstrations/step"] == 0 for one in told)
    if why == "too long":
        assert relift.num_too_long > 0


def test_hardest_questions_are_learned_with_one_step_at_most(tiny_llama: Any) -> None:
    plain = copy.deepcopy(tiny_llama)
    run(plain)
    relift = Interleaver(tiny_llama, TASK, SOLVED, batch_size=2, lr=1e-2)
    told = run(tiny_llama, relift)  # a model that knows nothing: four questions a step enter, a batch is two
    assert [one["demonstrations/step"] for one in told] == [1, 1, 1, 1]
    assert [one["demonstrations/used"] for one in told] == [2, 4, 6, 8]
    assert told[-1]["demonstrations/waiting"] > 2
    assert float(told[-1]["demonstrations/nll"]) < float(told[0]["demonstrations/nll"])
    assert not torch.equal(weights(plain), weights(tiny_llama))
    assert relift.budget.seconds["fine-tuning"] > 0
    assert relift.budget.seconds["rl"] > 0


def test_dynamic_sampling_does_not_hide_the_hardest(tiny_llama: Any) -> None:
    relift = Interleaver(tiny_llama, TASK, SOLVED, batch_size=2, lr=1e-2)
    told = run(tiny_llama, relift, dapo, keep=lambda batch: learnable_groups(batch.rewards, batch.group_ids))
    assert sum(one["demonstrations/step"] for one in told) == 4


def test_a_question_drawn_twice_counts_its_answers_together(tiny_llama: Any) -> None:
    relift = Interleaver(tiny_llama, TASK, SOLVED, batch_size=2)
    one, other = Sum(1, 2), Sum(3, 4)
    relift.see([one, one, other, other, one, one], [False, False, False, False, False, True])
    relift.step(0)
    assert len(relift.buffer) == 1  # 1+2 was solved the second time


def test_two_optimizers_or_one(tiny_llama: Any) -> None:
    shared = torch.optim.AdamW(tiny_llama.parameters(), lr=1e-3)
    both = Interleaver(tiny_llama, TASK, SOLVED, optimizer=shared, batch_size=1)
    tiny_llama(input_ids=torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
    shared.step()
    both.see([Sum(1, 2)], [False])
    assert both.step(0)["demonstrations/step"] == 1
    assert {int(state["step"]) for state in shared.state.values()} == {2}  # one state saw both losses
    own = Interleaver(tiny_llama, TASK, SOLVED, lr=5e-6).optimizer
    assert own.param_groups[0]["lr"] == 5e-6
    assert not own.state


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_micro_batches_take_the_step_of_the_whole(reduction: str, tiny_llama: Any) -> None:
    problems = [Sum(1, 2), Sum(99, 1), Sum(5, 5)]
    other, task = copy.deepcopy(tiny_llama), Arithmetic((1, 2))
    told = []
    for model, micro_batch in ((tiny_llama, None), (other, 1)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        how = FineTuning(0.1, reduction, micro_batch=micro_batch)
        told.append(fine_tune(model, task, problems, [one.completion for one in problems], optimizer, how))
    torch.testing.assert_close(weights(tiny_llama), weights(other), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(told[0], told[1])


def test_questions_solved_meanwhile_are_not_taught(tiny_llama: Any) -> None:
    relift = Interleaver(tiny_llama, AllSolved((1,)), SOLVED, batch_size=2, recheck=3)
    relift.see([Sum(1, 2), Sum(3, 4)], [False, False])
    assert relift.step(0)["demonstrations/step"] == 0
    assert (relift.num_solved_meanwhile, len(relift.buffer)) == (2, 0)
    still = Interleaver(tiny_llama, TASK, SOLVED, batch_size=2, recheck=3)
    still.see([Sum(1, 2), Sum(3, 4)], [False, False])
    assert still.step(0)["demonstrations/step"] == 1


def test_scheduled_steps_take_what_there_is(tiny_llama: Any) -> None:
    every = Interleaver(tiny_llama, TASK, SOLVED, batch_size=8, schedule="uniform(2)")
    every.see([Sum(1, 2), Sum(3, 4)], [True, True])
    assert [every.step(number)["demonstrations/step"] for number in range(4)] == [0, 1, 0, 0]
    assert every.budget.used == 2
    sft = Interleaver(tiny_llama, TASK, SOLVED, batch_size=8, schedule="always", lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    told = [sft.fine_tune_only(number, generator) for number in range(5)]
    assert all(one["demonstrations/step"] for one in told)
    assert float(told[-1]["demonstrations/nll"]) < float(told[0]["demonstrations/nll"])


@pytest.mark.parametrize("policy", ["newest", "random"])
def test_resumed_it_goes_on_as_before(policy: str, tiny_llama: Any, tmp_path: Path) -> None:
    def make(model: Any) -> Interleaver:
        buffer = HardestQuestionBuffer(2, policy=policy)
        return Interleaver(model, TASK, SOLVED, buffer=buffer, lr=1e-2, schedule="random")

    first = make(tiny_llama)
    problems = [Sum(one, 1) for one in range(8)]
    first.see(problems, [False, True] * 4)
    first.step(0)
    other = copy.deepcopy(tiny_llama)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = make(other)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=False))
    for one in (first, second):
        one.see(problems, [True, False] * 4)
        one.step(1)
    assert torch.equal(weights(tiny_llama), weights(other))
    assert first.budget.questions == second.budget.questions


def test_groups_that_are_all_wrong_or_all_right_add_nothing_to_the_gradient() -> None:
    assert group_z_score(torch.tensor([1.0] + [0.0] * 7), torch.zeros(8, dtype=torch.long), std="none").tolist() == (
        [0.875] + [-0.125] * 7
    )
    log_probs = torch.randn(8, 3).requires_grad_()
    batch = PolicyBatch(
        mask=torch.ones(8, 3).bool(), rewards=torch.tensor([0.0] * 4 + [1.0, 0, 0, 0]), group_ids=torch.arange(8) // 4,
        max_length=3,
    )  # fmt: skip
    objective = relift_rl.having(entropy_bonus=0.0)
    loss, _ = objective.loss(batch.having(advantage=objective.advantages(batch), log_probs=log_probs))
    loss.backward()
    assert log_probs.grad is not None
    assert bool((log_probs.grad[:4] == 0).all())
    assert bool((log_probs.grad[4:] != 0).all())


def test_the_rl_half_is_dr_grpo_but_for_its_clip_and_bonus() -> None:
    assert relift_rl.having(clip=dr_grpo.clip, entropy_bonus=0.0) == dr_grpo


def test_demonstrations_can_be_a_term_of_the_loss(tiny_llama: Any) -> None:
    other, third = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    prompts, tokens = TASK.prompts([Sum(1, 2)]), TASK.completions([Sum(1, 2).completion])

    def of(model: Any) -> Any:
        return lambda: interleaved_sft_loss(completion_logits(model, *prompts, tokens[0]), *tokens)

    run(tiny_llama, objective=grpo)
    run(other, objective=WithDemonstrations.of(grpo, of(other), weight=0.0))
    assert torch.equal(weights(tiny_llama), weights(other))
    run(third, objective=WithDemonstrations.of(grpo, of(third), weight=1.0))
    assert float(of(third)().nll) < float(of(other)().nll)


def test_both_tasks_can_be_taught(character_tokenizer: Any) -> None:
    words = WordProblems([{"prompt": "1+2=", "answer": "3"}], character_tokenizer, max_new_tokens=8)
    assert isinstance(words, TeachableTask)
    assert isinstance(TASK, TeachableTask)
    tokens, mask = words.completions(["3", "12"])
    assert words.texts(tokens) == ["3", "12"]
    assert mask.sum(1).tolist() == [2, 3]
    assert tokens[0].tolist() == [4, words.stop_token, words.pad_token]
    assert TASK.texts(TASK.completions(["3", "3$"])[0]) == ["3$", "3$"]
    assert prompt_of(words.rows[0]) == prompt_of(Sum(1, 2))


def test_trls_trainer_runs_it(
    tiny_llama: Any, character_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from dynascope.rl.interleaving.trl import InterleavedTrainer

    rows = [{"prompt": f"{first}+{second}="} for first in range(4) for second in range(4)]
    solutions = {f"{one}+{other}=": Sum(one, other).completion for one in range(4) for other in range(4)}
    settings: dict[str, Any] = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6}
    settings |= {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "logging_steps": 1}
    settings |= {"output_dir": str(tmp_path), "max_steps": 4, "learning_rate": 1e-3, "save_steps": 3}

    def never_right(completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    def says_nothing(completions: list[str], **columns: Any) -> list[None]:
        return [None] * len(completions)

    def well_formed(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(set(text)) % 3) for text in completions]

    def make(correctness: str | None, batch_size: int = 4, **changes: Any) -> Any:
        args = trl.GRPOConfig(**{**settings, **changes})
        return InterleavedTrainer(
            tiny_llama, reward_funcs=[never_right, well_formed, says_nothing], args=args, processing_class=character_tokenizer,
            train_dataset=datasets.Dataset.from_list(rows), objective=relift_rl, correctness=correctness,
            interleave=lambda model: Interleaver(
                model, WordProblems(rows, character_tokenizer, 24), Demonstrations(solutions), batch_size=batch_size, lr=1e-2
            ),
        )  # fmt: skip

    trainer = make("never_right")
    trainer.train()
    # Two prompts a step enter, whatever their format earns; a batch is four.
    steps = [log["demonstrations/step"] for log in trainer.state.log_history if "demonstrations/step" in log]
    assert steps == [0, 1, 0, 1]
    assert trainer.interleaver.budget.used == 8

    again = make("never_right")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    # What waited and was counted after three steps was put back: the fourth fine-tunes once more, and its own Adam goes on.
    assert again.interleaver.budget.used == 8
    assert again.interleaver.budget.questions == trainer.interleaver.budget.questions
    assert {int(state["step"]) for state in again.interleaver.optimizer.state.values()} == {2}
    with pytest.raises(ValueError, match="no reward function 'right'"):
        make("right")

    # Two optimizer steps a rollout, of which four prompts enter: two batches, of which one is taken.
    slow = make("never_right", 2, steps_per_generation=2, save_strategy="no")
    numbers: list[int] = []
    step = Interleaver.step
    monkeypatch.setattr(Interleaver, "step", lambda one, number: numbers.append(number) or step(one, number))
    slow.train()
    assert numbers == [0, 1]  # of rollouts, which schedules count
    waiting = [log["demonstrations/waiting"] for log in slow.state.log_history if "demonstrations/waiting" in log]
    assert waiting == [2, 4]
    unknown = make("says_nothing", save_strategy="no")
    unknown.train()
    assert unknown.interleaver.budget.used == len(unknown.interleaver.buffer) == 0


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_a_chunk_of_tokens_at_a_time_takes_the_same_step(tiny_llama: Any, micro_batch: int | None) -> None:
    problems = [Sum(47, 85), Sum(1, 2), Sum(99, 1)]
    ends = []
    for chunk in (None, 5):
        model = copy.deepcopy(tiny_llama)
        how = FineTuning(micro_batch=micro_batch, chunk=chunk)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        told = fine_tune(model, Arithmetic((2,)), problems, [one.completion for one in problems], optimizer, how)
        ends.append(torch.cat([*(one.detach().flatten() for one in model.parameters()), told["nll"][None]]))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_a_head_that_cannot_be_applied_alone_is_told(tiny_llama: Any) -> None:
    tiny_llama.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tiny_llama.lm_head.weight)))
    optimizer = torch.optim.SGD(tiny_llama.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="has no bias"):
        fine_tune(tiny_llama, Arithmetic(), [Sum(1, 2)], ["1+2=3>3$"], optimizer, FineTuning(chunk=4))
