"""Spikes, divergence and plateaus."""

from typing import Any

import numpy as np
import pytest

from dynascope.findings.loss import LossSpike, Plateau

STEPS = np.arange(400)


def healthy(seed: int = 0, noise: float = 0.05) -> np.ndarray:
    """A loss that falls like a power of the step, with the noise of batches."""
    return 2 + 3 * (1 + STEPS / 20) ** -0.7 + noise * np.random.default_rng(seed).normal(size=400)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("noise", [0.01, 0.05, 0.2])
def test_healthy_losses_are_silent(told: Any, seed: int, noise: float) -> None:
    assert told(LossSpike, {"loss": healthy(seed, noise)}) == []


def test_spike_is_told_at_its_step_with_its_height(told: Any) -> None:
    loss = healthy()
    loss[200:206] += [4, 3, 2, 1, 0.5, 0.2]
    (finding,) = told(LossSpike, {"loss": loss})
    assert (finding.id, finding.step, finding.severity) == ("loss-spike", 200, "warning")
    assert finding.evidence["loss"] == pytest.approx(loss[200])
    assert finding.evidence["usual"] == pytest.approx(np.median(loss[152:200]))


def test_one_loud_batch_that_stands_out_little_is_no_spike(told: Any) -> None:
    loss = healthy(noise=0.01)
    loss[200] *= 1.15  # above the limit of 10 %, but alone and below twice as far
    assert told(LossSpike, {"loss": loss}) == []


def test_loss_that_stays_up_is_a_divergence(told: Any) -> None:
    loss = healthy()
    loss[250:] = 6.5
    findings = told(LossSpike, {"loss": loss})
    assert [(finding.id, finding.step) for finding in findings] == [("loss-spike", 250), ("divergence", 250)]
    assert findings[1].severity == "critical"


def test_spike_that_comes_down_is_no_divergence(told: Any) -> None:
    loss = healthy()
    loss[250:270] += 3
    assert [finding.id for finding in told(LossSpike, {"loss": loss})] == ["loss-spike"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_loss_that_is_no_number_is_told_once_with_the_last_that_was(told: Any, bad: float) -> None:
    loss = healthy()
    loss[300:] = bad
    (finding,) = told(LossSpike, {"loss": loss})
    assert (finding.id, finding.step, finding.severity) == ("loss-not-finite", 300, "critical")
    assert finding.evidence["last_finite_step"] == 299


def test_many_spikes_are_told_five_times_at_most(told: Any) -> None:
    loss = np.tile(healthy(noise=0.01)[200:300], 12)
    loss[90::80] += 5
    assert len([finding for finding in told(LossSpike, {"loss": loss}) if finding.id == "loss-spike"]) == 5


def test_falling_losses_have_no_plateau(told: Any) -> None:
    assert told(Plateau, {"loss": 3 * np.exp(-np.arange(1000) / 400)}) == []


def test_plateau_begins_where_progress_ended(told: Any) -> None:
    steps = np.arange(1000)
    loss = np.where(steps < 300, 5 - steps / 100, 2.0) + 0.001 * np.random.default_rng(0).normal(size=1000)
    (finding,) = told(Plateau, {"loss": loss})
    assert (finding.id, finding.severity) == ("plateau", "info")
    assert finding.step == pytest.approx(300, abs=40)
    assert finding.evidence["level"] == pytest.approx(2.0, abs=0.01)
