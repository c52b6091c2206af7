"""Gradients that explode or vanish, updates out of proportion, and what comes before a divergence."""

from typing import Any

import numpy as np
import pytest

from dynascope.findings.gradients import DivergencePrecursor, ExplodingGradients, UpdateRatio, VanishingGradients


def norms(seed: int = 0, size: int = 300) -> np.ndarray:
    """Gradient norms of a healthy run: log-normal, falling slowly."""
    return 2 * (1 + np.arange(size) / 50) ** -0.3 * np.exp(0.3 * np.random.default_rng(seed).normal(size=size))


@pytest.mark.parametrize("seed", range(10))
def test_healthy_norms_are_silent(told: Any, seed: int) -> None:
    assert told(ExplodingGradients, {"gradients/total_norm": norms(seed)}) == []
    by_parameter = norms(seed)[:, None] * np.linspace(0.5, 2, 9)
    assert told(VanishingGradients, {"gradients/norm": by_parameter, "gradients/total_norm": norms(seed)}) == []


def test_explosion_is_told_where_it_began(told: Any) -> None:
    values = norms()
    values[200:] *= 50
    (finding,) = told(ExplodingGradients, {"gradients/total_norm": values})
    assert (finding.id, finding.step, finding.severity) == ("exploding-gradients", 200, "warning")
    assert finding.evidence["norm"] > 10 * finding.evidence["usual"]


def test_overflow_is_critical(told: Any) -> None:
    values = norms()
    values[50] = np.inf
    (finding,) = told(ExplodingGradients, {"gradients/total_norm": values})
    assert (finding.step, finding.severity) == (50, "critical")


def test_norms_before_clipping_are_preferred(told: Any) -> None:
    unclipped = norms()
    unclipped[200:] *= 50
    findings = told(
        ExplodingGradients, {"gradients/total_norm_unclipped": unclipped, "gradients/total_norm": np.ones(300)}
    )
    assert [finding.series for finding in findings] == ["gradients/total_norm_unclipped"]


def test_one_large_gradient_is_no_explosion(told: Any) -> None:
    values = norms()
    values[200:202] *= 50
    assert told(ExplodingGradients, {"gradients/total_norm": values}) == []


def test_gradients_that_vanish_with_depth_are_told(told: Any) -> None:
    by_parameter = np.tile(10.0 ** np.linspace(-9, 0, 9), (10, 1))
    (finding,) = told(VanishingGradients, {"gradients/norm": by_parameter})
    assert (finding.id, finding.step) == ("vanishing-gradients", 0)
    assert finding.evidence["early"] / finding.evidence["late"] < 1e-5


def test_gradients_that_vanish_altogether_are_told(told: Any) -> None:
    values = np.concatenate([np.ones(10), np.full(5, 1e-12)])
    (finding,) = told(VanishingGradients, {"gradients/total_norm": values})
    assert finding.step == 10


def ratios(level: float, size: int = 30) -> np.ndarray:
    return level * np.exp(np.random.default_rng(0).normal(size=(size, 12)))


def test_usual_ratios_are_silent(told: Any) -> None:
    assert told(UpdateRatio, {"updates/ratio": ratios(1e-3), "learning_rate": np.full((30, 1), 1e-3)}) == []


def test_overwritten_weights_are_told(told: Any) -> None:
    (finding,) = told(UpdateRatio, {"updates/ratio": ratios(0.5), "learning_rate": np.full((30, 1), 1.0)})
    assert (finding.id, finding.step) == ("update-ratio", 0)
    assert "large" in finding.message
    assert finding.remedy.endswith("*= 0.1")


def test_frozen_weights_are_told_only_while_the_lr_is_near_its_peak(told: Any) -> None:
    values = np.concatenate([ratios(1e-3), ratios(1e-8)])
    constant = told(UpdateRatio, {"updates/ratio": values, "learning_rate": np.full((60, 1), 1e-3)})
    decayed = told(UpdateRatio, {"updates/ratio": values, "learning_rate": np.repeat([[1e-3], [1e-8]], 30, 0)})
    assert [(finding.step, "small" in finding.message) for finding in constant] == [(30, True)]
    assert decayed == []


def test_stale_second_moment_with_growing_gradients_is_a_precursor(told: Any) -> None:
    rms = np.ones((100, 4))
    rms[60:64, 2] = 4.0
    growing = np.ones(100)
    growing[60:64] = 10.0
    (finding,) = told(DivergencePrecursor, {"adam/update_rms": rms, "gradients/total_norm": growing})
    assert (finding.id, finding.step, finding.where) == ("divergence-precursor", 60, "parameter 2")
    assert finding.evidence["update_rms"] == 4.0
    assert told(DivergencePrecursor, {"adam/update_rms": rms, "gradients/total_norm": np.ones(100)}) == []
    assert told(DivergencePrecursor, {"adam/update_rms": np.ones((100, 4)), "gradients/total_norm": growing}) == []
