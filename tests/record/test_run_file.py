"""run.json tells how a run was started."""

import dataclasses
import subprocess
import sys

import pytest

from dynascope.record import RecordError, RecordWriter, open_record, run_file
from dynascope.record.run_file import read_run_file


@dataclasses.dataclass
class Config:
    lr: float = 0.1


def test_run_file_holds_what_is_needed_to_start_again(tmp_path):
    RecordWriter(tmp_path, config={"seed": 3, "optimizer": Config()}).close()
    content = open_record(tmp_path).config
    assert content["config"] == {"seed": 3, "optimizer": {"lr": 0.1}}
    assert content["argv"] == sys.argv
    assert set(content["versions"]) == {"dynascope", "torch", "numpy"}


def test_only_rank_zero_writes_it(tmp_path):
    RecordWriter(tmp_path, rank=1).close()
    assert open_record(tmp_path).config == {}


def test_git_state_tells_commit_and_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in (
        ["git", "init", "-q"],
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "first"],
    ):
        subprocess.run(command, check=True)
    RecordWriter(tmp_path / "run").close()
    git = open_record(tmp_path / "run").config["git"]
    assert len(git["commit"]) == 40
    assert git["is_dirty"] is False


def test_no_git_is_no_error(tmp_path, monkeypatch):
    run_file._git_state.cache_clear()
    monkeypatch.setenv("PATH", "")
    RecordWriter(tmp_path).close()
    assert open_record(tmp_path).config["git"] is None


def test_damaged_run_file_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RecordError, match=r"run\.json is not valid JSON"):
        read_run_file(tmp_path)


def test_environment_tells_what_matters_and_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    RecordWriter(tmp_path).close()
    written = (tmp_path / "run.json").read_text()
    assert '"OMP_NUM_THREADS": "1"' in written
    assert "hunter2" not in written


def test_seed_of_the_generator_is_told(tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(1234)
    RecordWriter(tmp_path).close()
    assert open_record(tmp_path).config["seeds"] == {"torch": 1234}
