"""Runs one script bare and then under watch, in one process, and fails unless both ended alike to the last bit.

    python both_ways.py FOLDER SCRIPT [ARGS…]

A process of its own, because the shape checker that the tests install draws from Python's random numbers.
"""

import runpy
import sys
from pathlib import Path
from typing import Any

import torch

from dynascope.watching.launcher import launch

SCRIPTS = Path(__file__).parent / "scripts"


def main(folder: Path, script: str, *args: str) -> None:
    path = str(SCRIPTS / script)
    expected, seen = folder / "bare", folder / "watched"
    # Twice bare first: a script that does not repeat itself could not tell anything.
    for output in (expected, folder / "again"):
        fresh()
        before = list(sys.argv), list(sys.path)
        sys.argv, sys.path[0] = [path, str(output), *args], str(SCRIPTS)
        runpy.run_path(path, run_name="__main__")
        sys.argv, sys.path[:] = before
    fresh()
    outcome = launch(path, [str(seen), *args], run=folder / "run", every=2, probes=["all"])
    assert outcome.exit_status == 0
    assert_same(load(expected), load(folder / "again"), "the script itself differs")
    assert_same(load(expected), load(seen), "watched differs")


def fresh() -> None:
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    sys.modules.pop("toy", None)


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def assert_same(first: Any, second: Any, where: str) -> None:
    """Equal to the last bit, all the way down."""
    assert type(first) is type(second), where
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_same(a, b, f"{where}/{index}")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    else:
        assert first == second, f"{where}: {first} != {second}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
