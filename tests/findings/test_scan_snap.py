"""The snap: found where it is, and nowhere else."""

from typing import Any

import numpy as np
import pytest
import xarray as xr

from dynascope.findings.scan_snap import AttentionSnap, detect_snap, log_step_rate


def series(values: np.ndarray, every: int = 1) -> xr.DataArray:
    return xr.DataArray(values, dims=("step",), coords={"step": every * np.arange(len(values))})


def snapped(at: int, size: int, every: int) -> np.ndarray:
    """log(1 + t) until the snap, then log log t / 100 on top of what was reached."""
    steps = every * np.arange(size)
    later = np.log1p(at) + 0.01 * np.log(np.log(np.maximum(steps, 3)))
    return np.where(steps < at, np.log1p(steps), later)


@pytest.mark.parametrize("at", [50, 200, 1000])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_snap_is_found_within_a_tenth(at: int, sign: float) -> None:
    every = max(1, at // 100)
    report = detect_snap(series(sign * snapped(at, 2000, every), every))
    assert report is not None
    assert report.step == pytest.approx(at, rel=0.1)
    assert report.scanning_rate == pytest.approx(sign, rel=0.02)
    assert abs(report.frozen_rate) < 0.01
    assert report.confidence > 0.99


@pytest.mark.parametrize("seed", range(5))
def test_noise_and_a_wait_before_the_scan_do_not_hide_it(seed: int) -> None:
    x = np.log1p(np.arange(4000))
    values = 1 - 0.15 * (x.clip(np.log(20), np.log(300)) - np.log(20))
    noisy = values + 0.02 * np.random.default_rng(seed).normal(size=4000)
    report = detect_snap(series(noisy))
    assert report is not None
    assert report.step == pytest.approx(300, rel=0.25)
    assert report.scanning_rate == pytest.approx(-0.15, rel=0.2)


STEPS = np.arange(3000)


@pytest.mark.parametrize(
    "values",
    [
        np.log1p(STEPS),
        np.ones(3000),
        1.0 * STEPS,
        np.sqrt(STEPS),
        np.log1p(STEPS) ** 2,
        np.zeros(4),
        snapped(2500, 3000, 1),
    ],
    ids=["logarithm", "constant", "line", "root", "accelerating", "few", "only just"],
)
def test_what_still_moves_or_never_did_is_none(values: np.ndarray) -> None:
    assert detect_snap(series(values)) is None


@pytest.mark.parametrize("seed", range(5))
def test_noise_alone_and_noisy_scanning_are_none(seed: int) -> None:
    noise = np.random.default_rng(seed).normal(size=3000)
    assert detect_snap(series(noise)) is None
    assert detect_snap(series(np.log1p(STEPS) + noise)) is None


def test_not_finite_values_are_left_out() -> None:
    values = snapped(200, 2000, 2)
    values[::7] = np.nan
    report = detect_snap(series(values, 2))
    assert report is not None
    assert report.step == pytest.approx(200, rel=0.1)


def test_rates_in_log_step_by_hand() -> None:
    # 3 ln t until step 100, then nothing: the rate is 3 while all of the last ln(4) lies before, and 0 where it lies after.
    steps = np.array([0, 1, 2, 4, 8, 16, 32, 64, 100, 200, 400, 800])
    curve = xr.DataArray(3 * np.log(steps.clip(1, 100)), dims="step", coords={"step": steps})
    rates = log_step_rate(curve, width=np.log(4.01))
    assert rates.step.values.tolist() == [8, 16, 32, 64, 100, 200, 400, 800]
    assert rates.sel(step=[8, 16, 32, 64, 100]).values == pytest.approx(3.0)
    assert rates.sel(step=[400, 800]).values == pytest.approx(0.0, abs=1e-12)
    # Of three points at even distances ln 2, the outer ones decide.
    assert log_step_rate(curve.isel(step=[1, 2, 3]), np.log(4) - 1e-9).size == 0
    assert log_step_rate(curve[:2]).size == 0


@pytest.mark.parametrize("reads", [detect_snap, log_step_rate])
def test_one_number_a_step_is_asked_for(reads: Any) -> None:
    with pytest.raises(ValueError, match=f"{reads.__name__} reads one number a step.*average over the other axes"):
        reads(xr.DataArray(np.zeros((3, 2)), dims=("step", "head")))


def test_a_width_of_nothing_is_told() -> None:
    with pytest.raises(ValueError, match=r"width=0\.0 must be above 0"):
        log_step_rate(series(np.zeros(5)), width=0.0)


def entropy(level: float, heads: int = 1) -> np.ndarray:
    """Entropy that falls from 1 in log step until step 40, to a level, and stays."""
    x = np.log1p(np.arange(600)).clip(None, np.log(40))
    return np.tile((1 - (1 - level) * x / x[-1])[:, None, None], (1, 1, heads))


LOSS = 3 - 0.2 * np.log1p(np.arange(600))


def test_a_snap_after_a_long_scan_is_told_for_information(told: Any) -> None:
    (finding,) = told(AttentionSnap, {"scan/entropy": entropy(0.5), "loss": LOSS})
    assert (finding.id, finding.severity, finding.where) == ("attention-snap", "info", "layer 0")
    assert finding.step == pytest.approx(40, rel=0.1)
    assert finding.evidence["entropy_kept"] == pytest.approx(0.5, abs=0.01)
    assert "outside" not in finding.message


def test_attention_frozen_while_dense_and_the_loss_falls_is_a_warning(told: Any) -> None:
    (finding,) = told(AttentionSnap, {"scan/entropy": entropy(0.9, heads=4), "loss": LOSS})
    assert finding.severity == "warning"
    assert "froze it early" in finding.message
    assert "outside the assumptions" in finding.message
    assert "attention_decoder_param_groups(model, lr, decoder_multiplier=0.2)" in finding.remedy


def test_dense_attention_at_the_end_of_learning_is_not_early(told: Any) -> None:
    (finding,) = told(AttentionSnap, {"scan/entropy": entropy(0.9), "loss": np.full(600, 2.0)})
    assert finding.severity == "info"


@pytest.mark.parametrize("seed", range(2))
def test_scanning_still_or_never_moved_attention_is_silent(told: Any, seed: int) -> None:
    noise = 0.01 * np.random.default_rng(seed).normal(size=(600, 2, 2))
    still = 1 - 0.1 * np.log1p(np.arange(600))[:, None, None] + noise
    assert told(AttentionSnap, {"scan/entropy": still, "loss": LOSS}) == []
    assert told(AttentionSnap, {"scan/entropy": 0.9 + noise, "loss": LOSS}) == []
