"""A real browser, and records to look at."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynascope.record import Finding, Record, RecordWriter, Series, open_record

HOSTILE = '<img src=x onerror="window.hacked=1">\n</script><script>window.hacked=1</script>"\'\x1b[31m[red]{{1}}'


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium or Chrome, whichever the machine has."""
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = os.environ.get("DYNASCOPE_BROWSER") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium or Chrome on PATH: install one, or name it in DYNASCOPE_BROWSER")
    with sync_playwright() as playwright:
        args = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        started = playwright.chromium.launch(executable_path=found, args=args)
        yield started
        started.close()


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Record]:
    """Makes a record from values by series name; the first axis is the steps."""

    def make(values: Mapping[str, Any], *, name: str = "run", findings: tuple[Finding, ...] = ()) -> Record:
        with RecordWriter(tmp_path / name) as record:
            for series, steps in values.items():
                array = np.asarray(steps, np.float64)
                dims = ("layer", "head", "position")[: array.ndim - 1]
                record.declare(Series(series, dims, unit="nats", description=f"What {series} is."))
                for step, value in enumerate(array):
                    record.add(step, {series: value})
            for finding in findings:
                record.finding(finding)
        return open_record(tmp_path / name)

    return make


@pytest.fixture
def varied(make_run: Callable[..., Record]) -> Record:
    """A record with every kind of series, with findings, and with names that mean harm."""
    random = np.random.default_rng(0)
    loss = np.exp(-np.arange(40) / 5) + 0.001
    loss[20] = np.nan
    values = {
        "loss": loss,
        "eval/loss": loss + 0.1,
        "gradients/norm": random.random((40, 12)),
        "attention/entropy": random.random((30, 3, 4)),
        "attention/sink_mass": random.random((30, 2, 3, 8)),
        "residual/rms": random.random((10, 3)),
        "curvature/sharpness": [np.inf, np.inf],
        "memory/resident": [5.0],
        HOSTILE: [1.0, 2.0],
    }
    findings = (
        Finding(
            "loss-spike",
            "warning",
            12,
            f"The loss rose {HOSTILE}",
            {"ratio": 3.0},
            f"lr = 1e-4  # {HOSTILE}",
            "convention",
            "loss",
        ),
        Finding(
            "divergence", "critical", 20, "The loss is not a number.", {"loss": float("nan")}, "", "convention", "loss"
        ),
    )
    return make_run(values, findings=findings)
