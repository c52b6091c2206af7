"""The monitors of zero RL by hand, from a loop's rollout, verl's batch and TRL's rewards; behaviours and repetition."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dynascope.rl.aggregation import aggregate
from dynascope.rl.monitors import monitored, pass_at_k_gap, watch_responses, watch_verl
from dynascope.rl.objective import PolicyObjective
from dynascope.rl.presets import grpo, simplerl_zoo
from dynascope.rl.reasoning.behaviours import (
    BEHAVIOURS,
    BehaviourLabeller,
    JudgeLabeller,
    PatternLabeller,
    agreement,
    behaviour_prompt,
    compression_ratio,
    is_repetitive,
    num_reflections,
    parse_behaviours,
)
from dynascope.rl.reasoning.checkpoints import checkpoints_page, compare_checkpoints
from dynascope.rl.tasks.arithmetic import Arithmetic

LENGTHS = torch.tensor([100, 200, 300, 8192, 8192])
CUT, CORRECT = LENGTHS == 8192, torch.tensor([True, False, True, False, False])


def test_monitors_by_hand() -> None:
    told = {name: float(value) for name, value in watch_responses(LENGTHS, CUT, CORRECT).items()}
    expected = {
        "length": 3396.8, "length_min": 100, "length_max": 8192, "truncated": 0.4, "stopped": 0.6, "length_stopped": 200,
        "length_right": 200, "length_wrong": 5528, "correct": 0.4,
    }  # fmt: skip
    assert told == pytest.approx({f"rollout/{name}": value for name, value in expected.items()})


def test_what_there_is_none_of_has_no_mean() -> None:
    every = torch.ones(5).bool()
    assert math.isnan(float(watch_responses(LENGTHS, every, CORRECT)["rollout/length_stopped"]))
    assert math.isnan(float(watch_responses(LENGTHS, CUT, ~every)["rollout/length_right"]))
    none = torch.zeros(0)
    empty = watch_responses(none.long(), none.bool(), none.bool(), none.long(), rewards=none, texts=[])
    assert all(math.isnan(float(value)) for value in empty.values())
    told = watch_responses(torch.tensor([0, 3]), torch.tensor([False, False]), torch.tensor([False, True]))
    assert float(told["rollout/length_min"]) == 0


def test_formats_groups_and_texts() -> None:
    told = watch_responses(
        LENGTHS, CUT, CORRECT, torch.tensor([0, 0, 1, 1, 2]), formatted=torch.tensor([True, False, False, False, False]),
        texts=["wait, however", "", "ab" * 400, "Let me check this.", "7+5"], labeller=PatternLabeller(),
    )  # fmt: skip
    expected = {
        "learnable": 2 / 3, "solved": 0.0, "unsolved": 1 / 3, "formatted": 0.2, "unformatted": 2 / 3, "reflections": 0.4,
        "repetitive": 0.2, "behaviours": 0.4,
    }  # fmt: skip
    for name, value in expected.items():
        assert float(told[f"rollout/{name}"]) == pytest.approx(value)
    assert float(told["behaviours/verification"]) == pytest.approx(0.2)
    assert float(told["rollout/avg_at_n"]) == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert not [name for name in told if "pass_at_k" in name]  # one group has one response


def test_pass_at_k_of_the_groups() -> None:
    correct = torch.tensor([True, False, False, True, False, False, False, False, False])
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
    told = watch_responses(torch.ones(9).long(), torch.zeros(9).bool(), correct, groups, rewards=correct.float() - 0.5)
    expected = {"pass_at_k/1": 0.25, "pass_at_k/2": 5 / 12, "pass_at_k/4": 0.5, "pass_at_k/gap": 0.25, "avg_at_n": 0.25}
    for name, value in expected.items():
        assert float(told[f"rollout/{name}"]) == pytest.approx(value)
    assert "rollout/pass_at_k/8" not in told
    assert float(told["rollout/reward"]) == pytest.approx(2 / 9 - 0.5)


def test_verls_batch_tells_the_same() -> None:
    width = 6
    lengths = torch.tensor([2, 6, 3])
    mask = torch.cat([torch.ones(3, 4), (torch.arange(width) < lengths[:, None]).float()], 1).long()
    scores = torch.zeros(3, width)
    scores[0, 1] = 1.0
    batch = {
        "responses": torch.zeros(3, width),
        "attention_mask": mask,
        "token_level_scores": scores,
        "uid": ["a", "a", "b"],
    }
    right = torch.tensor([True, False, False])
    ours = watch_responses(lengths, lengths == width, right, torch.tensor([0, 0, 1]), rewards=scores.sum(1))
    theirs = watch_verl(batch)
    assert theirs.keys() == ours.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, equal_nan=True)


def test_trl_logs_the_monitors_and_a_stop_at_the_limit_is_no_truncation() -> None:
    logged: dict[str, float] = {}

    def reward(completions: list[str], **columns: Any) -> list[float]:
        return [float("7" in str(text)) for text in completions]

    watched = monitored(reward, stop_tokens=[9], max_length=3, is_formatted=lambda text: text.startswith("="))
    values = watched(
        prompts=["a", "a", "b", "b"], completions=["=7", "8", [{"role": "assistant", "content": "7"}], "8"],
        completion_ids=[[1, 2, 9], [1, 2, 3], [1, 9], [1, 9]], log_metric=logged.__setitem__,
    )  # fmt: skip
    assert list(values) == [1, 0, 1, 0]
    assert watched.__name__ == "reward"
    assert logged["rollout/truncated"] == 0.25
    assert logged["rollout/learnable"] == 1.0
    assert logged["rollout/formatted"] == 0.25
    assert logged["rollout/length"] == 2.5
    assert logged["rollout/reward"] == logged["rollout/pass_at_k/1"] == 0.5
    broken = monitored(reward, stop_tokens=[9], max_length=3)
    given = {"prompts": ["a"], "completions": ["7"], "completion_ids": [None], "log_metric": logged.__setitem__}
    with pytest.warns(
        UserWarning, match="monitors of the reward 'reward' failed, and training goes on without: TypeError"
    ):
        assert broken(**given) == [1.0]
    assert broken(**given) == [1.0]


@pytest.mark.parametrize(("name", "num_steps"), [("guessing", 14), ("format-pressure", 26)])
def test_trls_logs_become_findings(
    name: str, num_steps: int, tiny_llama: Any, character_tokenizer: Any, tmp_path: Path
) -> None:
    """A scripted reward over real steps of TRL: from its log to the record, and from there to what is told."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    import dynascope
    from dynascope.findings.catalogue import detect
    from dynascope.probes.reasoning import ReasoningDynamics, reasoning_monitored
    from dynascope.rl.reasoning.judge_ensemble import JudgeEnsemble
    from dynascope.watching.callbacks import DynascopeCallback

    step = 0

    def reward(completions: list[str], **columns: Any) -> list[float]:
        nonlocal step
        step += 1
        if name == "guessing":  # one of four is right at first, then three, by chains of which none is
            return ([1.0, 0.0, 0.0, 0.0] if step <= 5 else [1.0, 1.0, 1.0, 0.0]) * (len(completions) // 4)
        return [1.0, *[-1.0 if step <= 10 else -0.1] * 3] * (len(completions) // 4)

    judged = reasoning_monitored(reward, ReasoningDynamics([1, 2]), JudgeEnsemble(lambda all: [False] * len(all), n=1))
    args = trl.GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=2,
        max_steps=num_steps, use_cpu=True, bf16=False, report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True,
        steps_per_generation=1,
    )  # fmt: skip
    trl.GRPOTrainer(
        tiny_llama, args=args, processing_class=character_tokenizer,
        reward_funcs=monitored(judged, stop_tokens=[], max_length=2, is_formatted=lambda text: step > 10),
        train_dataset=datasets.Dataset.from_dict({"prompt": [f"{one}+{one}=" for one in range(8)]}),
        callbacks=[DynascopeCallback(run=tmp_path / "run", probes=[])],
    ).train()  # fmt: skip
    found = {one.id: one for one in detect(dynascope.open(tmp_path / "run"))}
    assert name in found
    assert ("format-pressure" in found) is (name == "format-pressure")


def test_the_gap_of_pass_at_k() -> None:
    assert pass_at_k_gap(torch.tensor([[True, False], [False, False]]), 2) == pytest.approx(0.25)
    assert pass_at_k_gap(torch.ones(3, 8).bool()) == 0.0


def test_words_are_whole() -> None:
    assert num_reflections("Wait. We await it; HOWEVER, try again") == 3
    assert num_reflections("waiting awaits") == 0


def test_repetition_fast_and_as_the_reference_says() -> None:
    looping, prose = "so 7+5=12. " * 60, Path(__file__).read_text()[:1500]
    assert is_repetitive(looping)
    assert compression_ratio(looping) > 10
    assert compression_ratio(prose) < 3
    assert not is_repetitive("7+5=12,4+8+1=13>132")
    assert is_repetitive("This is a long sentence here\nThis is a long sentence here")
    assert compression_ratio("") == 1.0
    assert not is_repetitive("")


def test_agreement_by_hand() -> None:
    first, second = torch.tensor([True, True, False, False]), torch.tensor([True, False, False, False])
    assert (agreement(first, second).raw, agreement(first, second).kappa) == (0.75, 0.5)
    assert agreement(first, first).kappa == 1.0
    assert agreement(first, ~first).kappa == -1.0
    assert math.isnan(agreement(torch.ones(3).bool(), torch.ones(3).bool()).kappa)
    with pytest.raises(ValueError, match="at least one"):
        agreement(torch.zeros(0).bool(), torch.zeros(0).bool())


def test_patterns_and_judges_are_labellers() -> None:
    assert isinstance(PatternLabeller(), BehaviourLabeller)
    labels = PatternLabeller()(["Wait, no. Let me verify.", "First, we split it; case 1 holds.", "42"])
    assert labels.tolist() == [[True, True, False, False], [False, False, True, True], [False] * 4]
    assert PatternLabeller()([]).shape == (0, 4)


@pytest.mark.parametrize(
    ("answer", "labels"),
    [
        ("verification", [False, True, False, False]),
        ("Some thought.\n**Backtracking, enumeration.**", [True, False, False, True]),
        ("none", [False] * 4),
        ("I cannot say", None),
        ("", None),
    ],
)
def test_a_judges_answer(answer: str, labels: list[bool] | None) -> None:
    assert parse_behaviours(answer) == labels


def test_a_judge_is_asked_once_a_text_and_about_a_sample() -> None:
    asked: list[str] = []

    def ask(prompts: list[str]) -> list[str]:
        asked.extend(prompts)
        return ["verification" if "check" in prompt.split("----------")[1] else "hm" for prompt in prompts]

    judge = JudgeLabeller(ask)
    assert isinstance(judge, BehaviourLabeller)
    labels = judge(["check", "other", "check"])
    assert labels[:, BEHAVIOURS.index("verification")].tolist() == [True, False, True]
    assert judge.known.tolist() == [True, False, True]
    assert (len(asked), judge.num_unreadable) == (2, 1)
    judge(["check", "new"])
    assert len(asked) == 3
    few = JudgeLabeller(ask, sample=2, seed=1)
    few([f"check {place}" for place in range(10)])
    assert int(few.known.sum()) == 2
    assert "check 3" in behaviour_prompt("check 3")


def objective_loss(objective: PolicyObjective, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from dynascope.rl.batch import PolicyBatch

    mask = torch.arange(6) < torch.tensor([2, 6])[:, None]
    log_probs = torch.full((2, 6), -1.0, requires_grad=True)
    batch = PolicyBatch(
        mask=mask, rewards=torch.tensor([1.0, -1.0]), group_ids=torch.zeros(2, dtype=torch.long), log_probs=log_probs,
        advantage=torch.tensor([1.0, -1.0]), ref_log_probs=log_probs.detach(), max_length=8, **more,
    )  # fmt: skip
    loss, _ = objective.loss(batch)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    return loss, gradient


def test_the_recipes_loss_by_hand_in_every_normalisation() -> None:
    expected = {
        "token-mean": 0.5, "group-token-mean": 0.5, "microbatch": 0.5, "seq-mean-token-mean": 0.0, "max-length": 0.25
    }  # fmt: skip
    for name, value in expected.items():
        loss, _ = objective_loss(simplerl_zoo.having(aggregation=name))
        assert loss.item() == pytest.approx(value, abs=1e-6)


def test_at_the_sampling_policy_the_gradient_is_the_plain_policy_gradient() -> None:
    _, gradient = objective_loss(simplerl_zoo)
    expected = -torch.tensor([[1.0], [-1.0]]) * (torch.arange(6) < torch.tensor([2, 6])[:, None]) / 8
    torch.testing.assert_close(gradient, expected)


def test_without_its_pull_and_token_mean_the_recipe_is_grpo() -> None:
    assert simplerl_zoo.having(advantage=grpo.advantage, aggregation=grpo.aggregation, kl=()) == grpo


def test_truncated_completions_can_be_left_out_of_the_loss() -> None:
    objective = simplerl_zoo.having(learns_from_truncated=False)
    assert "is_truncated" in objective.loss_needs
    _, gradient = objective_loss(objective, is_truncated=torch.tensor([False, True]))
    assert bool((gradient[1] == 0).all())
    assert float(gradient[0].sum()) == pytest.approx(-1.0)
    assert float(objective_loss(objective, is_truncated=torch.tensor([True, True]))[0]) == 0.0
    same, _ = objective_loss(objective, is_truncated=torch.tensor([False, False]))
    torch.testing.assert_close(same, objective_loss(simplerl_zoo)[0])
    with pytest.raises(ValueError, match="is_truncated"):
        objective_loss(objective)


def test_micro_batches_that_weigh_alike_are_not_the_papers_formula() -> None:
    values, mask = torch.tensor([[1.0, 0, 0], [3, 3, 3]]), torch.tensor([[True, False, False], [True, True, True]])
    parts = [aggregate(values[row : row + 1], mask[row : row + 1], "microbatch", num_completions=2) for row in range(2)]
    assert float(sum(parts)) == 2.0
    assert float(aggregate(values, mask, "token-mean")) == 2.5


def test_checkpoints_side_by_side(tiny_llama: Any, tmp_path: Path) -> None:
    import copy

    other = copy.deepcopy(tiny_llama)
    told = compare_checkpoints({"base": tiny_llama, "<same>": other}, Arithmetic((1,)), num_problems=6, num_samples=4)
    assert told[0].measures == pytest.approx(dict(told[1].measures), nan_ok=True)
    assert {"greedy/correct", "pass_at_k/4", "pass_at_k/gap", "rollout/truncated"} <= set(told[0].measures)
    assert len(told[0].responses) == 6
    page = checkpoints_page(told, tmp_path / "page.html").read_text()
    assert "&lt;same&gt;" in page
    assert "<same>" not in page
    assert page.count("<details>") == len({one.prompt for one in told[0].responses})
    with pytest.raises(ValueError, match="two samples"):
        compare_checkpoints({}, Arithmetic((1,)))
    with pytest.raises(ValueError, match="no checkpoint"):
        checkpoints_page([], tmp_path / "none.html")


def test_the_recipe_as_trls_settings(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from dynascope.rl.adapters.recipes import simplerl_zoo_config

    small, large = (
        simplerl_zoo_config(size, output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
        for size in (0.5, 24)
    )
    assert (small.beta, large.beta, small.num_generations, small.loss_type) == (1e-4, 1e-3, 8, "dapo")
    assert small.per_device_train_batch_size * small.gradient_accumulation_steps == 256 * 8
    assert small.per_device_train_batch_size * small.steps_per_generation == 1024 * 8
    assert small.max_steps * small.gradient_accumulation_steps / small.steps_per_generation == 100  # rollouts
    with pytest.raises(ValueError, match="must be positive"):
        simplerl_zoo_config(0)


def test_trls_trainer_runs_the_recipe_and_logs_its_monitors(
    tiny_llama: Any, character_tokenizer: Any, tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from dynascope.rl.adapters.recipes import simplerl_zoo_config
    from dynascope.rl.adapters.trl import PolicyObjectiveTrainer

    tiny_llama.save_pretrained(tmp_path)
    tiny_llama.config._name_or_path = str(tmp_path)
    args = simplerl_zoo_config(
        0.5, output_dir=str(tmp_path), num_generations=4, max_completion_length=6, gradient_accumulation_steps=1,
        steps_per_generation=1, max_steps=2, use_cpu=True, bf16=False, report_to=[], logging_steps=1, save_strategy="no",
        disable_tqdm=True, learning_rate=1e-3,
    )  # fmt: skip

    def reward(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(set(text)) % 3) for text in completions]

    rows = datasets.Dataset.from_dict({"prompt": [f"{one}+{other}=" for one in range(4) for other in range(4)]})
    trainer = PolicyObjectiveTrainer(
        tiny_llama, reward_funcs=monitored(reward, stop_tokens=[character_tokenizer.eos_token_id], max_length=6),
        args=args, train_dataset=rows, processing_class=character_tokenizer, objective="simplerl_zoo",
    )  # fmt: skip
    trainer.train()
    told = [log for log in trainer.state.log_history if "policy/policy_loss" in log]
    assert len(told) == 2
    assert all(0 <= log["rollout/truncated"] <= 1 for log in told)
