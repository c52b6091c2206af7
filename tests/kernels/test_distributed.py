"""Rows of the tangent kernel over two processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dynascope.kernels import ntk_rows


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("rows")
    script = Path(__file__).with_name("distributed_rows.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, str(script), str(folder)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]


def test_rows_of_all_processes_are_the_whole_kernel(found: list[dict[str, torch.Tensor]]) -> None:
    assert [one["rows"].shape[0] for one in found] == [3, 4]
    torch.testing.assert_close(torch.cat([one["rows"] for one in found]), found[0]["expected"])
    for one in found:
        torch.testing.assert_close(one["gathered"], one["expected"])


def test_a_sharded_model_has_the_same_kernel_and_trains_on_as_before(found: list[dict[str, torch.Tensor]]) -> None:
    for one in found:
        torch.testing.assert_close(one["of_sharded"], one["expected"])
        for sharded, plain in zip(one["after"], one["plain_after"], strict=True):
            torch.testing.assert_close(sharded, plain)


def test_one_process_alone_is_told() -> None:
    with pytest.raises(ValueError, match="torchrun"):
        ntk_rows(torch.nn.Linear(1, 1), torch.ones(2, 1))
