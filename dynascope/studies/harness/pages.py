"""One page a study, written from its last verdict: python -m dynascope.studies.harness.pages docs/studies"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynascope.report.pictures import png
from dynascope.studies.harness.catalogue import list_studies, load_study
from dynascope.studies.harness.report import records_of
from dynascope.studies.harness.telling import WORDS_PLAIN, measured, paper_value


def write_pages(folder: str | Path, root: str | Path = "runs/studies") -> list[Path]:
    """Write a Markdown page for every study into `folder`; returns the pages.

    A study that was not run here keeps the page that it has.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    pages = []
    for entry in list_studies(root):
        page = Path(folder) / f"{entry['study']}.md"
        if entry["verdict"] is None and page.exists():
            continue
        page.write_text(study_page(entry, pictures=_pictures(entry, Path(folder))))
        pages.append(page)
    return pages


def _pictures(entry: dict[str, Any], folder: Path) -> list[Path]:
    """The study's figures as PNG files beside its page, where its records still lie."""
    study, verdict = load_study(entry["study"]), entry["verdict"]
    if verdict is None or not Path(verdict["run"]).is_dir():
        return []
    charts = study.draw(records_of(study, Path(verdict["run"]), verdict))
    pictures = [folder / "figures" / f"{study.name}-{number}.png" for number in range(1, len(charts) + 1)]
    for picture, chart in zip(pictures, charts, strict=True):
        picture.parent.mkdir(exist_ok=True)
        picture.write_bytes(png(chart))
    return pictures


def study_page(entry: dict[str, Any], pictures: Sequence[Path] = ()) -> str:
    """The page of one entry of `list_studies`; `pictures` lie in a folder beside it."""
    study = load_study(entry["study"])
    told = sys.modules[study.train.__module__].__doc__ or ""
    lines = [
        f"# {study.name}",
        "",
        f"{study.paper.title} (arXiv {study.paper.arxiv}, {study.paper.year})",
        "",
        told.strip(),
        "",
    ]
    lines += [
        "```",
        f"dynascope study {study.name}",
        "```",
        "",
        "Arms: " + ", ".join(f"`{arm}`" for arm in study.arms),
        "",
    ]
    verdict = entry["verdict"]
    if verdict is None:
        return "\n".join([*lines, "Not run yet.", ""])
    lines += [
        f"## Last verdict: preset `{verdict['preset']}`, {verdict['seeds']} seeds, {verdict['wall_seconds']:.0f} s",
        "",
    ]
    lines += ["| claim | verdict | measured (95 % interval) | rule | the paper |", "|---|---|---|---|---|"]
    for claim in verdict["claims"]:
        cells = f"{claim['id']}: {claim['statement']}", WORDS_PLAIN[claim["holds"]], measured(claim), claim["rule"]
        source = f"{paper_value(claim)} ({claim['source']})"
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in (*cells, source)) + " |")
    lines += [""] + [f"Failed: {unit}: {why}" for unit, why in verdict["failures"].items()]
    if pictures:
        lines += ["Pictures are not kept here: `make docs` draws them from the records of a run.", ""]
    lines += [
        f"![Figure {number}]({picture.parent.name}/{picture.name})\n" for number, picture in enumerate(pictures, 1)
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    for written in write_pages(sys.argv[1]):
        print(written)
