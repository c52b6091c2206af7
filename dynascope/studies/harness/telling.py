"""Verdicts for people: in the terminal."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dynascope.studies.harness.catalogue import list_studies
from dynascope.studies.harness.verdict import Verdict, verdict_as_json

WORDS_PLAIN = {True: "holds", False: "does not hold", None: "undecided"}
_COLOURS = {True: "green", False: "red", None: "yellow"}
WORDS = {holds: f"[{_COLOURS[holds]}]{word}[/]" for holds, word in WORDS_PLAIN.items()}


def print_verdict(verdict: Verdict, console: Console) -> None:
    """Each claim with its rule, the measured figure beside the paper's, and the verdict."""
    paper = verdict.study.paper
    console.print(f"[bold]{escape(verdict.study.name)}[/]  {escape(paper.title)} (arXiv {paper.arxiv})")
    console.print(f"preset {verdict.preset}, {verdict.seeds} seeds, {verdict.wall_seconds:.0f} s\n", style="dim")
    for claim in verdict_as_json(verdict)["claims"]:
        console.print(f"[bold]{escape(claim['id'])}[/]  {WORDS[claim['holds']]}  {escape(claim['statement'])}")
        console.print(f"    measured {measured(claim)}; the paper: {escape(paper_value(claim))}", highlight=False)
        console.print(f"    rule: {escape(claim['rule'])} ({escape(claim['source'])})", style="dim", highlight=False)
        if claim["note"]:
            console.print(f"    {escape(claim['note'])}", style="yellow", highlight=False)
    for unit, reason in verdict.failures.items():
        console.print(f"{unit} failed: {reason}", style="red", markup=False)
    told = f"\nrecords: {verdict.run}   page: dynascope report {verdict.run}"
    console.print(told, style="dim", markup=False, soft_wrap=True)


def print_studies(console: Console, root: str | Path = "runs/studies") -> None:
    """A table of every study with its last verdict under `root`."""
    table = Table("study", "paper", "claim", "measured", "the paper", "last verdict", box=None, header_style="bold")
    for study in list_studies(root):
        label = (study["study"], f"{study['arxiv']} ({study['year']})")
        if study["verdict"] is None:
            table.add_row(*label, "", "", "", f"[dim]dynascope study {study['study']}[/]")
            continue
        for claim in study["verdict"]["claims"]:
            table.add_row(*label, claim["id"], measured(claim), escape(paper_value(claim)), WORDS[claim["holds"]])
            label = ("", "")
    console.print(table)


def measured(claim: dict[str, Any]) -> str:
    """A claim's figure with its interval, from its JSON form."""
    if claim["measured"] is None:
        return "nothing"
    ends = claim["ci95"] and [f"{end:.3g}" if end is not None else "?" for end in claim["ci95"]]
    return f"{claim['measured']:.3g}" + (f" ({ends[0]} to {ends[1]})" if ends else "")


def paper_value(claim: dict[str, Any]) -> str:
    """The paper's own figure, as it gives it."""
    return "no figure" if claim["paper_value"] is None else str(claim["paper_value"])
