"""Logs of three evaluators say the same of the same answers, ragged prompts are estimated from their own n, and junk is told."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dynascope.rl.reasoning.evaluator_logs import read_answers
from dynascope.rl.reasoning.judge_ensemble import JudgeEnsemble
from dynascope.rl.reasoning.judges import StepChecker
from dynascope.rl.reasoning.pass_at_k import pass_at_k

RESPONSES = (["2 + 3 = 5", "2 + 3 = 6", "1 + 4 = 5"], ["4 * 4 = 15", "4 * 4 = 16"])
ANSWERS = (["5", "6", "5"], ["15", "16"])
TRUTH = ("5", "16")
ASKED = ("2 + 3?", "4 * 4?")


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def evalhub(path: Path) -> Path:
    rows = [
        {"task_id": f"t/{n}", "question": ASKED[n], "solutions": RESPONSES[n], "ground_truth": TRUTH[n],
         "correct": [one == TRUTH[n] for one in ANSWERS[n]], "pass_at_k": {"1": 0.5}, "majority_vote": "5"}
        for n in range(2)
    ]  # fmt: skip
    return written(path, rows)


def lm_eval(path: Path) -> Path:
    rows = [
        {"doc_id": n, "doc": {"question": ASKED[n]}, "target": TRUTH[n], "arguments": {}, "resps": [RESPONSES[n]],
         "filtered_resps": [ANSWERS[n]], "filter": "last", "metrics": ["exact_match"], "exact_match": 1.0}
        for n in range(2)
    ]  # fmt: skip
    return written(path, rows)


def lighteval(path: Path) -> Path:
    rows = [
        {"doc": {"id": str(n), "query": ASKED[n], "choices": [TRUTH[n]], "gold_index": [0]},
         "model_response": {"text": RESPONSES[n]}, "metric": {"em": 1.0}}
        for n in range(2)
    ]  # fmt: skip
    return written(path, rows)


def last_number(answer: str, reference: str) -> bool:
    return answer.split()[-1] == reference


@pytest.mark.parametrize("of", [evalhub, lm_eval, lighteval])
def test_the_three_logs_say_the_same(of: Any, tmp_path: Path) -> None:
    answers = read_answers(of(tmp_path / "log.jsonl"), last_number)
    assert answers.correct.tolist() == [[True, False, True], [False, True, False]]
    assert answers.mask.tolist() == [[True] * 3, [True, True, False]]
    assert answers.references == TRUTH
    assert answers.questions == ASKED
    assert answers.responses == tuple(tuple(one) for one in RESPONSES)
    expected = pass_at_k([3, 2], [2, 1], [1, 2]).mean(0)
    assert torch.equal(answers.curve([1, 2]).mean, expected)


def test_judged_chains_go_back_to_their_places(tmp_path: Path) -> None:
    path = written(
        tmp_path / "log.jsonl", [json.loads(line) for line in evalhub(tmp_path / "x").read_text().splitlines()]
    )
    answers = read_answers(path)
    judgement = JudgeEnsemble(StepChecker(), n=1)(answers.solutions(), answers.correct[answers.mask])
    chains = answers.table(judgement.is_correct)
    assert chains.tolist() == [[True, False, True], [False, True, False]]
    assert float(answers.curve([1], chains).mean) <= float(answers.curve([1]).mean)


def test_lines_of_one_prompt_are_joined_and_a_filter_that_keeps_one_counts_one(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in evalhub(tmp_path / "a").read_text().splitlines()]
    joined = read_answers(written(tmp_path / "twice", [*rows, rows[0]]))
    assert joined.mask.sum(1).tolist() == [6, 2]
    one = {"doc_id": 3, "target": "5", "resps": [["x 5", "x 6"]], "filtered_resps": ["5"]}
    single = read_answers(written(tmp_path / "one", [one]))
    assert single.correct.tolist() == [[True]]
    assert single.responses == (("x 5",),)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "line 1 is no JSON"),
        ("[1]", "no JSON object"),
        ('{"a": 1}', "no log of EvalHub"),
        ("", "holds no line"),
        ('{"solutions": ["1"], "task_id": 1, "ground_truth": 1}', "line 1: KeyError"),
        ('{"solutions": ["1"], "correct": [], "task_id": 1, "ground_truth": 1}', "1 answers and 0 verdicts"),
    ],
)
def test_what_cannot_be_read_is_told(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        read_answers(path)


def test_a_curve_carries_how_its_answers_were_drawn(tmp_path: Path) -> None:
    path = lm_eval(tmp_path / "log.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    asked = {"until": ["Q:"], "temperature": 0.6, "top_p": 0.95, "max_gen_toks": 512}
    written(path, [{**row, "arguments": {"gen_args_0": {"arg_0": "2 + 3?", "arg_1": asked}}} for row in rows])
    told = read_answers(path, last_number).curve([1])
    assert told.sampling == {"temperature": 0.6, "top_p": 0.95, "max_tokens": 512, "n": 2}
    given = read_answers(evalhub(tmp_path / "other.jsonl"), sampling={"temperature": 1.0})
    assert given.curve([1]).sampling == {"temperature": 1.0, "n": 2}
