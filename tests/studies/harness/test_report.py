"""A study's report: claims and figures as page, PDF and pictures."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from dynascope.cli import run
from dynascope.studies import run_study
from dynascope.studies.harness.catalogue import load_study
from dynascope.studies.harness.report import report_study

STUDY = '''
"""A coin with a bias."""
from dataclasses import dataclass
import altair as alt
from dynascope.report import draw
from dynascope.studies import Claim, Paper, Study

@dataclass(frozen=True)
class Config:
    num_steps: int = 3

def train(config, arm, seed, record):
    for step in range(config.num_steps):
        record.add(step, {"heads": arm + 0.01 * seed + 0.1 * step})

def figures(runs):
    rows = [
        {"step": int(step), "heads": float(value), "arm": arm, "seed": seed}
        for seed, records in enumerate(runs) for arm, record in records.items()
        for step, value in zip(record["heads"].step.values, record["heads"].values)
    ]
    chart = alt.Chart().mark_line().encode(x="step:Q", y="heads:Q", color="arm:N", detail="seed:N")
    return [draw("Heads over throws", "Each line is <one> seed.", rows, chart)]

study = Study(
    name="coin", paper=Paper("0000.00000", "Coins & <their> sides", 2020), arms={"fair": 0.5, "bent": 0.8},
    presets={"smoke": Config()}, train=train, figures=figures,
    claims=[Claim("C1", "The bent coin shows more heads.", "Section 1", None, "heads",
                  lambda runs: float(runs["bent"]["heads"][-1] - runs["fair"]["heads"][-1]), ">", 0.1)],
)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of two arms and two seeds, from a file of its own."""
    root = tmp_path_factory.mktemp("study")
    (root / "coin.py").write_text(STUDY)
    return run_study(load_study(str(root / "coin.py")), preset="smoke", seeds=2, jobs=1, root=root / "runs").run


def test_the_page_tells_claims_and_holds_the_figure(folder: Path, tmp_path: Path) -> None:
    page = report_study(folder, tmp_path / "coin.html").read_text()
    assert "C1: The bent coin shows more heads." in page
    assert "Coins &amp; &lt;their&gt; sides" in page
    assert len(re.findall("<figure data-chart=", page)) == 1
    assert "Each line is &lt;one&gt; seed." in page


def test_pictures_and_a_pdf(folder: Path, tmp_path: Path) -> None:
    report_study(folder, tmp_path / "pictures")
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["00-heads-over-throws.png", "00-heads-over-throws.svg"]
    assert (tmp_path / "pictures" / names[0]).read_bytes().startswith(b"\x89PNG")
    assert report_study(folder, tmp_path / "coin.pdf").read_bytes().startswith(b"%PDF")


def test_the_command_takes_the_folder_of_a_study(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize(
    ("name", "told"), [("coin.docx", "html, .pdf or a folder"), ("coin.html", "run the study first")]
)
def test_bad_requests_are_told(folder: Path, tmp_path: Path, name: str, told: str) -> None:
    source: Sequence[Path] = (folder, tmp_path)
    with pytest.raises(ValueError, match=told):
        report_study(source[told.startswith("run")], tmp_path / name)


def test_an_arm_without_a_record_is_left_out(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    (copy / "fair").mkdir(parents=True)
    verdict = json.loads((folder / "verdict.json").read_text())
    (copy / "verdict.json").write_text(json.dumps(verdict))
    assert "<figure" in report_study(copy, tmp_path / "left.html").read_text()
