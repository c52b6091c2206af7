"""Where demonstrations come from: looked up, or asked of a teacher; only those that a verifier accepts are used.

A wrong demonstration would poison exactly the questions that rewards cannot correct (arXiv 2506.07527, section 3.2).
"""

import asyncio
import inspect
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from dynascope.rl.calls import Calls

Accept = Callable[[Any, str], bool]
"""(question, solution) -> whether the solution is right."""


@dataclass
class Refused:
    """Why questions got no demonstration."""

    missing: int = 0
    wrong: int = 0
    failed: int = 0
    last_error: str = ""
    """Of the teacher, in words."""


@runtime_checkable
class DemonstrationSource(Protocol):
    """Asked for demonstrations, it hands them over when they are there and were verified."""

    refused: Refused

    def request(self, questions: Mapping[Hashable, Any]) -> None:
        """Ask for solutions of questions, by the name that they will come back under; returns at once."""

    def collect(self) -> list[tuple[Hashable, Any, str]]:
        """What has become ready since: names, questions and verified solutions, each once."""

    @property
    def available(self) -> int | None:
        """How many demonstrations there are in all; None where they are made on demand."""


class Demonstrations:
    """Solutions that were made before, by the question's name: a mapping, or a function of the question.

    Without `accept` every solution is taken as it is; give one unless the data were verified before.

    >>> Demonstrations({"1+2=": "1+2=3>3$"}, accept=lambda question, solution: solution.endswith(">3$"))
    """

    def __init__(
        self, solutions: Mapping[Any, str] | Callable[[Any], str | None], accept: Accept | None = None
    ) -> None:
        self._solutions, self._accept = solutions, accept
        self._ready: list[tuple[Hashable, Any, str]] = []
        self.refused = Refused()

    @classmethod
    def from_rows(
        cls, rows: Sequence[Mapping[str, Any]], *, question: str, solution: str, accept: Accept | None = None
    ) -> "Demonstrations":
        """From the rows of a dataset (a list, or Hugging Face's) with these two columns.

        >>> Demonstrations.from_rows(read_gsm8k("data/gsm8k"), question="prompt", solution="solution")
        """
        return cls({row[question]: row[solution] for row in rows}, accept)

    @property
    def available(self) -> int | None:
        """The size of the mapping."""
        return None if callable(self._solutions) else len(self._solutions)

    def request(self, questions: Mapping[Hashable, Any]) -> None:
        """Look up and verify."""
        for name, question in questions.items():
            solution = self._solutions(question) if callable(self._solutions) else self._solutions.get(name)
            if solution is None:
                self.refused.missing += 1
            elif self._accept is not None and not self._accept(question, solution):
                self.refused.wrong += 1
            else:
                self._ready.append((name, question, solution))

    def collect(self) -> list[tuple[Hashable, Any, str]]:
        """What was found."""
        ready, self._ready = self._ready, []
        return ready


class Teacher:
    """Solutions from a stronger model, asked in threads while training goes on; nothing waits for it.

    `solve(question)` gives a solution or None, and may be an async function. A question that is being solved is not asked
    again. A teacher that raises, or is silent for `timeout` seconds, is counted, and what it said is kept in
    `refused.last_error`; training goes on, and the question may be asked again. What was not begun when the process ends, or at
    `close()`, is forgotten.

    >>> source = Teacher(solve=lambda problem: client.ask(problem.prompt), accept=verify, num_workers=4)
    """

    available = None

    def __init__(
        self,
        solve: Callable[[Any], Any],
        accept: Accept | None = None,
        *,
        num_workers: int = 4,
        timeout: float | None = 600.0,
    ) -> None:
        self._solve, self._accept = solve, accept
        self._calls = Calls(num_workers, timeout)
        self._asked: dict[Hashable, tuple[Any, Future[Any]]] = {}
        self.refused = Refused()

    def request(self, questions: Mapping[Hashable, Any]) -> None:
        """Ask, in the background."""
        for name, question in questions.items():
            if name not in self._asked:
                self._asked[name] = question, self._calls.submit(_answer, self._solve, question)

    def collect(self) -> list[tuple[Hashable, Any, str]]:
        """What has been solved and verified since."""
        ready = []
        for name, (question, answer) in list(self._asked.items()):
            if not answer.done():
                continue
            del self._asked[name]
            error = answer.exception()
            if error is not None:
                self.refused.failed += 1
                self.refused.last_error = f"{type(error).__name__}: {error}"
            elif answer.result() is None:
                self.refused.missing += 1
            elif self._accept is not None and not self._accept(question, answer.result()):
                self.refused.wrong += 1
            else:
                ready.append((name, question, answer.result()))
        return ready

    @property
    def num_asked(self) -> int:
        """Questions that are not answered yet."""
        return len(self._asked)

    def close(self) -> None:
        """Forget what was asked."""
        self._calls.close()
        self._asked.clear()


def _answer(solve: Callable[[Any], Any], question: Any) -> Any:
    answer = solve(question)
    return asyncio.run(_awaited(answer)) if inspect.isawaitable(answer) else answer


async def _awaited(answer: Any) -> Any:
    return await answer


@dataclass
class DemoBudget:
    """What fine-tuning consumed. A question that came in several epochs counts each time in `used`, once in `distinct`."""

    available: int | None = None
    used: int = 0
    steps: int = 0
    """Steps that used some."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By phase, "fine-tuning" and "rl" (what passes from one look to the next); with the work of an accelerator."""
    questions: set[Hashable] = field(default_factory=set)
    _left: float | None = None

    @property
    def distinct(self) -> int:
        """Questions whose demonstration was used at least once."""
        return len(self.questions)

    @property
    def share(self) -> float | None:
        """Distinct demonstrations used, of those that there are; None where they are made on demand."""
        return self.distinct / self.available if self.available else None

    def spend(self, questions: Sequence[Hashable]) -> None:
        """Count a step on these."""
        self.used += len(questions)
        self.steps += 1
        self.questions.update(questions)

    def lap(self, name: str | None) -> None:
        """Count the time since the last lap to a phase; None to none."""
        now = _now()
        if name is not None and self._left is not None:
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._left
        self._left = now

    def state_dict(self) -> dict[str, Any]:
        """What was counted."""
        return {
            "used": self.used,
            "steps": self.steps,
            "seconds": dict(self.seconds),
            "questions": list(self.questions),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.used, self.steps = state["used"], state["steps"]
        self.seconds, self.questions = dict(state["seconds"]), set(state["questions"])

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside, under this name.

        >>> with budget.phase("rollout"):
        ...     rollout = sample(model, prompts, num_samples=8, max_new_tokens=64, stop_token=2)
        """
        started = _now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + _now() - started


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
