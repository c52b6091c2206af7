"""The pairwise judge: order, parsing, the table of rewards, the referee's failures, votes and difficulty."""

import math
import threading
from typing import Any

import pytest
import torch

from dynascope.rl.loop import LoopConfig, Task, train
from dynascope.rl.presets import preset
from dynascope.rl.tasks.pairwise import (
    THINK_ANSWER,
    ConsistencyReward,
    JudgeReward,
    PairwiseJudgeTask,
    compose_rewards,
    difficulty_by_attempts,
    parse_judgement,
    position_report,
    vote,
)
from dynascope.rl.tasks.rewards import FormatReward


@pytest.mark.parametrize(
    ("form", "result", "consistency", "expected"),
    [(1, 1, 1, 2.0), (1, 1, 0, 1.5), (1, 1, -1, 1.0), (1, 0, 1, 0.5), (0, 1, 1, 1.5), (0, 1, 0, 1.0), (0, 1, -1, 0.5),
     (0, 0, -1, 0)],
)  # fmt: skip
def test_the_table_of_rewards(form: float, result: float, consistency: float, expected: float) -> None:
    parts = (torch.tensor([float(one)]) for one in (form, result, consistency))
    assert compose_rewards(*parts).tolist() == [expected]


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("<think>4\nis right</think><answer>1</answer>", True),
        ("<think>4</think>\n<answer>1</answer>", True),
        ("<think>4</think><answer>1</answer><answer>2</answer>", False),
        ("<think>4</think> so <answer>1</answer>", False),
        ("<think>4</think><answer>1</answer> indeed", False),
        ("<think>4<answer>1</answer>", False),
        ("<think>4</think><answer>1", False),
        ("<think>a<think>b</think><answer>1</answer>", False),
    ],
)
def test_the_format(text: str, is_right: bool) -> None:
    assert FormatReward(THINK_ANSWER)([text]) == [float(is_right)]


def test_comparisons_come_in_both_orders_with_the_label_that_belongs_to_them() -> None:
    task = PairwiseJudgeTask([("q", "good", "bad"), ("r", "fine", "poor")])
    drawn = task.draw(400, torch.Generator().manual_seed(0))
    assert all((one.first if one.label == 1 else one.second) in ("good", "fine") for one in drawn)
    assert 0.4 < sum(one.label == 1 for one in drawn) / 400 < 0.6
    assert [one.label for one in task.both_orders()] == [1, 2, 1, 2]
    assert "Answer 1:\ngood" in task.both_orders()[0].prompt
    with pytest.raises(ValueError, match="no preferences"):
        PairwiseJudgeTask([])


def test_position_bias_votes_and_difficulty() -> None:
    told = position_report(torch.tensor([1, 1, 2, 2]), torch.tensor([1, 1, 1, 2]))
    assert told == {"accuracy": 0.75, "accuracy_first": 1.0, "accuracy_second": 0.5, "says_first": 0.75}
    answers = torch.tensor([[1, 2, 2, 1, 1], [2, 0, 0, 1, 0], [0, 0, 0, 0, 0]])
    assert vote(answers, 1).tolist() == [1, 2, 0]
    assert vote(answers, 3).tolist() == [2, 2, 0]
    assert vote(answers, 5).tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="between 1 and the 5"):
        vote(answers, 6)
    right = torch.tensor([[True, False, True], [False, False, True], [False, False, False]])
    assert difficulty_by_attempts(right).tolist() == [1, 3, 4]


def test_pairs_without_an_attempt_are_told() -> None:
    with pytest.raises(ValueError, match="at least one is needed"):
        difficulty_by_attempts(torch.zeros(3, 0).bool())


def test_parsing() -> None:
    assert parse_judgement("<think>a</think><answer> 2 </answer>") == ("a", "2")
    assert parse_judgement("<answer>1</answer><answer>2</answer>")[1] == ""
    assert parse_judgement("nothing") == ("nothing", "")


def judged(reasoning: str, answer: str) -> str:
    return f"<think>{reasoning}</think><answer>{answer}</answer>"


def test_the_referee_sees_the_tail_once_and_only_where_the_answer_is_right() -> None:
    seen = []

    def referee(tail: str, answer: str) -> int:
        seen.append((tail, answer))
        return int(tail.endswith(answer))

    consistency = ConsistencyReward(referee, tail_lines=2)
    reward = JudgeReward(consistency)
    texts = [judged("a\nb\nso 1", "1"), judged("x\nb\nso 1", "1"), judged("so 2", "1"), judged("so 2", "2"), "so 1"]
    assert reward(completions=texts, label=[1, 1, 1, 1, 1]) == [2.0, 2.0, 1.0, 0.5, 0.0]
    assert seen == [("b\nso 1", "1"), ("so 2", "1")]
    assert reward(completions=texts[:1], label=["1"]) == [2.0]
    assert consistency.num_calls == 2
    assert consistency([judged("so 2", "2")]) == [1.0]
    assert JudgeReward()(completions=texts[:1], label=[1]) == [1.5]


def test_a_referee_that_fails_pays_nothing_and_is_counted() -> None:
    def raises(tail: str, answer: str) -> int:
        raise OSError("no server")

    consistency = ConsistencyReward(raises)
    assert JudgeReward(consistency)(completions=[judged("so 1", "1")], label=[1]) == [1.5]
    assert (consistency.num_calls, consistency.num_failures) == (3, 1)
    answers = iter([None, None, 1])
    assert ConsistencyReward(lambda tail, answer: next(answers)).one("so 1", "1") == 1.0
    with pytest.raises(ValueError, match="at least 1"):
        ConsistencyReward(raises, retries=0)


def test_a_referee_that_hangs_counts_as_a_failure() -> None:
    never = threading.Event()
    consistency = ConsistencyReward(lambda tail, answer: int(never.wait()), retries=2, timeout=0.05)
    assert JudgeReward(consistency)(completions=[judged("so 1", "1")], label=[1]) == [1.5]
    assert (consistency.num_calls, consistency.num_failures) == (2, 1)
    never.set()


def test_labels_that_are_no_side_are_refused() -> None:
    for label in ([1.0], [True], ["A"], [0]):
        with pytest.raises(ValueError, match="1 or 2, not"):
            JudgeReward()(completions=[judged("so 1", "1")], label=label)
    with pytest.raises(ValueError, match="needs the column label"):
        JudgeReward()(completions=[judged("so 1", "1")])


def test_a_judge_trains_in_the_loop(tiny_llama: Any) -> None:
    class Words:
        """Every word is a token; what the policy writes is always the same judgement."""

        eos_token_id, pad_token_id = 1, 0

        def __call__(self, text: str, **settings: Any) -> dict[str, list[int]]:
            return {"input_ids": [2 + len(word) % 11 for word in text.split()][:8]}

        def batch_decode(self, tokens: torch.Tensor, **settings: Any) -> list[str]:
            return [judged("so 1", "1")] * len(tokens)

    task = PairwiseJudgeTask([("q", "good", "bad"), ("r", "fine", "poor")], Words(), max_new_tokens=2)
    assert isinstance(task, Task)
    drawn = task.both_orders()
    assert task.are_right(drawn, [judged("so 1", "1")] * 4) == [True, False, True, False]
    assert [row["label"] for row in task.rows()] == [1, 2, 1, 2]
    assert task.rows()[0]["prompt"] == drawn[0].prompt
    rewards = []
    train(
        tiny_llama,
        preset("grpo"),
        task,
        torch.optim.SGD(tiny_llama.parameters(), lr=1e-3),
        LoopConfig(1, num_prompts=4, num_samples=2, num_minibatches=1),
        generator=torch.Generator().manual_seed(0),
        rewards=JudgeReward(),
        look=lambda step: rewards.extend(step.batch.rewards.tolist()),
    )
    assert set(rewards) <= {0.5, 1.5}
    assert len(rewards) == 8


def test_an_order_that_never_came_has_no_accuracy() -> None:
    told = position_report(torch.tensor([1, 1]), torch.tensor([1, 2]))
    assert told["accuracy_first"] == 0.5
    assert math.isnan(told["accuracy_second"])


def test_referees_are_asked_side_by_side() -> None:
    """Neither of two calls returns before the other is made."""
    both = threading.Barrier(2, timeout=10)

    def referee(tail: str, answer: str) -> int:
        both.wait()
        return int(answer in tail)

    consistency = ConsistencyReward(referee, num_workers=2, retries=1)
    texts = [judged("so 1", "1"), judged("so 2", "1"), judged("so 1", "1")]
    assert JudgeReward(consistency)(completions=texts, label=[1, 1, 1]) == [2.0, 1.0, 2.0]
    assert (consistency.num_calls, consistency.num_failures) == (2, 0)
