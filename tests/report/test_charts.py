"""From series to charts."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import vl_convert

from dynascope.record import Record, RecordWriter, Series, open_record
from dynascope.report.charts import OWN, Chart, plan, sections
from dynascope.report.rows import MAX_COLUMNS, MAX_PANELS, MAX_PLACES, MAX_POINTS


def chart_of(record: Record, title: str) -> Chart:
    return next(chart for section in sections({"run": record}) for chart in section.charts if chart.title == title)


def test_series_go_to_their_sections(varied: Record) -> None:
    planned = plan({"run": varied})
    titles = {section: [chart.title for chart in charts] for section, charts in planned.items()}
    assert titles["Loss and learning rate"] == ["Loss"]
    assert titles["Attention"] == ["attention/entropy", "attention/sink_mass"]
    assert titles["Curvature"] == ["curvature/sharpness"]
    assert len(titles["Logged by the run"]) == 1


def test_second_optimizers_series_stand_beside_the_firsts(make_run: Callable[..., Record]) -> None:
    record = make_run({"gradients/total_norm": [1.0], "optimizer2/gradients/total_norm": [1.0]})
    assert [chart.title for chart in plan({"run": record})["Gradients"]] == [
        "gradients/total_norm",
        "optimizer2/gradients/total_norm",
    ]


def test_losses_share_a_chart(varied: Record) -> None:
    rows = chart_of(varied, "Loss").data["lines"]
    assert {row["line"] for row in rows} == {"loss", "eval/loss"}


def test_what_is_not_finite_is_marked_and_not_dropped(varied: Record) -> None:
    broken = chart_of(varied, "Loss").data["broken"]
    assert [(row["step"], row["line"], row["text"]) for row in broken] == [
        (20, "loss", "NaN"),
        (20, "eval/loss", "NaN"),
    ]
    assert [row["text"] for row in chart_of(varied, "curvature/sharpness").data["broken"]] == ["+infinity", "+infinity"]


def test_values_over_more_than_two_decades_get_a_log_axis(make_run: Callable[..., Record]) -> None:
    record = make_run({"a": [1.0, 1000.0], "b": [1.0, 50.0], "c": [-1.0, 1000.0]})
    kinds = {name: '"type": "log"' in json.dumps(chart_of(record, name).spec) for name in "abc"}
    assert kinds == {"a": True, "b": False, "c": False}


def test_few_places_are_lines_and_many_a_heat_map(varied: Record) -> None:
    kinds = {chart.title: chart.kind for charts in plan({"run": varied}).values() for chart in charts}
    assert (kinds["residual/rms"], kinds["gradients/norm"], kinds["attention/entropy"]) == ("lines", "heat", "heat")
    assert {row["line"] for row in chart_of(varied, "residual/rms").data["lines"]} == {"0", "1", "2"}


def test_heads_have_a_heat_map_a_layer(varied: Record) -> None:
    cells = chart_of(varied, "attention/entropy").data["cells"]
    assert {row["panel"] for row in cells} == {"layer 0", "layer 1", "layer 2"}
    assert len(cells) == 30 * 3 * 4
    value = varied["attention/entropy"].values[7, 2, 1]
    found = next(row for row in cells if (row["step"], row["panel"], row["place"]) == (7, "layer 2", "1"))
    assert found["value"] == pytest.approx(value, rel=1e-5)
    assert found["end"] == 8


def test_a_third_axis_leaves_heads_averaged(varied: Record) -> None:
    cells = chart_of(varied, "attention/sink_mass").data["cells"]
    found = next(row for row in cells if (row["step"], row["panel"], row["place"]) == (3, "layer 1", "5"))
    assert found["value"] == pytest.approx(varied["attention/sink_mass"].values[3, 1, :, 5].mean(), rel=1e-5)


def test_long_runs_are_thinned(make_run: Callable[..., Record]) -> None:
    record = make_run(
        {"loss": np.arange(5000.0), "gradients/norm": np.ones((1000, 5)), "attention/entropy": np.ones((2, 40, 2))}
    )
    assert len(chart_of(record, "loss").data["lines"]) <= MAX_POINTS
    assert len({row["step"] for row in chart_of(record, "gradients/norm").data["cells"]}) <= MAX_COLUMNS
    assert len({row["panel"] for row in chart_of(record, "attention/entropy").data["cells"]}) == MAX_PANELS


def test_several_runs_are_compared_by_their_medians(make_run: Callable[..., Record]) -> None:
    first = make_run({"gradients/norm": [[1.0, 2.0, 3.0, 4.0, 50.0]]}, name="a")
    second = make_run({"loss": [3.0]}, name="b")
    charts = {chart.title: chart for section in sections({"a": first, "b": second}) for chart in section.charts}
    (row,) = charts["gradients/norm"].data["lines"]
    assert (row["line"], row["value"], row["low"], row["high"]) == ("a", 3.0, 2.0, 4.0)
    assert [row["line"] for row in charts["loss"].data["lines"]] == ["b"]


def test_findings_stand_on_the_loss_and_on_their_own_series(varied: Record) -> None:
    flags = chart_of(varied, "Loss").data["findings"]
    assert [(row["number"], row["step"]) for row in flags] == [("1", 20), ("2", 12)]  # numbered worst first
    assert chart_of(varied, "gradients/norm").data["findings"] == []


def test_every_chart_renders(varied: Record) -> None:
    for section in sections({"run": varied}):
        for chart in section.charts:
            assert "<svg" in vl_convert.vegalite_to_svg(chart.whole())


def test_heat_map_of_many_places_shows_some_and_says_so(make_run: Callable[..., Record]) -> None:
    chart = chart_of(make_run({"gradients/norm": np.ones((2, 300))}), "gradients/norm")
    places = {int(row["place"]) for row in chart.data["cells"]}
    assert (len(places), min(places), max(places)) == (MAX_PLACES, 0, 299)
    assert chart.subtitle.endswith(f"Of 300 places {MAX_PLACES} are shown, evenly spread.")


@pytest.mark.parametrize("num_runs", [1, 2])
def test_series_that_was_declared_and_never_measured_has_an_empty_chart(
    make_run: Callable[..., Record], tmp_path: Path, num_runs: int
) -> None:
    with RecordWriter(tmp_path / "killed early") as writer:
        writer.declare(Series("a", ("layer", "head"), coords={"layer": ["x", "y"]}))
        writer.declare(Series("b"))
    records = {"killed early": open_record(tmp_path / "killed early"), "other": make_run({"b": [1.0]})}
    drawn = sections(dict(list(records.items())[:num_runs]))
    charts = {chart.title: chart for section in drawn for chart in section.charts}
    assert charts["a"].data["lines"] == []
    assert len(charts["b"].data["lines"]) == num_runs - 1
    assert all("<svg" in vl_convert.vegalite_to_svg(chart.whole()) for chart in charts.values())


def test_processes_are_drawn_by_their_mean(make_run: Callable[..., Record]) -> None:
    record = make_run({"loss": [1.0, 1.0, 1.0]})
    with RecordWriter(record.path, rank=1) as other:
        other.add(0, {"loss": 3.0})
        other.add(2, {"loss": 5.0})
    # At step 1 the second process measured nothing.
    assert [row["value"] for row in chart_of(record, "loss").data["lines"]] == [2.0, 1.0, 3.0]


def test_an_empty_record_has_no_charts(make_run: Callable[..., Record]) -> None:
    assert sections({"run": make_run({})}) == []


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("test/loss", "Loss and learning rate"),
        ("test/correct", "What the policy can do"),
        ("rollout/truncated", "Rollouts"),
        ("policy/clip/high", "Policy updates"),
        ("demonstrations/used", "Policy updates"),
        ("gradient_norm", "Gradients"),
        ("optimizer2/gradients/norm", "Gradients"),
        ("mine", OWN),
    ],
)
def test_a_series_goes_where_its_whole_name_says_then_its_first_part(
    name: str, section: str, make_run: Callable[..., Record]
) -> None:
    assert list(plan({"run": make_run({name: [1.0]})})) == [section]
