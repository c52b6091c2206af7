"""Series of a study's records as the rows of a chart."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from dynascope.studies.harness import Runs

Rows: TypeAlias = list[dict[str, object]]


def curves(runs: Sequence[Runs], arm: str, names: Mapping[str, str], /, **told: object) -> Rows:
    """Scalar series of an arm over steps, one row a seed, series and step; `names` say what each is called in the chart.

    Rows have "step", "value", "what" and "seed", and what else is told. Seeds in which the arm failed are left out.

    >>> curves(runs, "baseline", {"train/loss": "training"}, alpha="1")
    """
    return [
        {"step": int(step), "value": float(value), "what": shown, "seed": seed, **told}
        for seed, records in enumerate(runs)
        if arm in records
        for name, shown in names.items()
        for step, value in zip(records[arm][name].step.values, records[arm][name].values, strict=True)
    ]
