"""Numbers are read out of answers as people write them."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch

from dynascope.rl.tasks.gsm8k import WordProblems, boxed, final_number, numeric_reward, read_gsm8k


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 * 4 = 12\n#### 1,200", "1200"),
        ("so it is $18.50", "18.50"),
        ("#### -7", "-7"),
        (r"thus \boxed{42} of 50", "42"),
        ("one half is 1/2", "0.5"),
        ("it is 3 and then 4.", "4"),
        ("nothing here", None),
        ("1/0", None),
        ("", None),
    ],
)
def test_the_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_boxes_may_hold_braces_and_the_last_one_counts() -> None:
    assert boxed(r"\boxed{1} then \boxed{\frac{1}{2}} end") == r"\frac{1}{2}"
    assert boxed(r"\boxed{1") is None
    assert boxed("no box") is None


def test_answers_are_compared_as_numbers() -> None:
    texts = ["That makes 72.0 clips.", "72", "1,072", "none"]
    assert numeric_reward(texts, answer=["72", "72", "72", "72"]) == [1, 1, 0, 0]


def test_a_folder_of_questions(tmp_path: Path, character_tokenizer: Any) -> None:
    rows = [{"question": "1+1", "answer": "so\n#### 2"}, {"question": "10+10", "answer": "#### 20"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = read_gsm8k(tmp_path)
    assert [one["answer"] for one in read] == ["2", "20"]
    assert read[0]["prompt"] == "Question: 1+1\nAnswer:"
    task = WordProblems([{"prompt": "1+1=", "answer": "2"}, {"prompt": "10+10=", "answer": "20"}], character_tokenizer)
    problems = task.draw(6, torch.Generator().manual_seed(0))
    _, mask = task.prompts(problems)
    assert mask.sum(1).tolist() == [len(one["prompt"]) for one in problems]
    assert bool(mask[:, -1].all())
    assert task.are_right(problems[:1], [problems[0]["answer"]]) == [True]


def test_what_is_wrong_with_a_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_gsm8k(tmp_path / "nowhere")
    for content, told in (("{}", "line 1: not a JSON object"), ("nonsense", "line 1"), ("[]", "line 1")):
        (tmp_path / "train.jsonl").write_text(content)
        with pytest.raises(ValueError, match=told):
            read_gsm8k(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"question": "q", "answer": "none"}')
    with pytest.raises(ValueError, match="holds no number"):
        read_gsm8k(tmp_path)


def test_prompts_may_be_conversations(character_tokenizer: Any) -> None:
    character_tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}="
    task = WordProblems([], character_tokenizer)
    tokens, mask = task.prompts([{"prompt": [{"role": "user", "content": "1+2"}]}, {"prompt": "4="}])
    assert task.texts(tokens[:1]) == ["1+2="]
    assert mask.sum(1).tolist() == [4, 2]
