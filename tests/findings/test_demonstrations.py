"""Fine-tuning that becomes rare is healthy; fine-tuning without an end is told."""

import numpy as np
import pytest

from dynascope.findings.demonstrations import STEP, ConstantFineTuning


def adaptive(num_steps: int = 300) -> np.ndarray:
    """At every step at first, ever more seldom later."""
    random = np.random.default_rng(0)
    return (random.random(num_steps) < np.exp(-np.arange(num_steps) / 60)).astype(float)


@pytest.mark.parametrize(
    "values",
    [adaptive(), np.zeros(200), np.tile([0.0] * 7 + [1.0], 40), np.ones(80), np.repeat([1.0, 0.0], [80, 120])],
    ids=["relift", "plain RL", "every eighth", "short", "early only"],
)
def test_silent(told, values: np.ndarray) -> None:  # type: ignore[no-untyped-def]
    assert told(ConstantFineTuning, {STEP: values}) == []


@pytest.mark.parametrize("share", [1.0, 0.95])
def test_without_an_end_it_is_told_once(told, share: float) -> None:  # type: ignore[no-untyped-def]
    values = (np.random.default_rng(1).random(250) < share).astype(float)
    (finding,) = told(ConstantFineTuning, {STEP: values})
    assert 50 <= finding.step < 120
    assert finding.evidence["share"] >= 0.9
    assert "becomes rarer" not in finding.message
    assert "batch_size" in finding.remedy


def test_it_speaks_when_it_begins_late(told) -> None:  # type: ignore[no-untyped-def]
    (finding,) = told(ConstantFineTuning, {STEP: np.repeat([0.0, 1.0], [120, 150])})
    assert 160 <= finding.step <= 175
