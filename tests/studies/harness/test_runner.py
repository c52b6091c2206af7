"""Running a study: order, resuming, failures, engines."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dynascope.record import open_record
from dynascope.studies import Claim, Paper, Study, Verdict, load_study, run_study, verdict_as_json
from dynascope.studies.harness.unit import Unit, train_unit

TOY = str(Path(__file__).with_name("toy.py"))


@pytest.fixture(scope="module")
def verdict(tmp_path_factory: pytest.TempPathFactory) -> Verdict:
    return run_study(load_study(TOY), seeds=2, jobs=2, root=tmp_path_factory.mktemp("studies"))


def is_gone(group: int) -> bool:
    """Whether every process of the group ends within ten seconds."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_arms_that_build_on_others_see_their_records_of_the_same_seed(verdict: Verdict) -> None:
    for seed in range(2):
        records = [open_record(verdict.run / arm / f"seed-{seed}") for arm in ("first", "second")]
        first, second = (float(record["height"][-1]) for record in records)
        assert second == pytest.approx(first + 1.0, abs=0.01)


def test_a_failing_arm_leaves_the_others_their_verdicts(verdict: Verdict) -> None:
    assert verdict.failures == dict.fromkeys(["unlucky seed 0", "unlucky seed 1"], "RuntimeError: out of luck")
    assert [judgement.holds for judgement in verdict.judgements] == [True, None]
    assert verdict.exit_status() == 1


def test_json_has_the_keys_of_the_contract(verdict: Verdict) -> None:
    told = json.loads(json.dumps(verdict_as_json(verdict), allow_nan=False))
    assert {"study", "paper", "preset", "seeds", "claims", "run", "wall_seconds"} <= told.keys()
    keys = {"id", "statement", "source", "paper_value", "measured", "ci95", "rule", "holds"}
    assert all(keys <= claim.keys() for claim in told["claims"])
    assert json.loads((verdict.run / "verdict.json").read_text()) == told


def test_finished_arms_are_kept_and_unfinished_ones_done_again(verdict: Verdict) -> None:
    first = verdict.run / "first" / "seed-0"
    before = (first / "rank-00000.sqlite").stat().st_mtime_ns
    again = run_study(load_study(TOY), seeds=2, jobs=2, root=verdict.run.parents[1])
    assert (first / "rank-00000.sqlite").stat().st_mtime_ns == before
    assert len(again.failures) == 2


def test_results_repeat(verdict: Verdict, tmp_path: Path) -> None:
    unit = Unit("first", 1, tmp_path / "again")
    train_unit(load_study(TOY), "small", {}, unit, [])
    kept = open_record(verdict.run / "first" / "seed-1")
    assert unit.open()["height"].values.tolist() == kept["height"].values.tolist()


def test_other_settings_go_to_another_folder(tmp_path: Path) -> None:
    study = load_study(TOY)
    runs = {
        run_study(study, preset="smoke", seeds=1, jobs=1, overrides=one, root=tmp_path).run
        for one in ({}, {"note": "x"})
    }
    assert len(runs) == 2


def test_study_continues_after_kill(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "dynascope",
        "study",
        TOY,
        "--jobs",
        "1",
        "--seeds",
        "2",
        "--set",
        "is_slow=True",
        "--json",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, start_new_session=True, stdout=subprocess.DEVNULL
    )
    finished: list[Path] = []
    while not finished:
        assert process.poll() is None
        time.sleep(0.05)
        finished = list(tmp_path.glob("runs/studies/toy/*/*/*/finished.json"))
    process.kill()
    process.wait()
    stamps = {path: path.stat().st_mtime_ns for path in finished}
    assert is_gone(process.pid), "a worker outlived the study that was killed"
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert json.loads(done.stdout)["claims"][0]["holds"] is True
    assert done.returncode == 1  # the unlucky arm
    assert {path: path.stat().st_mtime_ns for path in finished} == stamps


def test_interrupt_ends_the_workers_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dynascope", "study", TOY, "--set", "is_slow=True", "--set", "num_steps=1000"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests in the background may have been told to ignore it
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    signal.signal(signal.SIGINT, before)
    while not list(tmp_path.glob("runs/studies/toy/*/*/*/rank-00000.sqlite")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in told
    assert is_gone(process.pid)


def test_same_study_twice_at_once_is_refused(tmp_path: Path) -> None:
    study = load_study(TOY)
    folder = run_study(study, preset="smoke", seeds=1, jobs=1, root=tmp_path).run
    holder = (
        "import sys, time; from pathlib import Path; from dynascope.record.locking import acquire; "
        "acquire(Path(sys.argv[1])); print(flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", holder, str(folder / "study.lock")],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    assert other.stdout is not None
    other.stdout.readline()
    with pytest.raises(ValueError, match="is being written by process"):
        run_study(study, preset="smoke", seeds=1, jobs=1, root=tmp_path)
    other.kill()
    other.communicate()


def test_ray_gives_the_same_records(verdict: Verdict, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    by_ray = run_study(load_study(TOY), seeds=2, jobs=2, engine="ray", root=tmp_path)
    assert by_ray.failures.keys() == verdict.failures.keys()
    records = [open_record(run.run / "second" / "seed-1")["height"].values.tolist() for run in (by_ray, verdict)]
    assert records[0] == records[1]


def test_impossible_wishes_are_refused(tmp_path: Path) -> None:
    study = load_study(TOY)
    for settings, message in [({"seeds": 0}, "seeds"), ({"jobs": 0}, "jobs"), ({"preset": "huge"}, "smoke, small")]:
        with pytest.raises(ValueError, match=message):
            run_study(study, root=tmp_path, **settings)


def test_after_must_name_arms() -> None:
    claim = Claim("C", "", "", None, "", lambda runs: 0.0, ">", 0.0)
    plain: dict[str, Any] = {"name": "s", "paper": Paper("0", "", 2020), "arms": {"a": 1}, "presets": {}}
    plain["train"] = lambda *_: None
    with pytest.raises(ValueError, match="nowhere"):
        Study(**plain, claims=[claim], after={"a": ("nowhere",)})
    with pytest.raises(ValueError, match="same id"):
        Study(**plain, claims=[claim, claim])
