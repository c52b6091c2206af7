"""Where the arms of a study are trained: processes of this machine, or a Ray cluster."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, TypeAlias

Engine: TypeAlias = Literal["local", "ray"]
Submit: TypeAlias = Callable[..., "Future[None]"]


def start(engine: Engine, jobs: int) -> AbstractContextManager[Submit]:
    """A way to have functions called elsewhere, at most `jobs` at once; leaving the context ends what still runs."""
    return _processes(jobs) if engine == "local" else _ray(jobs)


@contextmanager
def _processes(jobs: int) -> Iterator[Submit]:
    # Who set OMP_NUM_THREADS meant it, for workers too.
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, (os.cpu_count() or 1) // jobs)
    # A server that has loaded torch once forks workers in no time; never fork this process, which has threads.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context(method), _begin_worker, (threads,))
    try:
        yield pool.submit
    except BaseException:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(threads: int) -> None:
    import signal

    import torch

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker without a traceback of its own
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _ray(jobs: int) -> Iterator[Submit]:
    try:
        import ray
    except ImportError:
        raise ValueError("--engine ray needs Ray: pip install 'dynascope[ray]'") from None

    is_ours = not ray.is_initialized()
    if is_ours:
        cluster = os.environ.get("RAY_ADDRESS")
        local: dict[str, Any] = {} if cluster else {"num_cpus": jobs, "include_dashboard": False}
        ray.init(log_to_driver=False, logging_level="warning", **local)
    remote = ray.remote(num_cpus=1, max_retries=0)(_call)

    def submit(function: Callable[..., None], *args: Any) -> "Future[None]":
        future: Future[None] = remote.remote(function, *args).future()
        return future

    try:
        yield submit
    finally:
        if is_ours:
            ray.shutdown()


def _call(function: Callable[..., None], *args: Any) -> None:
    function(*args)
