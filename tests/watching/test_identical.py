"""Training under watch is bit-identical to training without it, however the script trains."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from both_ways import assert_same

import dynascope

SCRIPTS = Path(__file__).parent / "scripts"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(dynascope.__file__).parents[1])}
ATTENTIVE = {"plain.py", "accumulation.py", "amp.py", "clipping.py", "trainer.py"}
MODES = [
    ("plain.py",),
    ("accumulation.py",),
    ("amp.py",),
    ("clipping.py",),
    ("gan.py",),
    ("closure.py",),
    ("compiled.py", "module"),
    ("compiled.py", "in place"),
    ("compiled.py", "blocks"),
    ("compiled.py", "function"),
    ("trainer.py", "gpt2"),
    ("trainer.py", "llama"),
    ("digits.py", "0"),
    ("digits.py", "2"),
    ("two_models.py",),
]


def run_both_ways(folder: Path, *mode: str) -> dynascope.Record:
    """The record of the watched run, once it is known that watching changed nothing."""
    command = [sys.executable, str(SCRIPTS.parent / "both_ways.py"), str(folder), *mode]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return dynascope.open(folder / "run")


@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_bit_identical(mode: tuple[str, ...], tmp_path: Path) -> None:
    record = run_both_ways(tmp_path, *mode)
    # The watch looked, in each of the modes: identity would be easy for one that does nothing.
    assert record["loss"].size >= 5
    assert record["gradients/norm"].sizes["step"] >= 2
    stopped = [event for event in record.events if event.kind in ("watch-off", "probe-off")]
    assert [event.message for event in stopped] == []
    if mode[0] in ATTENTIVE:
        assert record["attention/entropy"].sizes["layer"] == 2
        assert record["residual/rms"].sizes["block"] == 2


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_bit_identical(kind: str, tmp_path: Path) -> None:
    def torchrun(output: Path, *front: str) -> list[Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
        command += [f"--master-port={port}", *front, str(SCRIPTS / "distributed.py"), str(output), kind]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        return [torch.load(f"{output}.{rank}", weights_only=True) for rank in (0, 1)]

    expected = torchrun(tmp_path / "bare")
    seen = torchrun(
        tmp_path / "watched", "-m", "--", "dynascope", "watch", "--run", str(tmp_path / "run"), "--every", "2"
    )
    assert_same(expected, seen, kind)
    record = dynascope.open(tmp_path / "run")
    assert record.ranks == [0, 1]
    assert record["loss"].dims == ("rank", "step")
    assert record["attention/entropy"].sizes["layer"] == 2
    assert not [event for event in record.events if event.kind in ("probe-off", "watch-off")]
    torch.testing.assert_close(
        torch.tensor(record["gradients/total_norm"].values).clamp(max=1.0),
        torch.tensor(record["gradients/total_norm_unclipped"].sel(step=record["gradients/total_norm"].step).values)
        .float()
        .clamp(max=1.0),
        rtol=1e-4,
        atol=1e-4,
    )
