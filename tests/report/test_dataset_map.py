"""Charts of single examples."""

from pathlib import Path

import pytest
import torch
import vl_convert
from torch import nn

import dynascope
from dynascope.record import Record, open_record
from dynascope.report.charts import sections
from dynascope.report.dataset_map import example_rows


@pytest.fixture
def digits_like(tmp_path: Path) -> Record:
    """40 examples visited five times; the model is sure of the first 20 and wrong about the last 20."""
    model = nn.Linear(2, 2)
    ids = torch.arange(40)
    labels = (ids >= 20).long()
    with dynascope.watch(
        model, torch.optim.SGD(model.parameters(), lr=0.1), run=tmp_path / "run", probes=["examples"]
    ) as watch:
        for visit in range(5):
            margin = torch.where(ids < 20, 3.0 + 0 * ids, 0.5 * visit)
            watch.examples(ids, torch.stack([margin, -margin], 1), labels)
    return open_record(tmp_path / "run")


def test_rows_are_what_became_of_each_example(digits_like: Record) -> None:
    rows = {row["id"]: row for row in example_rows(digits_like)}
    sure = torch.tensor(6.0).sigmoid().item()
    assert rows[3]["confidence"] == pytest.approx(sure, abs=1e-4)
    assert (rows[3]["variability"], rows[3]["correctness"], rows[3]["visits"]) == (0.0, 1.0, 5)
    wrong = torch.sigmoid(-torch.arange(5.0))
    assert rows[30]["confidence"] == pytest.approx(wrong.mean().item(), abs=1e-4)
    assert rows[30]["variability"] == pytest.approx(wrong.std(correction=0).item(), abs=1e-4)
    assert rows[30]["el2n"] == pytest.approx(2**0.5 * (1 - wrong[-1].item()), abs=1e-3)


def test_examples_have_a_section_of_their_own_and_no_heat_map_of_slots(digits_like: Record) -> None:
    drawn = {section.title: section.charts for section in sections({"run": digits_like})}
    assert [chart.title for chart in drawn["Examples"]] == ["Map of the dataset", "How hard the examples are"]
    assert not any("examples/" in chart.title for charts in drawn.values() for chart in charts)
    for chart in drawn["Examples"]:
        assert "<svg" in vl_convert.vegalite_to_svg(chart.whole())
