"""RL from rewards alone: growth with accuracy is healthy; growth into the limit, form, and useless questions are told."""

from typing import Any

import numpy as np
import pytest

from dynascope.findings import zero_rl as z


def course(first: float, last: float, *, noise: float = 0.0, num_steps: int = 80, seed: int = 0) -> np.ndarray:
    """Level for 15 steps, then a line."""
    progress = np.clip((np.arange(num_steps) - 15) / (num_steps - 15), 0, 1)
    return first + (last - first) * progress + noise * np.random.default_rng(seed).standard_normal(num_steps)


GIBBERISH = {
    z.LENGTH: course(300, 2000, noise=30),
    z.TRUNCATED: course(0.02, 0.6, noise=0.01),
    z.CORRECT: course(0.1, 0.08, noise=0.02),
}
REASONING = {
    z.LENGTH: course(300, 1200, noise=30),
    z.TRUNCATED: course(0.01, 0.03, noise=0.01),
    z.CORRECT: course(0.2, 0.5, noise=0.02),
}
LONG_AND_RIGHT = {**GIBBERISH, z.CORRECT: course(0.1, 0.6, noise=0.02)}
ALWAYS_CUT = {z.LENGTH: course(300, 300), z.TRUNCATED: course(0.3, 0.3), z.CORRECT: course(0.1, 0.1)}
SHRINKING = {z.LENGTH: course(300, 80, noise=5), z.CORRECT: course(0.4, 0.3, noise=0.02)}
CONCISE = {z.LENGTH: course(300, 80, noise=5), z.CORRECT: course(0.4, 0.7, noise=0.02)}
FORM = {z.REWARD: course(-0.9, -0.1), z.FORMATTED: course(0.1, 0.95), z.CORRECT: course(0.15, 0.15, noise=0.01)}
FORM_AND_RIGHT = {**FORM, z.CORRECT: course(0.15, 0.6)}
NO_FORM = {z.REWARD: course(0.1, 0.2), z.FORMATTED: course(0.5, 0.5), z.CORRECT: course(0.15, 0.15)}
HARD = {z.LEARNABLE: course(0.05, 0.05, noise=0.01), z.SOLVED: course(0, 0), z.UNSOLVED: course(0.95, 0.95)}
EASY = {z.LEARNABLE: np.maximum(course(0.6, -0.6), 0.02), z.SOLVED: course(0.3, 0.97), z.UNSOLVED: course(0.1, 0.01)}
SUITABLE = {z.LEARNABLE: course(0.5, 0.4, noise=0.05), z.SOLVED: course(0.1, 0.5), z.UNSOLVED: course(0.4, 0.1)}
ERRATIC = {z.STOPPED: 200 + 60 * course(0, 1) * (-1.0) ** np.arange(80), z.TRUNCATED: course(0.02, 0.4, noise=0.01)}
STEADY = {**ERRATIC, z.STOPPED: course(200, 800, noise=10)}
WORDS = {z.REFLECTIONS: course(0.2, 2.0), z.BEHAVIOURS: course(0.3, 0.3, noise=0.01)}
THOUGHT = {z.REFLECTIONS: course(0.2, 2.0), z.BEHAVIOURS: course(0.1, 0.7)}


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (z.UnhealthyGrowth, REASONING),
        (z.UnhealthyGrowth, LONG_AND_RIGHT),
        (z.UnhealthyGrowth, ALWAYS_CUT),
        (z.LengthCollapse, CONCISE),
        (z.LengthCollapse, {**SHRINKING, z.LENGTH: course(300, 200, noise=5)}),
        (z.FormatPressure, FORM_AND_RIGHT),
        (z.FormatPressure, NO_FORM),
        (z.ErraticStops, STEADY),
        (z.ErraticStops, {**ERRATIC, z.TRUNCATED: course(0.02, 0.03)}),
        (z.ErraticStops, {**ERRATIC, z.STOPPED: 200 + 60 * (-1.0) ** np.arange(80)}),
        (z.UnsuitableQuestions, SUITABLE),
        (z.KeywordIllusion, THOUGHT),
        (z.KeywordIllusion, {z.REFLECTIONS: course(0.01, 0.03), z.BEHAVIOURS: course(0.3, 0.3)}),
    ],
)
def test_silent(told, kind: Any, values: dict[str, np.ndarray]) -> None:  # type: ignore[no-untyped-def]
    assert told(kind, values) == []


@pytest.mark.parametrize(
    ("kind", "values", "id_"),
    [
        (z.UnhealthyGrowth, GIBBERISH, "unhealthy-growth"),
        (z.ErraticStops, ERRATIC, "erratic-stops"),
        (z.LengthCollapse, SHRINKING, "length-collapse"),
        (z.FormatPressure, FORM, "format-pressure"),
        (z.UnsuitableQuestions, HARD, "questions-too-hard"),
        (z.UnsuitableQuestions, EASY, "questions-too-easy"),
        (z.KeywordIllusion, WORDS, "keyword-illusion"),
    ],
)
def test_told_once_and_well_before_the_end(told, kind: Any, values: dict[str, np.ndarray], id_: str) -> None:  # type: ignore[no-untyped-def]
    (finding,) = told(kind, values)
    assert finding.id == id_
    assert 15 < finding.step < 75
    assert finding.remedy
    assert all(np.isfinite(value) for value in finding.evidence.values())


def test_one_bad_rollout_is_no_growth(told) -> None:  # type: ignore[no-untyped-def]
    values = {name: one.copy() for name, one in ALWAYS_CUT.items()}
    values[z.TRUNCATED][40:43] = 1.0
    values[z.LENGTH][40:43] = 5000
    assert told(z.UnhealthyGrowth, values) == []


def test_what_is_no_number_is_left_out(told) -> None:  # type: ignore[no-untyped-def]
    values = {name: one.copy() for name, one in GIBBERISH.items()}
    values[z.CORRECT][20:25] = np.nan
    assert [one.id for one in told(z.UnhealthyGrowth, values)] == ["unhealthy-growth"]


def test_a_series_that_is_told_more_seldom_is_waited_for(told) -> None:  # type: ignore[no-untyped-def]
    values = {**WORDS, z.BEHAVIOURS: WORDS[z.BEHAVIOURS][::2]}
    assert [one.id for one in told(z.KeywordIllusion, values, {z.BEHAVIOURS: 2})] == ["keyword-illusion"]
