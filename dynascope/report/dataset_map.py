"""What became of single examples, as charts: the map of the dataset, and how hard its examples are at the end.

Drawn from the series of the probe `examples`. Source: 2009.10795 (map), 2107.07075 (EL2N).
"""

from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from dynascope.record import Record
from dynascope.report.rows import Rows

PREFIX = "examples/"
MAX_VISITS, MAX_EXAMPLES = 4000, 2000
WIDTH, HEIGHT = 460, 300


def example_rows(record: Record) -> Rows:
    """One row an example: mean and spread of its confidence, share of right answers, its last EL2N, over its visits.

    Of long runs some of the batches are read, of large datasets some examples, evenly spread.
    """
    columns = {
        name: record.series(PREFIX + name, max_points=MAX_VISITS).values.ravel()
        for name in ("id", "confidence", "correct", "el2n")
    }
    visits = pd.DataFrame(columns)
    by_example = visits[visits["id"] >= 0].groupby("id")
    table = pd.DataFrame(
        {
            "confidence": by_example["confidence"].mean(),
            "variability": by_example["confidence"].std(ddof=0),
            "correctness": by_example["correct"].mean(),
            "el2n": by_example["el2n"].last(),
            "visits": by_example.size(),
        }
    ).dropna()
    chosen = np.unique(np.linspace(0, len(table) - 1, min(len(table), MAX_EXAMPLES)).round().astype(int))
    rows: Rows = table.iloc[chosen].round(4).reset_index().astype({"id": int}).to_dict("records")
    return rows


def map_spec() -> dict[str, Any]:
    """Examples by how sure the model is of their label, and how much that changes: easy ones above, hard ones below."""
    chart = (
        alt.Chart(alt.NamedData("examples"))
        .mark_circle(size=26, opacity=0.7)
        .encode(
            x=alt.X("variability:Q", title="variability of the label's probability"),
            y=alt.Y("confidence:Q", title="mean probability of the label", scale=alt.Scale(domain=[0, 1])),
            color=alt.Color("correctness:Q", title="correct", scale=alt.Scale(scheme="viridis", domain=[0, 1])),
            tooltip=[alt.Tooltip(f"{name}:Q") for name in ("id", "confidence", "variability", "correctness", "visits")],
        )
    )
    return _finished(chart)


def hardness_spec() -> dict[str, Any]:
    """How many examples have which EL2N at their last visit."""
    chart = (
        alt.Chart(alt.NamedData("examples"))
        .mark_bar(color="#0072B2")
        .encode(
            x=alt.X("el2n:Q", bin=alt.Bin(step=0.05, extent=[0, 1.5]), title="EL2N at the last visit"),
            y=alt.Y("count():Q", title="examples"),
        )
    )
    return _finished(chart)


def _finished(chart: alt.Chart) -> dict[str, Any]:
    spec: dict[str, Any] = chart.properties(width=WIDTH, height=HEIGHT).to_dict(validate=False)
    del spec["config"]
    return spec
