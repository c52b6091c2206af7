"""Answers that another evaluator has drawn, from its JSONL, for Pass@K, CoT-Pass@K and judges.

Known are the logs of EvalHub (`*_results.jsonl`), of the lm-evaluation-harness (`--log_samples`) and of lighteval (the details'
rows, exported from Parquet by `to_json(orient="records", lines=True)`).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from dynascope.rl.reasoning.judges import Solution
from dynascope.rl.reasoning.pass_at_k import PassAtKCurve, pass_at_k_curve

IsRight = Callable[[str, str], bool]
"""(answer, reference) -> whether the answer is right."""


@dataclass(frozen=True, eq=False)
class Answers:
    """What was asked, what came back, and which of it is right. Prompts may have different numbers of answers."""

    prompt_ids: tuple[str, ...]
    questions: tuple[str, ...]
    """Empty where the log does not hold the question."""
    references: tuple[str, ...]
    responses: tuple[tuple[str, ...], ...]
    correct: Bool[Tensor, "prompts answers"]
    mask: Bool[Tensor, "prompts answers"]
    """True where a prompt has an answer."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """How they were drawn: `temperature`, `top_p`, `max_tokens`, as far as the log or its reader says."""

    def curve(
        self, ks: Sequence[int], chain_correct: Bool[Tensor, "prompts answers"] | None = None, **settings: Any
    ) -> PassAtKCurve:
        """Pass@K, or CoT-Pass@K where the chains are judged; `settings` as in `pass_at_k_curve`. The curve keeps how the answers
        were drawn, and how many a prompt has at least (`n`)."""
        right = self.correct if chain_correct is None else self.correct & chain_correct
        drawn = {**self.sampling, "n": int(self.mask.sum(1).min())}
        return replace(pass_at_k_curve(right, ks, mask=self.mask, **settings), sampling=drawn)

    def solutions(self) -> list[Solution]:
        """All responses for a `JudgeEnsemble`, prompt by prompt; which are right says `correct[mask]`."""
        told = zip(self.questions, self.references, self.responses, strict=True)
        return [Solution(question, one, reference) for question, reference, responses in told for one in responses]

    def table(self, verdicts: Bool[Tensor, " N"]) -> Bool[Tensor, "prompts answers"]:
        """One verdict a solution, as a table of prompts and answers; False where there is no answer.

        >>> answers.curve([1, 8], answers.table(ensemble(answers.solutions(), answers.correct[answers.mask]).is_correct))
        """
        whole = torch.zeros_like(self.mask)
        whole[self.mask] = verdicts
        return whole


def same_text(answer: str, reference: str) -> bool:
    """Whether both are the same but for white space around them.

    >>> same_text(" 42", "42")
    True
    """
    return answer.strip() == reference.strip()


def read_answers(
    path: str | Path, is_right: IsRight = same_text, *, sampling: Mapping[str, Any] | None = None
) -> Answers:
    """The answers in a JSONL log, whose format is told by its keys; lines of the same prompt are joined.

    EvalHub says itself which answers are right. lm-eval keeps one score a prompt, however many answers it has, and lighteval
    one a metric: there `is_right` is called with each filtered answer (lighteval: each text) and the reference. lm-eval's log
    says how answers were drawn; `sampling` says it of the others, or better.

    Raises ValueError that names the line for what is no JSON or none of these formats, and for a log without a line.

    >>> read_answers("samples_gsm8k_2026.jsonl").curve([1, 4, 16]).mean
    """
    rows: dict[str, _Row] = {}
    drawn: dict[str, Any] = {}
    for number, entry in _entries(Path(path)):
        reader = next((one for key, one in _FORMATS.items() if key in entry), None)
        if reader is None:
            raise ValueError(
                f"{path}, line {number}: none of the keys {', '.join(_FORMATS)}; this is no log of EvalHub, lm-eval or lighteval"
            )
        try:
            row = reader(entry, is_right)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path}, line {number}: {type(error).__name__} {error}; is the log whole?") from error
        known = rows.setdefault(row.prompt_id, _Row(row.prompt_id, row.question, row.reference, [], []))
        known.responses.extend(row.responses)
        known.correct.extend(row.correct)
        drawn |= _drawn(entry.get("arguments"))
    if not rows:
        raise ValueError(f"{path} holds no line")
    every = list(rows.values())
    most = max(len(one.correct) for one in every)
    correct, mask = torch.zeros(2, len(every), most, dtype=torch.bool).unbind(0)
    for place, one in enumerate(every):
        mask[place, : len(one.correct)] = True
        correct[place, : len(one.correct)] = torch.tensor(one.correct)
    return Answers(
        tuple(one.prompt_id for one in every),
        tuple(one.question for one in every),
        tuple(one.reference for one in every),
        tuple(tuple(one.responses) for one in every),
        correct,
        mask,
        {**drawn, **(sampling or {})},
    )


def _drawn(arguments: Any) -> dict[str, Any]:
    """lm-eval's keyword arguments of a generation, those that decide what Pass@K means."""
    calls = list(arguments.values()) if isinstance(arguments, dict) else []
    given = next((call.get("arg_1") for call in calls if isinstance(call, dict)), None)
    names = {"temperature": "temperature", "top_p": "top_p", "max_gen_toks": "max_tokens"}
    return {names[name]: value for name, value in given.items() if name in names} if isinstance(given, dict) else {}


@dataclass(frozen=True)
class _Row:
    prompt_id: str
    question: str
    reference: str
    responses: list[str]
    correct: list[bool]

    def __post_init__(self) -> None:
        if len(self.responses) != len(self.correct):
            raise TypeError(
                f"{len(self.responses)} answers and {len(self.correct)} verdicts of prompt {self.prompt_id}"
            )


def _entries(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is no JSON: {error}") from error
            if not isinstance(entry, dict):
                raise ValueError(f"{path}, line {number} is no JSON object")
            yield number, entry


def _evalhub(entry: Mapping[str, Any], is_right: IsRight) -> _Row:
    responses = [str(one) for one in entry["solutions"]]
    correct = [bool(one) for one in entry["correct"]]
    return _Row(str(entry["task_id"]), str(entry.get("question", "")), str(entry["ground_truth"]), responses, correct)


def _lm_eval(entry: Mapping[str, Any], is_right: IsRight) -> _Row:
    # One request a prompt; what its repeats answered, raw and filtered. A filter that keeps one leaves a bare text.
    responses, filtered, target = entry["resps"][0], entry["filtered_resps"][0], str(entry["target"])
    if isinstance(filtered, str):
        filtered, responses = [filtered], responses[:1]
    question = entry.get("doc", {})
    asked = next((question[name] for name in ("question", "problem", "query") if name in question), "")
    correct = [is_right(str(one), target) for one in filtered]
    name = f"{entry['doc_id']}" if "filter" not in entry else f"{entry['doc_id']} ({entry['filter']})"
    return _Row(name, str(asked), target, [str(one) for one in responses], correct)


def _lighteval(entry: Mapping[str, Any], is_right: IsRight) -> _Row:
    doc, texts = entry["doc"], entry["model_response"]["text"]
    gold = doc["gold_index"]
    reference = str(doc["choices"][gold[0] if isinstance(gold, list) else gold])
    name = str(doc["id"]) if doc.get("id") else str(doc["query"])
    return _Row(name, str(doc["query"]), reference, list(texts), [is_right(one, reference) for one in texts])


_FORMATS: dict[str, Callable[[Mapping[str, Any], IsRight], _Row]] = {
    "solutions": _evalhub,
    "filtered_resps": _lm_eval,
    "model_response": _lighteval,
}
