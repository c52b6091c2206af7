"""Who judges chains of thought: models, servers, a rule (2506.14245, section 3); `judge_ensemble` joins several verdicts.

A judge is any callable from a list of `Solution` to a list of verdicts: True, False, or None where it gave none.
"""

import ast
import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, Protocol, cast, runtime_checkable
from urllib.parse import urlsplit

import torch

Verdict = bool | None


@dataclass(frozen=True)
class Solution:
    """What a judge is shown: a problem, the reasoning about it, and the right answer if there is one to tell."""

    question: str
    reasoning: str
    reference: str | None = None


@runtime_checkable
class Judge(Protocol):
    """Says of each solution whether every step of its reasoning is right; None where it came to no verdict."""

    def __call__(self, solutions: Sequence[Solution], /) -> Sequence[Verdict]:
        """One verdict a solution, in their order."""


def judge_name(judge: object) -> str:
    """Of a function its own, of an object its class's, with the module.

    >>> judge_name(StepChecker())
    'dynascope.rl.reasoning.judges.StepChecker'
    """
    named: Any = judge if hasattr(judge, "__qualname__") else type(judge)
    return f"{named.__module__}.{named.__qualname__}"


def judge_prompt(solution: Solution) -> str:
    """A request to check a chain of thought step by step, that ends in a boxed yes or no.

    >>> print(judge_prompt(Solution("2 + 3?", "2 + 3 = 5", "5")))
    """
    reference = "" if solution.reference is None else f"\n\n## Known right answer\n{solution.reference}"
    return JUDGE_PROMPT.format(question=solution.question, reasoning=solution.reasoning, reference=reference)


JUDGE_PROMPT = """You are checking a solution. What counts is the reasoning: a right result after a wrong argument is a wrong \
solution, however well it reads.

## Problem
{question}

## Solution to check
{reasoning}{reference}

## What to do
Go through the solution one step at a time. For each step say what it claims, whether it follows from what came before, \
and whether anything that it needs is missing. Name every error by its kind:
- calculation: arithmetic or algebra is wrong;
- logic: a conclusion does not follow;
- concept: a definition, rule or theorem is misunderstood or misused;
- omission: a needed step, case or justification is absent;
- other.
Do not solve the problem afresh in place of the solution, and do not mend its steps for it.

End with one line: \\boxed{{yes}} if every step is sound and together they lead to the answer, otherwise \\boxed{{no}}."""

_BOXED = re.compile(r"\\boxed\s*\{\s*(?:\\(?:text|mathrm|textbf|mathbf)\s*\{)?\s*([^{}]*?)\s*\}")


def parse_verdict(text: str) -> Verdict:
    """The yes or no of the last box; None where there is no box, or something else in it.

    >>> parse_verdict(r"Step 2 drops a case. \\boxed{\\text{No}}")
    False
    """
    boxes = _BOXED.findall(text)
    last = boxes[-1].strip(" .!$*").lower() if boxes else ""
    return {"yes": True, "no": False}.get(last)


@dataclass(frozen=True)
class TextJudge:
    r"""A judge out of any function from prompts to texts that end in a boxed yes or no.

    >>> TextJudge(lambda prompts: [r"\boxed{yes}"] * len(prompts))([Solution("1 + 1?", "1 + 1 = 2")])
    [True]
    """

    generate: Callable[[list[str]], Sequence[str]]

    @property
    def name(self) -> str:
        """In a cache: that of the function."""
        return f"text:{judge_name(self.generate)}"

    def __call__(self, solutions: Sequence[Solution]) -> list[Verdict]:
        return [parse_verdict(text) for text in self.generate([judge_prompt(one) for one in solutions])]


@dataclass(frozen=True)
class HFJudge:
    """A Hugging Face causal model as the judge; its chat template is used if it has one.

    Prompts are padded on the left, and a text that ran into `max_new_tokens` without a box is no verdict.

    >>> JudgeEnsemble(HFJudge(model, tokenizer, max_new_tokens=8192))
    """

    model: Any
    tokenizer: Any
    max_new_tokens: int = 8192
    temperature: float = 0.6
    top_p: float = 0.95
    batch_size: int = 8

    @property
    def name(self) -> str:
        """In a cache: the model's, and how it is sampled."""
        own = getattr(self.model.config, "_name_or_path", "")
        return f"hf:{own}:{self.temperature}:{self.top_p}:{self.max_new_tokens}"

    def __call__(self, solutions: Sequence[Solution]) -> list[Verdict]:
        return [parse_verdict(text) for text in self._texts([judge_prompt(one) for one in solutions])]

    def _texts(self, prompts: list[str]) -> Iterator[str]:
        has_template = getattr(self.tokenizer, "chat_template", None) is not None
        if has_template:
            prompts = [
                self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": one}], tokenize=False, add_generation_prompt=True
                )
                for one in prompts
            ]
        pad = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        for first in range(0, len(prompts), self.batch_size):
            rows = [
                self.tokenizer(one, add_special_tokens=not has_template)["input_ids"]
                for one in prompts[first : first + self.batch_size]
            ]
            longest = max(len(row) for row in rows)
            ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=self.model.device)
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.model.device)
            with torch.no_grad():
                written = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    do_sample=True,
                    temperature=self.temperature,
                    top_p=self.top_p,
                    max_new_tokens=self.max_new_tokens,
                    pad_token_id=pad,
                )
            yield from self.tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)


class JudgeServerError(RuntimeError):
    """A judge's server refused, or answered with something other than a chat completion.

    `told` are the verdicts that came all the same, by the place of the solution.

    >>> JudgeServerError("no answer", {0: True}).told
    {0: True}
    """

    def __init__(self, message: str, told: Mapping[int, Verdict] | None = None) -> None:
        super().__init__(message)
        self.told: Mapping[int, Verdict] = told or {}


@dataclass(frozen=True)
class ServerJudge:
    """A model behind an OpenAI-compatible server (vLLM, SGLang, llama.cpp, TGI) as the judge.

    Problems and reasoning are sent to `url` and to nowhere else, `at_once` requests at a time. Raises JudgeServerError
    when the server does not answer a request with a chat completion, once all others are done, whose verdicts it holds.

    >>> JudgeEnsemble(ServerJudge("http://127.0.0.1:8000/v1", model="DeepSeek-R1-0528-Qwen3-8B"))
    """

    url: str
    model: str
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 8192
    at_once: int = 16
    timeout: float = 600.0
    api_key: str | None = None

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).hostname:
            raise ValueError(f"url={self.url!r} is no address of a server; give one like http://127.0.0.1:8000/v1")

    def __call__(self, solutions: Sequence[Solution]) -> list[Verdict]:
        with ThreadPoolExecutor(self.at_once) as pool:
            asked = [pool.submit(self._ask, judge_prompt(one)) for one in solutions]
        failed = [error for one in asked if (error := one.exception()) is not None]
        if not failed:
            return [parse_verdict(one.result()) for one in asked]
        came = {place: parse_verdict(one.result()) for place, one in enumerate(asked) if one.exception() is None}
        raise JudgeServerError(f"{failed[0]} ({len(failed)} of {len(asked)} requests failed)", came) from failed[0]

    @property
    def name(self) -> str:
        """In a cache: the model's, and how it is sampled; not the server's address."""
        return f"server:{self.model}:{self.temperature}:{self.top_p}:{self.max_tokens}"

    def _ask(self, prompt: str) -> str:
        address = urlsplit(self.url)
        kind = HTTPSConnection if address.scheme == "https" else HTTPConnection
        connection = kind(cast(str, address.hostname), address.port, timeout=self.timeout)
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        try:
            path = address.path.rstrip("/") + "/chat/completions"
            connection.request("POST", path, json.dumps(request), headers)
            response = connection.getresponse()
            content = response.read()
        except (OSError, HTTPException) as error:
            raise JudgeServerError(f"no answer from {self.url}: {error}; is the server running?") from error
        finally:
            connection.close()
        if response.status != 200:
            raise JudgeServerError(f"{self.url} answered {response.status}: {content[:200].decode(errors='replace')}")
        try:
            text = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise JudgeServerError(f"{self.url} answered no chat completion: {content[:200]!r}") from error
        return text if isinstance(text, str) else ""


class StepChecker:
    """A rule in place of a model, for arithmetic with written steps: every line `expression = value` must be true.

    Whole numbers with + − * // % and brackets; a chain a = b = c must hold throughout. Lines without "=" are passed over.
    Where there is a reference, the last step must arrive at it. No step at all, or a line that is not arithmetic, is no
    verdict.

    >>> StepChecker()([Solution("7 + 8 mod 5?", "7 + 8 = 15\\n15 % 5 = 0", "0")])
    [True]
    """

    def __call__(self, solutions: Sequence[Solution]) -> list[Verdict]:
        return [self._check(one) for one in solutions]

    def _check(self, solution: Solution) -> Verdict:
        last: int | None = None
        is_sound = True
        for line in solution.reasoning.splitlines():
            if "=" not in line:
                continue
            try:
                values = [_value(ast.parse(side.strip(), mode="eval").body) for side in line.split("=")]
            except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
                return None
            is_sound &= len(set(values)) == 1
            last = values[-1]
        if last is None:
            return None
        return is_sound and (solution.reference is None or _int(solution.reference) == last)


_OPERATIONS: dict[type[ast.AST], Callable[..., int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
}


def _int(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _value(node: ast.AST) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.operand))
    raise ValueError("not arithmetic of whole numbers")
