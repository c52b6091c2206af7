"""Pages of studies: what the last verdict says, and nothing lost of what was said before."""

import json
from pathlib import Path

from dynascope.studies.harness.catalogue import STUDIES
from dynascope.studies.harness.pages import write_pages


def verdict_of(run: Path) -> dict[str, object]:
    claim = {
        "id": "C1",
        "statement": "Entropy | falls.",
        "source": "Section 3",
        "paper_value": "0.5",
        "measured": 0.25,
        "ci95": [0.2, 0.3],
        "rule": "mean < 1",
        "holds": True,
    }
    return {
        "study": "hapo",
        "preset": "small",
        "seeds": 3,
        "claims": [claim],
        "run": str(run),
        "wall_seconds": 12.3,
        "failures": {},
    }


def test_a_page_has_the_verdict_and_others_keep_what_they_have(tmp_path: Path) -> None:
    docs, run = tmp_path / "docs", tmp_path / "runs" / "hapo" / "small-0"
    run.mkdir(parents=True)
    (run / "verdict.json").write_text(json.dumps(verdict_of(tmp_path / "gone")))
    docs.mkdir()
    (docs / "kdrl.md").write_text("said before")
    written = {page.name for page in write_pages(docs, tmp_path / "runs")}
    assert "kdrl.md" not in written
    assert (docs / "kdrl.md").read_text() == "said before"
    assert len(list(docs.glob("*.md"))) == len(STUDIES)
    page = (docs / "hapo.md").read_text()
    assert "preset `small`, 3 seeds, 12 s" in page
    assert "Entropy \\| falls." in page
    assert "dynascope study hapo" in page
    assert "Not run yet." in (docs / "riskpo.md").read_text()
