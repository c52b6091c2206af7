"""A run in the terminal."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from dynascope.record import Finding, Record, RecordWriter, open_record
from dynascope.report import print_findings, show, show_json
from dynascope.report.terminal import sparkline


def told(record: Record, function: Callable[[Record, Console], None] = show, *, width: int = 100) -> str:
    """What a terminal with colours receives."""
    file = io.StringIO()
    function(record, Console(file=file, width=width, force_terminal=True, color_system=None, legacy_windows=False))
    return file.getvalue()


def row_of(text: str, name: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [name])


def test_every_series_has_its_unit_course_last_value_and_range(make_run: Callable[..., Record]) -> None:
    text = told(make_run({"entropy": [1.0, 4.0, 2.5]}))
    assert row_of(text, "entropy") == ["entropy", "nats", "▁█▅", "2.5", "1", "4"]


def test_places_are_shown_by_their_median(make_run: Callable[..., Record]) -> None:
    text = told(make_run({"entropy": [[1.0, 2.0, 900.0], [3.0, 5.0, 4.0]]}))
    assert row_of(text, "entropy")[-3:] == ["4", "2", "4"]
    assert "the median is shown" in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_table_fits_the_terminal_and_cuts_no_number(make_run: Callable[..., Record], width: int) -> None:
    name = "optimizer2/gradients/total_norm_unclipped/of/everything"
    record = make_run({name: [-1.234e-05, -9.876e07], "loss": [1.0, 2.0]})
    lines = told(record, width=width).splitlines()
    assert max(map(cell_len, lines)) <= width
    row = next(line for line in lines if line.startswith("optimizer2/"))
    assert row.split()[-3:] == ["-9.876e+07", "-9.876e+07", "-1.234e-05"]


def test_what_is_not_finite_is_seen_and_leaves_the_range_alone(make_run: Callable[..., Record]) -> None:
    text = told(make_run({"loss": [2.0, np.nan, 1.0, np.inf], "broken": [np.nan, np.nan]}))
    assert row_of(text, "loss")[-4:] == ["█!▁!", "inf", "1", "2"]
    assert row_of(text, "broken")[-4:] == ["!!", "nan", "nan", "nan"]


def test_findings_come_worst_first_with_their_remedy(varied: Record) -> None:
    text = told(varied, print_findings, width=400)
    assert text.index("✖ step 20  The loss is not a number.") < text.index("▲ step 12  The loss rose")
    assert "    lr = 1e-4" in text


def test_remedy_of_several_lines_keeps_them(make_run: Callable[..., Record]) -> None:
    finding = Finding("spike", "info", 3, "It rose.", {}, "a = 1\nb = 2", "convention")
    text = told(make_run({"loss": [1.0]}, findings=(finding,)), print_findings)
    assert [line.rstrip() for line in text.splitlines()] == ["● step 3  It rose.", "    a = 1", "    b = 2"]


def test_healthy_run_says_so(make_run: Callable[..., Record]) -> None:
    assert "No findings" in told(make_run({"loss": [1.0]}))


def test_hostile_names_neither_colour_nor_move_the_terminal(varied: Record) -> None:
    text = told(varied, width=400)
    assert "[red]" in text  # markup is shown, not obeyed
    assert "\x1b[31m" not in text
    assert "'�[31m[red]" in text


@pytest.mark.parametrize("control", ["\x1b]0;title\x07", "\r", "\x08", "\x9b2J", "\u202e"])
def test_no_control_character_reaches_the_terminal(make_run: Callable[..., Record], control: str) -> None:
    finding = Finding("spike", "info", 0, f"m{control}", {}, f"r{control}x", "convention")
    text = told(make_run({f"a{control}b": [1.0]}, findings=(finding,)))
    assert control not in text


def test_empty_run_is_told_as_such(make_run: Callable[..., Record]) -> None:
    text = told(make_run({}))
    assert "nothing measured yet" in " ".join(text.split())


def test_running_ended_and_failed_runs_are_told_apart(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        writer.add(0, {"loss": 1.0})
        writer.flush()
        record = open_record(tmp_path)
        assert "running, last step 0" in told(record, width=400)
    assert "ended, last step 0" in told(record, width=400)
    with RecordWriter(tmp_path / "other") as writer:
        writer.event("exception", "ValueError: no")
    assert "failed: ValueError: no" in told(open_record(tmp_path / "other"), width=400)


def test_json_holds_what_the_terminal_shows(varied: Record) -> None:
    shown: dict[str, Any] = json.loads(json.dumps(show_json(varied), allow_nan=False))
    assert shown["live"] is False
    assert shown["series"]["loss"]["dims"] == []
    assert shown["series"]["loss"]["last_step"] == 39
    assert shown["series"]["gradients/norm"]["unit"] == "nats"
    assert shown["series"]["curvature/sharpness"]["last"] == "inf"
    assert [finding["id"] for finding in shown["findings"]] == ["divergence", "loss-spike"]
    assert shown["findings"][0]["evidence"] == {"loss": "nan"}


def test_several_processes_are_shown_together(make_run: Callable[..., Record]) -> None:
    record = make_run({"loss": [1.0, 1.0]})
    with RecordWriter(record.path, rank=1) as other:
        other.add(0, {"loss": 3.0})
        other.add(1, {"loss": 5.0})
    assert row_of(told(record), "loss")[-3:] == ["3", "2", "3"]


def test_sparkline_spans_from_least_to_most() -> None:
    assert sparkline(np.array([0.0, 1.0, 2.0, 3.0]), width=4) == "▁▃▆█"
    assert sparkline(np.full(3, 7.0), width=5) == "▁▁▁"
    assert sparkline(np.empty(0), width=5) == ""
    assert len(sparkline(np.arange(1000.0), width=20)) == 20


def test_watch_that_was_killed_is_told_as_broken_off(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        writer.event("start", "watching train.py")
        writer.add(3, {"loss": 1.0})
    assert "broken off, last step 3" in told(open_record(tmp_path), width=400)
