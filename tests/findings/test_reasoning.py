"""Guessing and saturated rewards: healthy runs are silent, sick ones speak."""

import numpy as np

from dynascope.findings.reasoning import GuessingDetector, RewardSaturationDetector

LOOKS = 60


def curves(start: float, end: float, seed: int) -> np.ndarray:
    rise = np.clip((np.arange(LOOKS) - 10) / 30, 0, 1)[:, None]
    noise = 0.02 * np.random.default_rng(seed).standard_normal((LOOKS, 2))
    return np.array([start, start + 0.2]) + (end - start) * rise * np.array([1.0, 0.5]) + noise


def test_guessing(told) -> None:  # type: ignore[no-untyped-def]
    names = GuessingDetector.reads
    for start, end in ((0.2, 0.6), (0.2, 0.2)):
        both = {names[0]: curves(start, end, 0), names[1]: curves(start - 0.1, end - 0.1, 1)}
        assert told(GuessingDetector, both) == []
    (finding,) = told(GuessingDetector, {names[0]: curves(0.2, 0.6, 0), names[1]: curves(0.1, 0.1, 1)})
    assert finding.where == "k k 0"  # the steepest: the first K
    assert 12 < finding.step < 40
    assert finding.evidence["pass_rise"] > 0.1 > finding.evidence["cot_rise"]


def test_curves_that_cross_the_starts(told) -> None:  # type: ignore[no-untyped-def]
    """At K = 1 answers come right more often; at a large K the start's are lost, with or without chains."""
    crossing = np.stack([curves(0.2, 0.5, 0)[:, 0], curves(0.9, 0.6, 1)[:, 0]], 1)
    flat, falling = curves(0.2, 0.2, 2), np.stack([curves(0.2, 0.2, 2)[:, 0], curves(0.6, 0.3, 3)[:, 0]], 1)
    both = told(GuessingDetector, dict(zip(GuessingDetector.reads[:2], (crossing, flat), strict=True)))
    assert {one.id: one.where for one in both} == {"guessing": "k k 0", "pass-at-k-crossing": "k k 1"}
    (cross,) = [one for one in both if one.where == "k k 1"]
    assert cross.evidence["pass_rise"] < -0.1 < cross.evidence["cot_rise"]
    worse = np.stack([curves(0.5, 0.2, 0)[:, 0], crossing[:, 1]], 1)
    for answers, chains in ((crossing, falling), (worse, flat)):
        found = told(GuessingDetector, dict(zip(GuessingDetector.reads[:2], (answers, chains), strict=True)))
        assert "pass-at-k-crossing" not in [one.id for one in found]


def test_guessing_from_a_number_for_each_k(told) -> None:  # type: ignore[no-untyped-def]
    answers, chains = curves(0.2, 0.6, 0), curves(0.1, 0.1, 1)
    each = {f"reasoning/pass_at_k/{k}": answers[:, place] for place, k in enumerate((2, 8))}
    each |= {f"reasoning/cot_pass_at_k/{k}": chains[:, place] for place, k in enumerate((2, 8))}
    (finding,) = told(GuessingDetector, each)
    (whole,) = told(GuessingDetector, {"reasoning/pass_at_k": answers, "reasoning/cot_pass_at_k": chains})
    assert (finding.where, finding.step, finding.evidence) == ("k 2", whole.step, whole.evidence)


def test_reward_saturation(told) -> None:  # type: ignore[no-untyped-def]
    names = RewardSaturationDetector.reads
    full = np.clip(np.arange(LOOKS) / 20, 0.2, 0.99)
    rising = np.linspace(0.4, 0.85, LOOKS)
    for answer, chain in ((full, rising), (full, np.full(LOOKS, 0.97)), (np.full(LOOKS, 0.6), np.full(LOOKS, 0.7))):
        assert told(RewardSaturationDetector, {names[0]: answer, names[1]: chain}) == []
    (finding,) = told(RewardSaturationDetector, {names[0]: full, names[1]: np.full(LOOKS, 0.7)})
    assert 20 <= finding.step < LOOKS
    assert finding.evidence["chain_correct"] < 0.71
