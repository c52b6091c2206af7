"""Are two mathematical answers the same, and asking so safely: in processes that are ended when they hang."""

import multiprocessing
import re
import threading
import time
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from multiprocessing.connection import Connection, wait
from typing import Any

Check = Callable[[str, str], bool]
"""(prediction, right answer) -> whether they are the same."""

_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mbox)\{([^{}]*)\}")
_DECORATION = re.compile(r"\\left|\\right|\\[!,;: ]|\\\$|[$\s]|\\%|%")


def math_equal(prediction: str | None, answer: str) -> bool:
    """Whether two answers say the same number, or else the same text once decoration is taken off. No answer is wrong.

    Reads signs, decimals, thousands separators, percent signs (dropped), fractions in LaTeX and with a slash. Knows no
    algebra: for that `math_verify_equal`.

    >>> math_equal(r"\\frac{1}{2}", "0.50"), math_equal("1,200", "1200"), math_equal("x+1", "1+x")
    (True, True, False)
    """
    if prediction is None:
        return False
    one, other = _plain(prediction), _plain(answer)
    if one == other:
        return one != ""
    first, second = _number(one), _number(other)
    return first is not None and first == second


def math_verify_equal(prediction: str | None, answer: str) -> bool:
    """The same by the library `math-verify`, which knows algebra.

    Its own time limits are alarms, which only the main thread can set; in another one, as `evaluate_rewards` has it, an
    `AnswerChecker` sets them. Raises ValueError when it is not installed.

    >>> math_verify_equal("1+x", "x+1")
    True
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise ValueError("math_verify_equal needs the library: pip install math-verify") from None
    if prediction is None:
        return False
    is_main = threading.current_thread() is threading.main_thread()
    reading, comparing = ({}, {}) if is_main else ({"parsing_timeout": None}, {"timeout_seconds": None})
    return bool(verify(*(parse(f"${one}$", **reading) for one in (answer, prediction)), **comparing))


def _plain(text: str) -> str:
    text = _TEXT.sub(r"\1", text)
    while (simpler := _FRACTION.sub(r"(\1)/(\2)", text)) != text:
        text = simpler
    return _DECORATION.sub("", text).rstrip(".").lower()


def _number(text: str) -> Fraction | None:
    top, _, bottom = re.sub(r"[(){}]", "", re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)).partition("/")
    try:
        parts = [Decimal(one) for one in ((top, bottom) if bottom else (top,))]
    except InvalidOperation:
        return None
    # An exact fraction of 1e999999999 would fill the memory; nobody's answer is so large, or so long.
    if any(not one.is_finite() or abs(one.adjusted()) > 1000 or len(one.as_tuple().digits) > 1000 for one in parts):
        return None
    if len(parts) == 2 and parts[1] == 0:
        return None
    return Fraction(parts[0]) / (Fraction(parts[1]) if len(parts) == 2 else 1)


class AnswerChecker:
    """Checks answers in processes of its own, each call within a time limit; what takes longer is wrong, as in the paper.

    Equal pairs are checked once. A process that hangs or dies is ended and replaced; `num_timeouts` and `num_errors` count.
    `check` must be a function of a module, so that it can be sent. Use as a context manager, or `close` it.

    Raises ValueError for no worker or no time, and when it is called once it is closed.

    >>> with AnswerChecker(math_equal, num_workers=4, time_limit=10) as checker:
    ...     checker(["72", "7"], ["72", "72"])
    [True, False]
    """

    def __init__(self, check: Check = math_equal, *, num_workers: int = 2, time_limit: float = 10.0) -> None:
        if num_workers < 1 or time_limit <= 0:
            raise ValueError(f"num_workers={num_workers} must be at least 1 and time_limit={time_limit} positive")
        self._check, self._limit = check, time_limit
        # A server that has loaded this module once forks a replacement in no time; never fork this process, which has threads.
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self._context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            self._context.set_forkserver_preload([__name__])
        self._workers = [self._started() for _ in range(num_workers)]
        self.num_timeouts = self.num_errors = 0

    def __call__(self, predictions: Sequence[str | None], answers: Sequence[str]) -> list[bool]:
        """Whether each prediction is its answer; None (no answer was found) is wrong."""
        if not self._workers:
            raise ValueError("this AnswerChecker is closed; make a new one")
        pairs = list(zip(predictions, answers, strict=True))
        unchecked = [pair for pair in dict.fromkeys(pairs) if pair[0] is not None]
        known: dict[Any, bool] = {}
        busy: dict[Connection, tuple[int, Any, float]] = {}
        idle = list(range(len(self._workers)))
        while unchecked or busy:
            while unchecked and idle:
                number, pair = idle.pop(), unchecked.pop()
                pipe = self._sent(number, pair)
                busy[pipe] = number, pair, time.monotonic() + self._limit
            first = min(deadline for *_, deadline in busy.values())
            ready = wait(list(busy), timeout=max(0.0, first - time.monotonic()))
            late = [pipe for pipe, (*_, deadline) in busy.items() if pipe not in ready and deadline <= time.monotonic()]
            for pipe in [one for one in busy if one in ready]:
                number, pair, _ = busy.pop(pipe)
                known[pair] = self._received(number, pipe)
                idle.append(number)
            for pipe in late:
                number, pair, _ = busy.pop(pipe)
                known[pair] = False
                self.num_timeouts += 1
                self._replace(number)
                idle.append(number)
        return [known.get(pair, False) for pair in pairs]

    def close(self) -> None:
        """End the processes."""
        for process, pipe in self._workers:
            process.kill()
            process.join()
            pipe.close()
        self._workers = []

    def __enter__(self) -> "AnswerChecker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sent(self, number: int, pair: Any) -> Connection:
        try:
            self._workers[number][1].send(pair)
        except OSError:  # the process died between calls
            self._replace(number)
            self._workers[number][1].send(pair)
        return self._workers[number][1]

    def _received(self, number: int, pipe: Connection) -> bool:
        try:
            answer = pipe.recv()
        except (EOFError, OSError):  # the process died
            self._replace(number)
            answer = None
        if answer is None:
            self.num_errors += 1
        return bool(answer)

    def _started(self) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._check), daemon=True)
        process.start()
        theirs.close()
        if not ours.poll(60) or not ours.recv():
            raise ValueError("a process for checking answers did not start within 60 s")
        return process, ours

    def _replace(self, number: int) -> None:
        process, pipe = self._workers[number]
        process.kill()
        process.join()
        pipe.close()
        self._workers[number] = self._started()


def _serve(pipe: Connection, check: Check) -> None:
    pipe.send(True)  # the time limit is for checking, not for starting
    while True:
        try:
            prediction, answer = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            pipe.send(bool(check(prediction, answer)))
        except Exception:  # noqa: BLE001 whatever a checker raises is counted by the other side
            pipe.send(None)
