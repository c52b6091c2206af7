"""Rewards of users fail in every way that there is, and are told so in one line."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dynascope.rl.tasks.gsm8k import numeric_reward
from dynascope.rl.tasks.pairwise import THINK_ANSWER, ConsistencyReward, JudgeReward
from dynascope.rl.tasks.reward_rules import RewardRule
from dynascope.rl.tasks.rewards import FormatReward, evaluate_rewards, guarded, name_of, overlong_penalty, texts_of


def length(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def matches(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def test_several_rewards_are_weighed_and_told_apart() -> None:
    total, each = evaluate_rewards(
        {"length": length, "right": matches}, ["", ""], ["ab", "c"], {"answer": ["ab", "d"]}, weights={"length": 0.5}
    )
    assert total.tolist() == [2.0, 0.5]
    assert each["right"].tolist() == [1, 0]


def raising(**columns: Any) -> list[float]:
    raise KeyError("gold")


def exiting(**columns: Any) -> list[float]:
    raise SystemExit(3)


def hanging(**columns: Any) -> list[float]:
    time.sleep(30)
    return []


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        (raising, "reward 'raising' raised KeyError: 'gold'"),
        (exiting, "reward 'exiting' raised SystemExit: 3"),
        (hanging, "'hanging' took more than 0.05 s"),
        (lambda **columns: [1.0], "gave 1 values for 2 completions"),
        (lambda **columns: [1.0, float("nan")], r"no finite number for completions \[1\]"),
        (lambda **columns: [None, 1.0], r"no finite number for completions \[0\]"),
        (lambda **columns: None, "gave None, which is not one number a completion"),
        (lambda **columns: 1.0, r"gave 1\.0, which is not one number a completion"),
        (lambda **columns: ["good", "bad"], "gave .*'good'.* which is not one number a completion"),
        (lambda **columns: torch.ones(2, 1), r"gave \[\[1\.0\], \[1\.0\]\], which is not one number a completion"),
    ],
)
def test_what_a_reward_does_wrong_is_told(reward: Callable[..., Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        evaluate_rewards(reward, ["", ""], ["a", "b"], time_limit=0.05)


def test_without_a_time_limit_errors_are_told_too() -> None:
    with pytest.raises(ValueError, match="raised KeyError"):
        evaluate_rewards(raising, [""], ["a"], time_limit=None)
    with pytest.raises(ValueError, match="weights name rewards that there are not: size"):
        evaluate_rewards(length, [""], ["a"], weights={"size": 1.0})
    with pytest.raises(ValueError, match="there is no reward"):
        evaluate_rewards({}, [""], ["a"])


def test_tensors_generators_and_truths_are_values_too() -> None:
    for values in (torch.tensor([1, 0]), (float(one) for one in (1, 0)), [True, False]):
        assert evaluate_rewards(lambda kept=values, **columns: kept, ["", ""], ["a", "b"])[0].tolist() == [1, 0]


def test_a_guarded_reward_tells_the_same_but_may_say_nothing() -> None:
    assert guarded(length)(["ab", "c"], prompts=["", ""]) == [2.0, 1.0]
    assert guarded(length).__name__ == name_of(length) == "length"
    assert guarded(lambda **columns: [None, 1])(["a", "b"]) == [None, 1.0]
    for bad in (float("nan"), float("inf"), torch.tensor(-float("inf"))):
        with pytest.raises(ValueError, match=r"'<lambda>' gave no finite number for completions \[1\]"):
            guarded(lambda bad=bad, **columns: [None, bad])(["a", "b"])
    for reward, message in ((hanging, "'hanging' took more than 0.05 s"), (raising, "'raising' raised KeyError")):
        with pytest.raises(ValueError, match=message):
            guarded(reward, time_limit=0.05)(["a"])


def test_conversations_say_their_last_message() -> None:
    """As TRL hands them over: every reward of ours reads them like texts."""
    plain = [r"<think>2 is 1+1, so \boxed{2}</think><answer>2</answer>", "3"]
    chat = [[{"role": "assistant", "content": text}] for text in plain]
    assert texts_of(chat) == texts_of(plain) == plain
    columns: dict[str, Any] = {"answer": ["2", "2"], "label": [2, 2]}
    rule = RewardRule.named("independent").as_reward(lambda text, answer: answer in text)
    consistency = ConsistencyReward(lambda reasoning, answer: int(answer == "2"))
    for reward in (FormatReward(THINK_ANSWER), numeric_reward, rule, consistency, JudgeReward(consistency)):
        told = reward(completions=chat, **columns)
        assert told == reward(completions=plain, **columns)
        assert told[0] > told[1]


def test_format_is_of_the_whole_completion() -> None:
    reward = FormatReward(r"<think>((?!</?think>).)*</think><answer>[12]</answer>")
    good = "<think>a\nb</think><answer>1</answer>"
    bad = [good + "x", good[:-1], good.replace("<answer>", " <answer>"), "<think>" + good]
    assert reward(completions=[good, *bad]) == [1, 0, 0, 0, 0]


def test_the_overlong_penalty_by_hand() -> None:
    lengths, is_truncated = torch.tensor([5, 10, 15, 20, 20]), torch.tensor([False, False, False, False, True])
    found = overlong_penalty(lengths, is_truncated, max_length=20, buffer=10)
    assert found.tolist() == [0, 0, -0.5, -1, -1]
    with pytest.raises(ValueError, match="buffer=0"):
        overlong_penalty(lengths, is_truncated, max_length=20, buffer=0)
