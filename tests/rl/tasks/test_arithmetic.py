"""Sums with written steps: what is written, and what the rule says of right and wrong chains and answers."""

import pytest
import torch

from dynascope.rl.tasks.arithmetic import STOP, Arithmetic, Sum, answer_reward, chain_reward, decode, encode


@pytest.mark.parametrize(
    ("first", "second", "completion"),
    [
        (47, 85, "7+5=12,4+8+1=13>132$"),
        (12, 34, "2+4=6,1+3=4>46$"),
        (0, 0, "0+0=0>0$"),
        (99, 1, "9+1=10,9+0+1=10>100$"),
        (5, 120, "5+0=5,0+2=2,0+1=1>125$"),
    ],
)
def test_the_written_steps(first: int, second: int, completion: str) -> None:
    assert Sum(first, second).completion == completion
    checked = Sum(first, second).check(completion)
    assert (checked.is_answer_right, checked.is_chain_right, checked.is_formatted) == (True, True, True)


@pytest.mark.parametrize(
    ("completion", "answer", "chain", "steps", "formatted"),
    [
        ("7+5=12,4+8+1=13>131$", False, True, 2, True),
        ("7+5=13,4+8+1=13>132$", True, False, 0, True),
        ("7+5=12,4+8=12>132$", True, False, 1, True),
        ("7+5=12>132$", True, False, 1, True),
        ("7+5=12,4+8+1=13,0+0=0>132$", True, False, 2, True),
        ("7+5=12,4+8+1=13>132", False, True, 2, False),
        ("7+5=12,4+8+1=13>1>32$", False, True, 2, False),
        ("7+5=12,4+8+1=13>$", False, True, 2, False),
        ("132$", False, False, 0, False),
        ("", False, False, 0, False),
    ],
)
def test_chain_and_answer_are_checked_apart(
    completion: str, answer: bool, chain: bool, steps: int, formatted: bool
) -> None:
    checked = Sum(47, 85).check(completion)
    found = (checked.is_answer_right, checked.is_chain_right, checked.num_right_steps, checked.is_formatted)
    assert found == (answer, chain, steps, formatted)


def test_rewards_are_the_rules() -> None:
    problems, texts = [Sum(1, 2)] * 2, ["1+2=3>4$", "1+2=4>3$"]
    assert answer_reward(texts, problem=problems) == [0, 1]
    assert chain_reward(texts, problem=problems) == [1, 0]


def test_levels_are_numbers_of_digits_and_draws_are_seeded() -> None:
    task = Arithmetic(digits=(1, 3))
    problems = task.draw(500, torch.Generator().manual_seed(0))
    assert problems == task.draw(500, torch.Generator().manual_seed(0))
    digits = [{len(str(one.first)), len(str(one.second))} for one in problems]
    assert all(one in ({1}, {3}) for one in digits)
    assert 200 < sum(one == {3} for one in digits) < 300
    assert max(len(one.completion) for one in problems) <= task.max_new_tokens - 4
    assert max(len(one.prompt + one.completion) for one in problems) <= task.max_length
    with pytest.raises(ValueError, match="from 1 to 9"):
        Arithmetic(digits=(0,))


def test_tokens_and_texts_are_each_others_inverse() -> None:
    texts = [Sum(47, 85).completion, Sum(1, 2).completion]
    tokens, mask = encode(texts)
    assert decode(tokens) == texts
    assert mask.sum(1).tolist() == [len(text) for text in texts]
    assert tokens[1, mask[1]][-1] == STOP
    left, left_mask = encode(["1+2=", "10+2="], side="left")
    assert left_mask.tolist() == [[False, True, True, True, True], [True] * 5]
    assert decode(left) == ["1+2=", "10+2="]
    with pytest.raises(ValueError, match="'x' is no character"):
        encode(["x"])
