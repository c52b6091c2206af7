"""Heads that learn to descend on their context are told, and heads that never will."""

from typing import Any

import numpy as np
import pytest
import torch

from dynascope.findings.circuits import InContextDescent
from dynascope.theory.in_context_regression import simulate_head_flow


def trained(omega: tuple[float, ...], mu: tuple[float, ...], first: float = -1) -> dict[str, np.ndarray]:
    """60 looks at one layer's heads under the gradient flow of theory, from t = 10^first, while KQ becomes diagonal."""
    start = [torch.tensor(one, dtype=torch.float64) for one in (omega, mu)]
    flow = simulate_head_flow(*start, 5, 40, 0.1, times=torch.logspace(first, 4, 60, dtype=torch.float64))
    fading = 0.07 + np.exp(-np.arange(60) / 5.0)
    return {
        "circuits/omega": flow.omega.numpy()[:, None],
        "circuits/mu": flow.mu.numpy()[:, None],
        "circuits/off_diagonal": np.repeat(fading[:, None, None], len(omega), 2),
    }


@pytest.mark.parametrize("heads", [2, 4])
def test_heads_that_cancel_are_told_once_they_are_of_one_size(told: Any, heads: int) -> None:
    series = trained((0.05, -0.02, 0.01, -0.04)[:heads], (0.03, -0.05, 0.02, -0.01)[:heads])
    (finding,) = told(InContextDescent, series)
    assert (finding.id, finding.severity, finding.where) == ("in-context-descent", "info", "layer 0")
    at = series["circuits/omega"][finding.step, 0]
    assert np.abs(at).std() / np.abs(at).mean() <= 0.1
    # Growth is over by then, and the flow is far from its end.
    assert 10 < finding.step < 50


def test_heads_of_one_sign_are_told(told: Any) -> None:
    (finding,) = told(InContextDescent, trained((0.05, 0.02), (0.03, 0.05), first=0.5))
    assert (finding.id, finding.severity) == ("one-sided-heads", "warning")
    assert finding.evidence["zero_sum"] == 1
    assert finding.evidence["off_diagonal"] < 0.5
    assert "opposite_small_identity" in finding.remedy


def test_heads_of_one_sign_that_still_move_are_not_told(told: Any) -> None:
    """One head turns its sign in the end, slowly: by a tenth of the other a doubling of time."""
    steps = np.arange(60)
    turning = 0.5 - 0.15 * np.log2(1 + steps)
    omega = np.stack([np.full(60, 0.5), turning], 1)[:, None]
    series = {
        "circuits/omega": omega,
        "circuits/mu": 3 * omega,
        "circuits/off_diagonal": np.full(omega.shape, 0.1),
    }
    assert told(InContextDescent, series) == []
    series["circuits/omega"][:, :, 1] = 0.5
    (finding,) = told(InContextDescent, series)
    assert finding.step == 0


def test_layers_of_a_transformer_are_left_alone(told: Any) -> None:
    random = np.random.default_rng(0)
    shape = 50, 3, 4
    series = {
        "circuits/omega": np.abs(random.normal(size=shape)),
        "circuits/mu": random.normal(size=shape),
        "circuits/off_diagonal": random.uniform(0.9, 1.0, size=shape),
    }
    assert told(InContextDescent, series) == []
    # A head missing from a layer, and a single head, say nothing either.
    series["circuits/off_diagonal"][:] = 0.01
    for name in ("circuits/omega", "circuits/mu"):
        series[name][:, :, 1:] = np.nan
    assert told(InContextDescent, series) == []


def test_a_dummy_head_does_not_count(told: Any) -> None:
    series = trained((0.05, -0.04), (0.03, -0.05))
    idle = {"circuits/omega": 7.0, "circuits/mu": 1e-9, "circuits/off_diagonal": 1.0}
    with_idle = {name: np.concatenate([values, np.full((60, 1, 1), idle[name])], 2) for name, values in series.items()}
    assert [finding.id for finding in told(InContextDescent, with_idle)] == ["in-context-descent"]
