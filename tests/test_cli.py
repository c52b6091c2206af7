"""The commands as a user types them: what they print, where, and with which exit status."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dynascope.cli import COMMANDS, run
from dynascope.record import Finding, RecordWriter, Series
from dynascope.studies.harness.catalogue import STUDIES

Made = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parents[1]


@pytest.fixture
def dynascope(tmp_path: Path) -> Made:
    """Runs `dynascope …` in an empty folder."""

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "dynascope", *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return call


@pytest.fixture
def a_run(tmp_path: Path) -> Path:
    with RecordWriter(tmp_path / "run") as record:
        record.declare(Series("attention/entropy", ("layer", "head"), "nats"))
        for step in range(20):
            record.add(step, {"loss": 1 / (step + 1), "attention/entropy": np.full((2, 3), step)})
        record.add(20, {"loss": float("nan")})
        record.finding(Finding("loss-not-finite", "critical", 20, "The loss is nan.", {}, "pass", "IEEE 754", "loss"))
    return tmp_path / "run"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == run([]) == 0
    told = capsys.readouterr().out
    assert all(f"dynascope {command}" in told for command in ["watch", *COMMANDS])


@pytest.mark.parametrize("command", ["watch", *COMMANDS])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run([command, "--help"])
    assert stop.value.code == 0
    assert "--help" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == "0.1.0"


def test_show_prints_series_and_findings(a_run: Path, dynascope: Made) -> None:
    done = dynascope("show", str(a_run))
    assert done.returncode == 0
    assert "attention/entropy" in done.stdout
    assert "The loss is nan." in done.stdout


def test_show_json_is_one_object_without_nan(a_run: Path, dynascope: Made) -> None:
    done = dynascope("show", str(a_run), "--json")
    told = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert told["series"]["loss"]["last"] == "nan"
    assert told["findings"][0]["id"] == "loss-not-finite"


def test_report_says_where_it_is(a_run: Path, dynascope: Made, tmp_path: Path) -> None:
    done = dynascope("report", str(a_run), "-o", "page.html")
    assert (done.returncode, done.stdout.strip()) == (0, "page.html")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_export_says_where_it_is(a_run: Path, dynascope: Made) -> None:
    done = dynascope("export", str(a_run), "--to", "parquet")
    assert done.returncode == 0
    assert Path(done.stdout.strip()).exists()


def test_studies_list_their_papers(dynascope: Made) -> None:
    done = dynascope("studies", "--json")
    listed = json.loads(done.stdout)["studies"]
    papers = {entry["study"]: entry["arxiv"] for entry in listed}
    assert tuple(papers) == STUDIES
    assert papers["sigma-reparam"] == "2303.06296"
    assert len(set(papers.values())) == len(papers)
    assert all(entry["verdict"] is None for entry in listed)


@pytest.mark.parametrize("is_strict", [False, True])
def test_study_prints_one_json_object_and_strict_sets_the_status(
    is_strict: bool, dynascope: Made, tmp_path: Path
) -> None:
    toy = (ROOT / "tests" / "studies" / "harness" / "toy.py").read_text()
    # Without the arm that fails, and with a claim that cannot hold.
    toy = (
        toy.replace(', "unlucky": -1.0', "")
        .replace('"luck", lambda runs: runs["unlucky"]["height"][-1]', '"gain", gained')
        .replace('">", 0.0', '">", 9.0')
    )
    (tmp_path / "toy.py").write_text(toy)
    done = dynascope(
        "study", "toy.py", "--preset", "smoke", "--seeds", "2", "--json", *(["--strict"] if is_strict else [])
    )
    assert [claim["holds"] for claim in json.loads(done.stdout)["claims"]] == [True, False]
    assert done.returncode == (3 if is_strict else 0)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["shwo", "x"], "did you mean 'show'"),
        (["show"], "RUN"),
        (["show", "nowhere"], "nowhere does not exist"),
        (["report"], "at least one run"),
        (["report", "nowhere"], "nowhere does not exist"),
        (["export", "nowhere", "--to", "csv"], "csv"),
        (["live", "nowhere"], "no folder nowhere"),
        (["study", "data-dite"], "did you mean 'data-diet'"),
        (["study", "data-diet", "--seeds", "none"], "seeds"),
        (["watch", "nothing.py"], "nothing.py"),
        (["watch", "--budget", "1", "x.py"], "above 0 and below 1"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(words: list[str], part: str, dynascope: Made, tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("")
    done = dynascope(*words)
    assert done.returncode == 2
    assert part in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["x.py"]


def test_reader_that_goes_away_is_no_failure(a_run: Path) -> None:
    command = f"{sys.executable} -m dynascope show {a_run} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = """
import sys, dynascope, dynascope.cli
print([name for name in ("torch", "xarray", "pandas", "altair", "sklearn") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
