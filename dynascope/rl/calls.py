"""Calls to somebody's server, in threads that never keep a process from ending, and each given up after a time."""

import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeAlias

_Call: TypeAlias = tuple["Future[Any]", Callable[..., Any], tuple[Any, ...]]


class Calls:
    """Up to `num_workers` calls at a time, in the order in which they come.

    A call that takes longer than `timeout` seconds (None: for ever) fails with a TimeoutError and makes room for the next; its
    thread cannot be stopped, but is a daemon. Raises ValueError for no worker, or a timeout that is not positive.

    >>> Calls(4, timeout=10.0).submit(pow, 2, 5).result()
    32
    """

    def __init__(self, num_workers: int, timeout: float | None) -> None:
        if num_workers < 1 or (timeout is not None and timeout <= 0):
            raise ValueError(f"num_workers={num_workers} must be at least 1, and timeout={timeout} positive or None")
        self._queue: SimpleQueue[_Call | None] = SimpleQueue()
        self._num_workers, self._timeout, self._num_started = num_workers, timeout, 0
        # When nobody holds this any more, and when Python ends.
        self.close = weakref.finalize(self, _end, self._queue, num_workers)

    def submit(self, function: Callable[..., Any], *args: Any) -> "Future[Any]":
        """What the call will give. Raises RuntimeError after `close()`, which forgets calls that were not begun."""
        if not self.close.alive:
            raise RuntimeError("these calls were closed: make new ones")
        future: Future[Any] = Future()
        self._queue.put((future, function, args))
        if self._num_started < self._num_workers:
            self._num_started += 1
            Thread(target=_work, args=(self._queue, self._timeout), daemon=True).start()
        return future


def _work(queue: SimpleQueue[_Call | None], timeout: float | None) -> None:
    while (call := queue.get()) is not None:
        future, function, args = call
        if not future.set_running_or_notify_cancel():
            continue
        told: Future[Any] = Future()
        Thread(target=_run, args=(told, function, args), daemon=True).start()
        try:
            error = told.exception(timeout)
        except TimeoutError:
            error = TimeoutError(f"no answer within {timeout:g} seconds")
        if error is None:
            future.set_result(told.result())
        else:
            future.set_exception(error)
        del call, future, function, args, told, error  # or the last call would be held until the next


def _run(told: "Future[Any]", function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        told.set_result(function(*args))
    except BaseException as error:  # noqa: BLE001 whoever asks for the result gets it
        told.set_exception(error)


def _end(queue: SimpleQueue[_Call | None], num_workers: int) -> None:
    try:
        while (call := queue.get_nowait()) is not None:
            call[0].cancel()
    except Empty:
        pass
    for _ in range(num_workers):
        queue.put(None)
