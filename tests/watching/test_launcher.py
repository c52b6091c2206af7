"""The launcher runs scripts as Python does, and says in one line what is wrong with one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dynascope
from dynascope.record import RecordError
from dynascope.watching.launcher import launch

SCRIPTS = Path(__file__).parent / "scripts"


@pytest.fixture(autouse=True)
def _deterministic_only_inside():
    yield
    torch.use_deterministic_algorithms(False)
    sys.modules.pop("toy", None)


def test_a_script_with_its_own_arguments_imports_and_exit_status(tmp_path: Path) -> None:
    output = tmp_path / "out"
    outcome = launch(
        str(SCRIPTS / "package/train.py"), [str(output), "--steps", "4", "--every", "9"], run=tmp_path / "run"
    )
    told = torch.load(output, weights_only=True)
    assert told["argv"] == [str(output), "--steps", "4", "--every", "9"]
    assert told["every"] == 9
    assert (outcome.num_steps, outcome.exit_status) == (4, 7)


def test_arguments_and_path_are_put_back(tmp_path: Path) -> None:
    before = list(sys.argv), list(sys.path)
    launch(str(SCRIPTS / "plain.py"), [str(tmp_path / "out")], run=tmp_path / "run", probes=["none"])
    assert (sys.argv, sys.path) == before


def test_a_script_that_raises_half_way_keeps_what_was_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = launch(str(SCRIPTS / "raises.py"), run=tmp_path / "run", every=1)
    assert (outcome.exit_status, outcome.num_steps) == (1, 3)
    shown = capsys.readouterr().err
    assert "the disk of the data server is gone" in shown
    assert "launcher.py" not in shown
    record = dynascope.open(tmp_path / "run")
    assert record["loss"].step.values.tolist() == [0, 1, 2]
    (event,) = [event for event in record.events if event.kind == "exception"]
    assert event.message == "RuntimeError: the disk of the data server is gone"


def test_a_script_that_trains_two_models_gets_both(tmp_path: Path) -> None:
    launch(str(SCRIPTS / "two_models.py"), [str(tmp_path / "out")], run=tmp_path / "run", every=2)
    record = dynascope.open(tmp_path / "run")
    assert record["loss"].size == record["optimizer2/loss"].size == 6
    assert record["attention/entropy"].sizes["layer"] == record["optimizer2/attention/entropy"].sizes["layer"] == 2


def test_each_optimizer_of_a_gan_gets_its_own_loss_and_model(tmp_path: Path) -> None:
    output = tmp_path / "out"
    launch(str(SCRIPTS / "gan.py"), [str(output)], run=tmp_path / "run", every=2)
    losses = torch.stack(torch.load(output, weights_only=True)["losses"])
    record = dynascope.open(tmp_path / "run")
    torch.testing.assert_close(torch.tensor(record["loss"].values), losses[0::2].double(), check_dtype=False)
    torch.testing.assert_close(torch.tensor(record["optimizer2/loss"].values), losses[1::2].double(), check_dtype=False)
    assert record["gradients/norm"].sizes["parameter"] == 4
    assert record["optimizer2/gradients/norm"].sizes["parameter"] == 6


@pytest.mark.parametrize("script", ["accumulation.py", "amp.py", "clipping.py", "closure.py"])
def test_the_recorded_loss_is_the_objective_of_the_step(script: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    launch(str(SCRIPTS / script), [str(output)], run=tmp_path / "run", probes=["none"])
    losses = torch.stack([loss.float() for loss in torch.load(output, weights_only=True)["losses"]])
    # Three micro-batches add up to one step; the closure's first evaluation is the loss that `step` returns.
    expected = losses.view(-1, 3).sum(1) if script == "accumulation.py" else losses
    seen = torch.tensor(dynascope.open(tmp_path / "run")["loss"].values)
    torch.testing.assert_close(seen, expected, check_dtype=False, rtol=1e-6, atol=1e-6)


def test_norms_before_clipping_are_seen_though_the_script_imported_the_function(tmp_path: Path) -> None:
    launch(str(SCRIPTS / "clipping.py"), [str(tmp_path / "out")], run=tmp_path / "run", every=1)
    record = dynascope.open(tmp_path / "run")
    assert (record["gradients/total_norm_unclipped"] > 0.1).all()
    assert record["gradients/total_norm"].values == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("missing.py", None, FileNotFoundError, "there is no script"),
        ("notes.txt", b"Dear diary, today", ValueError, "is not a Python script"),
        ("weights.bin", b"\x00\x01\x02", ValueError, "is not a Python script"),
    ],
)
def test_what_is_no_script_is_told_in_a_line(
    name: str, content: bytes | None, error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message):
        launch(str(path), run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_directory_that_holds_a_record_is_refused(tmp_path: Path) -> None:
    launch(str(SCRIPTS / "plain.py"), [str(tmp_path / "out")], run=tmp_path / "run", probes=["none"])
    with pytest.raises(RecordError, match="run"):
        launch(str(SCRIPTS / "plain.py"), [str(tmp_path / "out")], run=tmp_path / "run")


def command_line(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    package = str(Path(dynascope.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-m", "dynascope", *words],
        env=os.environ | {"PYTHONPATH": package, "OMP_NUM_THREADS": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_script_that_never_trains_ends_with_status_2_and_one_line(tmp_path: Path) -> None:
    done = command_line("watch", str(SCRIPTS / "never.py"), "--run", "run", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "without an optimizer step" in done.stderr


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["watch", "x.py"], "there is no script x.py"),
        (["watch"], "SCRIPT"),
        (["wach", "x.py"], "did you mean 'watch'?"),
        (["watch", str(SCRIPTS / "never.py"), "--budget", "0"], "above 0 and below 1"),
        (["watch", str(SCRIPTS / "never.py"), "--budget", "1"], "above 0 and below 1"),
        (["watch", str(SCRIPTS / "never.py"), "--budget", "-0.5"], "above 0 and below 1"),
        (["watch", str(SCRIPTS / "never.py"), "--every", "0"], "at least 1"),
        (["watch", str(SCRIPTS / "never.py"), "--probes", "atention"], "did you mean 'attention'?"),
        (["show", "nowhere"], "nowhere"),
    ],
)
def test_wrong_usage_is_status_2_and_one_line(words: list[str], part: str, tmp_path: Path) -> None:
    done = command_line(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert part in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
