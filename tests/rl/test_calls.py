"""Calls in daemon threads: results, errors, time limits, and a process that ends all the same."""

import subprocess
import sys
import threading

import pytest

from dynascope.rl.calls import Calls


def test_results_and_errors_come_back() -> None:
    calls = Calls(2, timeout=20.0)
    told = [calls.submit(pow, 2, power) for power in range(5)]
    assert [one.result() for one in told] == [1, 2, 4, 8, 16]
    assert isinstance(calls.submit(int, "x").exception(), ValueError)


def test_a_silent_call_is_given_up_and_makes_room_for_the_next() -> None:
    calls, never = Calls(1, timeout=0.05), threading.Event()
    silent, next_one = calls.submit(never.wait), calls.submit(pow, 3, 2)
    with pytest.raises(TimeoutError, match=r"within 0\.05 seconds"):
        silent.result(20)
    assert next_one.result(20) == 9
    never.set()


def test_what_was_not_begun_is_forgotten_at_the_end() -> None:
    calls, may_go = Calls(1, timeout=None), threading.Event()
    begun = threading.Event()
    calls.submit(lambda: begun.set() or may_go.wait())
    begun.wait(20)
    waiting = calls.submit(pow, 3, 2)
    calls.close()
    assert waiting.cancelled()
    may_go.set()
    with pytest.raises(RuntimeError, match="closed"):
        calls.submit(pow, 3, 2)


def test_a_process_ends_while_a_call_hangs() -> None:
    source = (
        "import threading\n"
        "from dynascope.rl.interleaving.demonstrations import Teacher\n"
        "from dynascope.rl.tasks.pairwise import ConsistencyReward\n"
        "hang = lambda *_: threading.Event().wait()\n"
        "teacher = Teacher(hang)\n"
        "teacher.request({number: number for number in range(9)})\n"
        "print(ConsistencyReward(hang, retries=1, timeout=0.05).one('so 1', '1'))\n"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "0.0\n"), done.stderr


@pytest.mark.parametrize("settings", [{"num_workers": 0, "timeout": 1.0}, {"num_workers": 1, "timeout": 0.0}])
def test_impossible_settings_are_told(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Calls(**settings)  # type: ignore[arg-type]
