"""Overfitting, and memorisation before generalisation."""

from typing import Any

import numpy as np
import pytest

from dynascope.findings.generalization import DelayedGeneralization, Overfitting

STEPS = np.arange(1000)
EVERY = {"val/loss": 20}
LOOKS = STEPS[::20]


def test_validation_that_follows_training_is_silent(told: Any) -> None:
    train = 0.5 + 2 * np.exp(-STEPS / 200)
    values = {"loss": train, "val/loss": 1.1 * train[::20]}
    assert told(Overfitting, values, EVERY) == []
    assert told(DelayedGeneralization, values, EVERY) == []


def test_validation_that_levels_out_is_no_overfitting(told: Any) -> None:
    validation = np.maximum(0.9, 2.5 * np.exp(-LOOKS / 200)) + 0.01 * np.random.default_rng(0).normal(size=50)
    assert told(Overfitting, {"loss": 2 * np.exp(-STEPS / 200), "val/loss": validation}, EVERY) == []


def test_rising_validation_is_told_at_its_best(told: Any) -> None:
    validation = 1 + (LOOKS / 1000 - 0.4) ** 2
    (finding,) = told(Overfitting, {"loss": 2 * np.exp(-STEPS / 200), "val/loss": validation}, EVERY)
    assert (finding.id, finding.step) == ("overfitting", 400)
    assert finding.evidence["best"] == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["eval/loss", "test_loss"])
def test_other_names_of_the_validation_loss_are_known(told: Any, name: str) -> None:
    values = {"loss": 2 * np.exp(-STEPS / 200), name: 1 + (LOOKS / 1000 - 0.4) ** 2}
    assert [finding.series for finding in told(Overfitting, values, {name: 20})] == [name]


def test_grokking_is_told_as_a_gap_that_opens_and_closes(told: Any) -> None:
    train = 2 * np.exp(-STEPS / 30)
    validation = np.where(LOOKS < 700, 2.2, 0.05)
    opened, closed = told(DelayedGeneralization, {"loss": train, "val/loss": validation}, EVERY)
    assert (opened.id, closed.id) == ("memorisation", "delayed-generalisation")
    assert 80 <= opened.step <= 140  # 0.05 * 2 is reached at step 90; the median of 20 lags by 10, looks by 20
    assert closed.step == 700
    assert closed.evidence["delay"] == 700 - opened.step


def test_memorisation_without_end_stays_one_finding(told: Any) -> None:
    values = {"loss": 2 * np.exp(-STEPS / 30), "val/loss": np.full(50, 2.2)}
    assert [finding.id for finding in told(DelayedGeneralization, values, EVERY)] == ["memorisation"]


@pytest.mark.parametrize(("moved", "turned", "is_lazy"), [(0.02, 0.0, True), (0.02, 0.3, False), (0.8, 0.0, False)])
def test_a_memorising_run_is_told_as_lazy_by_its_kernel(told: Any, moved: float, turned: float, is_lazy: bool) -> None:
    share = LOOKS / LOOKS[-1]
    values = {
        "loss": 2 * np.exp(-STEPS / 30),
        "val/loss": np.full(50, 2.2),
        "kernel/distance": moved * np.minimum(1, 10 * share),
        "kernel/alignment": 0.1 + turned * np.minimum(1, 10 * share),
    }
    every = {**EVERY, "kernel/distance": 20, "kernel/alignment": 20}
    (finding,) = told(DelayedGeneralization, values, every)
    assert ("still lazy" in finding.message) is is_lazy
    assert ("OutputScale" in finding.remedy) is is_lazy
    assert finding.evidence["kernel_distance"] == pytest.approx(moved, rel=0.5)
