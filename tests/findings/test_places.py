"""Findings on activations, attention, curvature and speed."""

from typing import Any

import numpy as np
import pytest

from dynascope.findings.activations import DeadUnits
from dynascope.findings.attention import EntropyCollapse
from dynascope.findings.curvature import EdgeOfStability
from dynascope.findings.speed import ThroughputLoss


def test_some_zeros_are_no_dead_units(told: Any) -> None:
    assert told(DeadUnits, {"activations/dead_fraction": np.tile([0.0, 0.3], (20, 1))}) == []


def test_dead_layer_is_told_by_its_name_once(told: Any) -> None:
    values = np.zeros((20, 2))
    values[8:, 1] = 0.9
    (finding,) = told(DeadUnits, {"activations/dead_fraction": values})
    assert (finding.step, finding.where) == (8, "activation 1")
    assert finding.evidence["dead_share"] == 0.9


def entropy(size: int = 40) -> np.ndarray:
    """Two layers of four heads whose entropy falls from nearly 1 to a half, as in a run that learns; one head is sharp."""
    falling = 0.5 + 0.45 * np.exp(-np.arange(size) / 10)
    values = np.tile(falling[:, None, None], (1, 2, 4))
    values[10:, 0, 0] = 0.05
    return values


def test_learning_and_one_sharp_head_are_healthy(told: Any) -> None:
    assert told(EntropyCollapse, {"attention/entropy_normalized": entropy(), "gradients/total_norm": np.ones(40)}) == []


def test_collapsed_layer_is_told_where_it_began(told: Any) -> None:
    values = entropy()
    values[25:, 1] = 0.02
    (finding,) = told(EntropyCollapse, {"attention/entropy_normalized": values, "gradients/total_norm": np.ones(40)})
    assert (finding.step, finding.where, finding.severity) == (25, "layer 1", "warning")
    assert finding.evidence["entropy_normalized"] == pytest.approx(0.02)


def test_collapse_of_one_head_while_gradients_grow_is_critical(told: Any) -> None:
    values, norms = entropy(), np.ones(40)
    values[25:, 1, 2] = 0.03
    norms[25:] = 5.0
    findings = told(EntropyCollapse, {"attention/entropy_normalized": values, "gradients/total_norm": norms})
    assert ("head 2 of layer 1", "critical", 25) in [
        (finding.where, finding.severity, finding.step) for finding in findings
    ]


def test_layer_that_was_always_sharp_is_silent(told: Any) -> None:
    assert told(EntropyCollapse, {"attention/entropy_normalized": np.full((30, 1, 2), 0.05)}) == []


def test_sharpness_below_the_edge_is_silent_and_at_the_edge_told(told: Any) -> None:
    sharpness, edge = np.linspace(5, 40, 36), np.full(36, 20.0)
    assert told(EdgeOfStability, {"curvature/sharpness": sharpness[:12], "curvature/edge": edge[:12]}) == []
    (finding,) = told(EdgeOfStability, {"curvature/sharpness": sharpness, "curvature/edge": edge})
    assert finding.step == 13  # 0.9 of 20 is 18
    assert finding.evidence["edge"] == 20.0


def test_adam_has_another_edge(told: Any) -> None:
    values = {
        "curvature/sharpness": np.full(10, 50.0),
        "curvature/edge": np.full(10, 20.0),
        "adam/update_rms": np.ones((10, 2)),
    }
    assert told(EdgeOfStability, values) == []


@pytest.mark.parametrize("seed", range(5))
def test_uneven_steps_are_no_slowdown(told: Any, seed: int) -> None:
    seconds = 0.1 * np.exp(0.3 * np.random.default_rng(seed).normal(size=600))
    seconds[::50] += 1.0  # evaluations
    assert told(ThroughputLoss, {"time/step": seconds}) == []


def test_lasting_slowdown_is_told(told: Any) -> None:
    seconds = np.concatenate([np.full(200, 0.1), np.full(200, 0.25)])
    (finding,) = told(ThroughputLoss, {"time/step": seconds})
    assert finding.step == pytest.approx(225, abs=2)  # where the median of 50 steps has turned
    assert finding.evidence == {"now": pytest.approx(0.25), "best": pytest.approx(0.1)}
