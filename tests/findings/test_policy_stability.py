"""Ratios, advantages and rewards: healthy runs are silent, sick ones speak at the right step, once."""

import numpy as np
import pytest

from dynascope.findings.policy_stability import AdvantageOutliers, OneSidedRewards, RatioExplosion

HEALTHY = {RatioExplosion: 2e-4, AdvantageOutliers: 3.0, OneSidedRewards: 0.8}
SICK = {RatioExplosion: 0.02, AdvantageOutliers: 5.6, OneSidedRewards: 0.97}


@pytest.mark.parametrize("kind", list(HEALTHY))
def test_healthy_is_silent_and_sick_speaks(kind, told) -> None:  # type: ignore[no-untyped-def]
    (name,) = kind.reads
    noise = 0.02 * np.random.default_rng(0).random(60)
    healthy = HEALTHY[kind] * (1 + noise)
    assert told(kind, {name: healthy}) == []
    once = healthy.copy()
    once[[10, 30]] = SICK[kind]
    assert told(kind, {name: once}) == []
    sick = healthy.copy()
    sick[25:] = SICK[kind]
    (finding,) = told(kind, {name: sick})
    assert finding.step == 25
    assert finding.series == name
