"""Timings that survive a noisy machine: the things compared take turns in one process, and medians are told."""

import statistics
import time
from collections.abc import Callable, Mapping


def medians(contenders: Mapping[str, Callable[[], object]], turns: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of one call of each contender over turns in which each is called once, forth and back.

    A machine that grows slower would otherwise charge that to whoever comes last; so an even number of turns is fairest.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + turns):
        for name, call in list(contenders.items())[:: -1 if turn % 2 else 1]:
            started = time.perf_counter()
            call()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(every) for name, every in seconds.items()}


def tell(measured: Mapping[str, float], base: str) -> None:
    """A line a contender: milliseconds, and how many times the base it takes."""
    for name, seconds in measured.items():
        print(f"{name:46} {1e3 * seconds:10.2f} ms {seconds / measured[base]:8.3f}x")
