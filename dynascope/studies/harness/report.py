"""A study's report: its claims with their verdicts, and the paper's figures drawn again from its records."""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynascope.report.charts import Section
from dynascope.report.page import check_output, whole_page, write
from dynascope.report.pictures import GOOD, INK, QUIET, SEVERITY_INKS, TextPage
from dynascope.studies.harness.catalogue import load_study
from dynascope.studies.harness.study import Runs, Study
from dynascope.studies.harness.telling import WORDS_PLAIN, measured, paper_value
from dynascope.studies.harness.unit import Unit

VERDICT = "verdict.json"
_INKS = {True: GOOD, False: SEVERITY_INKS["critical"], None: QUIET}


def report_study(folder: str | Path, output: str | Path) -> Path:
    """Write the report of a study from the folder of its last run; `output` is .html, .pdf, or a folder of pictures.

    Raises ValueError for a folder without a verdict, and for another suffix.

    >>> report_study("runs/studies/sigma-reparam/small-1a2b3c4d", "sigma.html")
    """
    check_output(output)
    path = Path(folder) / VERDICT
    if not path.is_file():
        raise ValueError(f"{folder} holds no {VERDICT}: run the study first (dynascope study NAME)")
    verdict = json.loads(path.read_text())
    study = load_study(verdict.get("origin", verdict["study"]))
    drawn = [Section("Figures", charts)] if (charts := study.draw(records_of(study, Path(folder), verdict))) else []
    return write(
        output,
        drawn,
        page=lambda: whole_page(study.name, _facts(study, verdict), [_claims(verdict)], {"claims": "Claims"}, drawn),
        first_page=lambda: _claims_page(study, verdict),
    )


def records_of(study: Study, folder: Path, verdict: dict[str, Any]) -> Sequence[Runs]:
    """The finished records of each seed, by arm."""
    seeds = range(verdict["seeds"])
    units = [[Unit(arm, seed, folder / arm / f"seed-{seed}") for arm in study.arms] for seed in seeds]
    return [{unit.arm: unit.open() for unit in of_seed if unit.is_finished} for of_seed in units]


def _facts(study: Study, verdict: dict[str, Any]) -> str:
    facts = {
        "paper": f"{study.paper.title} (arXiv {study.paper.arxiv}, {study.paper.year})",
        "preset": verdict["preset"],
        "seeds": str(verdict["seeds"]),
        "took": f"{verdict['wall_seconds']:.0f} s",
    }
    return "".join(f"<div><dt>{name}</dt><dd>{html.escape(fact)}</dd></div>" for name, fact in facts.items())


def _claims(verdict: dict[str, Any]) -> str:
    heads = ("claim", "verdict", "measured (95 % interval)", "rule", "the paper")
    rows = []
    for claim in verdict["claims"]:
        cells = (
            f"{claim['id']}: {claim['statement']}",
            WORDS_PLAIN[claim["holds"]],
            measured(claim),
            claim["rule"],
            f"{paper_value(claim)} ({claim['source']})",
        )
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in heads)
    failed = "".join(f"<p>{html.escape(f'{unit} failed: {why}')}</p>" for unit, why in verdict["failures"].items())
    return f'<section id="claims"><h2>Claims</h2><table><tr>{head}</tr>{"".join(rows)}</table>{failed}</section>'


def _claims_page(study: Study, verdict: dict[str, Any]) -> dict[str, Any]:
    page = TextPage(study.name)
    page.add(f"{study.paper.title} (arXiv {study.paper.arxiv}, {study.paper.year})")
    page.add(f"preset {verdict['preset']}, {verdict['seeds']} seeds", colour=QUIET)
    for claim in verdict["claims"]:
        page.add("")
        page.add(f"{claim['id']}: {claim['statement']}", colour=INK)
        page.add(f"{WORDS_PLAIN[claim['holds']]}: {measured(claim)}", 14, colour=_INKS[claim["holds"]])
        page.add(f"{claim['rule']}; the paper: {paper_value(claim)}", 14, colour=QUIET)
    return page.spec()
