"""Each claim of scan-and-snap tells a world with the effect from one without; training is that of the module; it runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every_study import StudyTests
from torch.nn.functional import cross_entropy

from dynascope.data import SequenceClassData
from dynascope.nn import YZTransformer
from dynascope.optim import attention_decoder_param_groups
from dynascope.record import Series, open_record
from dynascope.studies import Runs, StudyRecord, load_study
from dynascope.studies.scan_and_snap.synthetic import MOMENTUM, RATES, RATIOS, Config, train_cells
from dynascope.theory.scan_snap import class_mixtures

STUDY = load_study("scan-and-snap")
CLAIMS = {claim.id: claim for claim in STUDY.claims}
REPETITIONS, CLASSES = 4, 2


def world(folder: Path, seed: int, *, is_effect: bool) -> Runs:
    """One seed's records in a world where the paper is right about everything, or about nothing."""
    random = np.random.default_rng(seed)
    jitter = 1 + 0.01 * random.random((REPETITIONS, 1))
    series: dict[str, dict[int, dict[str, Any]]] = {}

    # Without the effect the mass hardly moves at first and much later, one token wins, and ranks are shuffled.
    masses = (0.645, 0.39, 0.38) if is_effect else (0.645, 0.6, 0.3)
    frequencies = np.linspace(0.1, 1, 10)
    after = frequencies**2 if is_effect else frequencies[[1, 0, *range(2, 10)]]
    largest = 0.2 if is_effect else 0.9
    series["scan"] = {
        step: {
            "common_mass": np.tile(mass * jitter, (1, CLASSES)),
            "distinct": np.tile(weights, (REPETITIONS, CLASSES, 1)),
            "largest": np.tile(largest * jitter, (1, CLASSES)),
        }
        for step, mass, weights in zip((0, 100, 3000), masses, (frequencies, after, after), strict=True)
    }

    # A faster decoder adds entropy and a faster attention takes it away, or neither does anything.
    rate, ratio = np.log(RATES)[:, None], np.log(RATIOS)
    entropy = 2.5 + (0.1 * ratio - 0.3 * rate if is_effect else 0.0 * ratio * rate)
    series["grid-1"] = {0: {"entropy": entropy + 0.01 * random.normal(size=(20, len(RATES), len(RATIOS)))}}

    steps = np.unique(np.logspace(0, 3, 40).round().astype(int))
    fall = np.log(steps).clip(None, np.log(100) if is_effect else None)
    commonness = np.linspace(0.5, 1, 200)
    change = (-commonness if is_effect else commonness) + 0.1 * random.normal(size=200)
    for model in ("yz", "transformer"):
        curve = {
            int(step): {"scan/entropy": np.full((1, 1), 1 - 0.05 * value * jitter[0, 0])}
            for step, value in zip(steps, fall, strict=True)
        }
        curve[1000] |= {"commonness": commonness, "attention_change": change}
        series[f"text-{model}"] = curve

    runs = {}
    for arm, values in series.items():
        with StudyRecord(folder / arm, earlier={}, config={}) as record:
            record.declare(Series("scan/entropy", ("layer", "head")))
            for step, measured in values.items():
                record.add(step, measured)
        runs[arm] = open_record(folder / arm)
    return runs


class TestStudy(StudyTests):
    study = STUDY
    world = staticmethod(world)
    num_figures = 5


def test_entropy_that_does_not_fall_is_no_snap(tmp_path: Path) -> None:
    with StudyRecord(tmp_path / "arm", earlier={}, config={}) as record:
        record.declare(Series("scan/entropy", ("layer", "head")))
        for step in range(40):
            record.add(step, {"scan/entropy": np.full((1, 1), 0.9 + 0.001 * step)})
    assert CLAIMS["D-snap-yz"].measure({"text-yz": open_record(tmp_path / "arm")}) == 1.0


@pytest.mark.parametrize("start", ["zeros", "uniform"])
def test_cells_side_by_side_are_the_module_under_two_optimizers(start: str) -> None:
    data = SequenceClassData(2, 2, num_common=3, num_unique=3, length=10, batch_size=16)
    rates = ((0.5, 1.0), (2.0, 0.5))  # of the decoder and of attention
    Z = train_cells(
        data,
        [rate for rate, _ in rates],
        [rate for _, rate in rates],
        num_repetitions=1,
        num_steps=20,
        generator=torch.Generator().manual_seed(0),
        start=start,  # type: ignore[arg-type]
    )
    for place, (decoder, attention) in enumerate(rates):
        generator = torch.Generator().manual_seed(0)
        model = YZTransformer(data.vocab)
        with torch.no_grad():
            for parameter in (model.Y, model.Z):
                drawn = torch.rand(1, 1, *parameter.shape, generator=generator)[0, 0]
                parameter.copy_((2 * drawn - 1) * (data.vocab**-0.5 if start == "uniform" else 0.0))
        groups = attention_decoder_param_groups(model, attention, decoder / attention)
        optimizers = [torch.optim.SGD([group], momentum=MOMENTUM) for group in groups]
        for _ in range(20):
            counts, query, target = data.sample_counts(data.batch_size, generator)
            cross_entropy(model.forward_counts(counts, query), target).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        torch.testing.assert_close(Z[0, place], model.Z.detach(), rtol=1e-4, atol=1e-5)
    moved = class_mixtures(Z, data.population()) - data.population().probs
    assert float(moved.abs().max()) > 0.01


@pytest.mark.parametrize("settings", [{"num_steps": 0}, {"num_repetitions": 0}, {"window": 2}, {"length": 1}])
def test_impossible_settings_are_told(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        Config(**settings)  # type: ignore[arg-type]


def test_a_text_that_is_too_short_is_told(tmp_path: Path) -> None:
    from dynascope.studies.scan_and_snap.synthetic import Arm
    from dynascope.studies.scan_and_snap.text import train_on_text

    (tmp_path / "short.txt").write_text("a few words")
    config = Config(data=str(tmp_path / "short.txt"))
    with (
        StudyRecord(tmp_path / "run", earlier={}, config={}) as record,
        pytest.raises(ValueError, match="has 3 words"),
    ):
        train_on_text(config, Arm("text"), 0, record)
