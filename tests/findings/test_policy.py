"""Advantages of one sign are told, and only those."""

from typing import Any

import numpy as np

from dynascope.findings.policy import OneSidedAdvantages

RANDOM = np.random.default_rng(0)


def told_of(told: Any, up: np.ndarray, down: np.ndarray) -> list[tuple[str, int]]:
    found = told(OneSidedAdvantages, {"advantage/pushed_up": up, "advantage/pushed_down": down})
    return [(one.id, one.step) for one in found]


def test_an_objective_that_pushes_both_ways_is_silent(told: Any) -> None:
    up = RANDOM.uniform(0.2, 0.6, 60)
    assert told_of(told, up, 1 - up) == []
    assert told_of(told, np.zeros(60), np.zeros(60)) == []  # nothing to learn: all rewards alike
    assert told_of(told, np.full(60, 0.004), np.full(60, 0.05)) == []  # hardly anything is pushed at all


def test_pushing_down_alone_is_told_once_at_its_beginning(told: Any) -> None:
    down = RANDOM.uniform(0.4, 0.9, 60)
    up = np.where(np.arange(60) < 20, 0.3, 0.0)
    assert told_of(told, up, down) == [("one-sided-advantages-down", 20)]
    assert told_of(told, down, np.zeros(60)) == [("one-sided-advantages-up", 0)]


def test_a_few_rollouts_of_one_sign_are_chance(told: Any) -> None:
    up = np.where(np.arange(60) % 9 == 0, 0.3, 0.0)
    assert told_of(told, up, np.full(60, 0.5)) == []
