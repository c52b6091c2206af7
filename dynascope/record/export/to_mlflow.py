"""MLflow: a store in a SQLite file; `mlflow ui --backend-store-uri sqlite:///OUTPUT/mlflow.db` shows it.

An array becomes one metric for each of its numbers. MLflow's metric names hold letters, digits and `_-. /:`; anything
else, and `:` itself, is written as its hexadecimal code point between colons (`layer=0` is `layer:3d:0`), an empty
part of a path as `::`; what is then longer than 250 characters is cut and numbered. `metric_names.json` maps the
metrics' names to the record's. NaN is kept; MLflow keeps infinities as ±1.8e308. When several processes wrote the
record, each is a run.
"""

import json
from collections.abc import Callable
from pathlib import Path

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from dynascope.record.export.rows import rows_by_process
from dynascope.record.reader import Record

_BATCH = 1000  # the most metrics that MLflow takes at once
_LONGEST = 250


def write(record: Record, output: Path, progress: Callable[[float], None]) -> None:
    """Log all metrics in batches."""
    output.mkdir()
    store = output.resolve()
    client = MlflowClient(tracking_uri=f"sqlite:///{store}/mlflow.db")
    experiment = client.create_experiment("dynascope", artifact_location=(store / "artifacts").as_uri())
    settings = record.config.get("config", {})
    parameters = [Param(metric_name(str(key)), str(value)[:500]) for key, value in settings.items()]
    names: dict[str, str] = {}
    for title, rows in rows_by_process(record, progress):
        run = client.create_run(experiment, run_name=title).info.run_id
        client.log_batch(run, params=parameters)
        waiting = []
        for row in rows:
            for tag, value in row.values.items():
                if tag not in names:
                    names[tag] = _unique(metric_name(tag), set(names.values()))
                waiting.append(Metric(names[tag], float(value), int(1000 * row.time), row.step))
                if len(waiting) == _BATCH:
                    client.log_batch(run, metrics=waiting)
                    waiting = []
        client.log_batch(run, metrics=waiting)
        client.set_terminated(run)
    (output / "metric_names.json").write_text(json.dumps({new: old for old, new in names.items()}, indent=1) + "\n")


def metric_name(name: str) -> str:
    """The name as MLflow takes it.

    >>> metric_name("attention/entropy/layer=0"), metric_name("../a")
    ('attention/entropy/layer:3d:0', ':2e::2e:/a')
    """
    return "/".join(_part(part) for part in name.split("/"))


def _part(part: str) -> str:
    if part in ("", ".", ".."):
        return part.replace(".", ":2e:") or "::"
    return "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "_-. ") else f":{ord(letter):x}:"
        for letter in part
    )


def _unique(name: str, taken: set[str]) -> str:
    candidate, number = name, 1
    while candidate in taken or len(candidate) > _LONGEST:
        number += 1
        candidate = f"{name[: _LONGEST - 12].rstrip('/')} {number}"
    return candidate
