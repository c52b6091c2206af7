"""Reward rules cell by cell, what a strict format costs, and answers that are the same."""

import signal
import time
import types
from typing import Any

import pytest
import torch

from dynascope.rl.advantages import group_z_score
from dynascope.rl.tasks.answer_checking import AnswerChecker, math_equal, math_verify_equal
from dynascope.rl.tasks.gsm8k import boxed
from dynascope.rl.tasks.reward_rules import RULES, RewardRule, correctness_signal
from dynascope.rl.tasks.rewards import evaluate_rewards

CELLS = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("correctness", [1, 1, 0, 0]),
        ("strict_format", [1, -1, 0, -1]),
        ("independent", [1, 0.5, -0.5, -1]),
        ("legacy_mix", [1, -1, -0.5, -1]),
    ],
)
def test_every_cell_of_every_rule(name: str, values: list[float]) -> None:
    assert RewardRule.named(name)(*CELLS).tolist() == values
    reward = RewardRule.named(name).as_reward(lambda text, answer: (boxed(text) or text) == answer)
    texts = [r"\boxed{7}", "7", r"\boxed{8}", "8"]
    assert reward(completions=texts, answer=["7"] * 4, prompts=[r"\boxed{7}"] * 4) == values
    assert reward.__name__ == name


def test_a_table_of_ones_own_must_be_whole() -> None:
    assert RewardRule("mine", {**RULES["correctness"], (True, False): 0.9})(*CELLS).tolist() == pytest.approx(
        [1, 0.9, 0, 0]
    )
    with pytest.raises(ValueError, match="finite reward for each"):
        RewardRule("mine", {(True, True): 1.0})
    with pytest.raises(ValueError, match="finite reward for each"):
        RewardRule("mine", {**RULES["correctness"], (True, False): float("nan")})
    with pytest.raises(ValueError, match="there are correctness"):
        RewardRule.named("format")


def test_scaled_advantages_do_not_see_an_affine_change() -> None:
    rewards, groups = torch.tensor([1.0, 0, 0, 1, 0.5, -1, -0.5, 0]), torch.arange(8) // 4
    for std in ("sample", "population"):
        one = group_z_score(rewards, groups, std=std, eps=0.0)
        torch.testing.assert_close(group_z_score(3 * rewards - 2, groups, std=std, eps=0.0), one)


def test_advantages_by_hand() -> None:
    group = torch.zeros(4, dtype=torch.long)
    sample = group_z_score(torch.tensor([1.0, 0, 0, 0]), group, eps=1e-6)
    assert sample.tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    eight = group_z_score(torch.tensor([1.0, 1] + [0] * 6), torch.zeros(8, dtype=torch.long), eps=0.0)
    assert eight[:3].tolist() == pytest.approx([1.62018, 1.62018, -0.54006], abs=1e-5)


def test_a_strict_format_drowns_the_wish_to_be_right() -> None:
    plain, strict = (correctness_signal(RewardRule.named(name), 0.2, 0.1) for name in ("correctness", "strict_format"))
    assert (plain, strict) == (pytest.approx(2.5), pytest.approx(0.26207, abs=1e-5))
    assert plain / strict == pytest.approx(9.5, abs=0.05)
    # by drawing: the slope of E[r] in c over the deviation of r
    c, b = 0.2, 0.1
    right, formatted = torch.rand(400_000) < c, torch.rand(400_000) < b
    rewards = RewardRule.named("strict_format")(right, formatted)
    assert float(rewards.std()) == pytest.approx(b / strict, rel=0.02)
    assert correctness_signal(RewardRule("flat", dict.fromkeys(RULES["correctness"], 1.0)), 0.5, 0.5) == 0.0


@pytest.mark.parametrize(
    ("prediction", "answer", "is_same"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"\dfrac{3}{4}", "3/4", True),
        ("1,200", "1200", True),
        (r"\$18.00", "18", True),
        ("50\\%", "50", True),
        ("-7", "7", False),
        (r"\text{Tuesday}.", "tuesday", True),
        (r"x = 3", "x=3", True),
        ("1/0", "0", False),
        ("", "", False),
        (None, "3", False),
        ("1e999999999", "3", False),
    ],
)
def test_answers_that_are_the_same(prediction: str | None, answer: str, is_same: bool) -> None:
    assert math_equal(prediction, answer) is is_same


def test_boxes() -> None:
    assert boxed(r"\boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert boxed(r"\boxed{1} then \boxed{2}") == "2"
    assert boxed("2") is None


def test_math_verify_is_called_as_it_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="pip install math-verify"):
        math_verify_equal("1", "1")
    fake: Any = types.ModuleType("math_verify")

    def alarmed(limit: float | None) -> None:
        if limit:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # as the library does, which only the main thread may

    def parse(text: str, parsing_timeout: int | None = 5) -> str:
        alarmed(parsing_timeout)
        return text

    def verify(gold: str, prediction: str, timeout_seconds: int | None = 5) -> bool:
        alarmed(timeout_seconds)
        return (gold, prediction) == ("$1$", "$2-1$")

    fake.parse, fake.verify = parse, verify
    monkeypatch.setitem(__import__("sys").modules, "math_verify", fake)
    assert math_verify_equal("2-1", "1")
    assert not math_verify_equal(None, "1")
    rule = RewardRule.named("correctness").as_reward(lambda text, answer: math_verify_equal(text, answer))
    assert evaluate_rewards(rule, ["", ""], ["2-1", "2"], {"answer": ["1", "1"]})[0].tolist() == [1, 0]


def slow_or_broken(prediction: str, answer: str) -> bool:
    if prediction == "hangs":
        time.sleep(60)
    if prediction == "raises":
        raise RuntimeError("no")
    if prediction == "dies":
        __import__("os")._exit(3)
    return prediction == answer


def test_a_checker_that_hangs_dies_or_raises_gives_wrong_and_goes_on() -> None:
    with AnswerChecker(slow_or_broken, num_workers=2, time_limit=1.0) as checker:
        started = time.monotonic()
        found = checker(["a", "hangs", "b", "dies", "a", "raises", None, "c"], ["a", "a", "a", "a", "a", "a", "a", "c"])
        assert found == [True, False, False, False, True, False, False, True]
        assert (checker.num_timeouts, checker.num_errors) == (1, 2)
        assert time.monotonic() - started < 45
        assert checker(["a"] * 1000, ["a"] * 1000) == [True] * 1000
        for process, _ in checker._workers:
            process.kill()
            process.join()
        assert checker(["a", "b"], ["a", "a"]) == [True, False]  # by new processes
    with pytest.raises(ValueError, match="is closed; make a new one"):
        checker(["a"], ["a"])
    with pytest.raises(ValueError, match="must be at least 1"):
        AnswerChecker(num_workers=0)


def test_a_reward_whose_checker_takes_too_long_says_wrong() -> None:
    with AnswerChecker(slow_or_broken, num_workers=2, time_limit=0.5) as checker:
        reward = RewardRule.named("independent").as_reward(checker=checker)
        told = reward(completions=[r"so \boxed{3}", "3", r"\boxed{hangs}", "4"], answer=["3", "3", "3", "3"])
        assert told == [1.0, 0.5, -0.5, -1.0]
        assert checker.num_timeouts == 1
        with pytest.raises(ValueError, match="in its place"):
            RewardRule.named("independent").as_reward(lambda text, answer: True, checker=checker)
    with pytest.raises(ValueError, match="give is_right"):
        RewardRule.named("independent").as_reward()
