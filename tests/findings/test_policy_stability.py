"""Ratios, advantages and rewards: healthy runs are silent, sick ones speak at the right step, once."""

import numpy as np
import pytest
import torch

from dynascope.findings.policy_stability import AdvantageOutliers, OneSidedRewards, PreClipHides, RatioExplosion
from dynascope.rl.advantage_filter import AdvantageFilter
from dynascope.rl.batch import PolicyBatch
from dynascope.rl.presets import preset

HEALTHY = {RatioExplosion: 2e-4, AdvantageOutliers: 3.0, OneSidedRewards: 0.8, PreClipHides: 0.005}
SICK = {RatioExplosion: 0.02, AdvantageOutliers: 5.6, OneSidedRewards: 0.97, PreClipHides: 0.03}


@pytest.mark.parametrize("kind", list(HEALTHY))
def test_healthy_is_silent_and_sick_speaks(kind, told) -> None:  # type: ignore[no-untyped-def]
    name = kind.reads[0]
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


def test_rewards_are_one_sided_on_the_low_side_too(told) -> None:  # type: ignore[no-untyped-def]
    (finding,) = told(OneSidedRewards, {"rollout/correct": np.full(30, 0.05)})
    assert finding.message.startswith("95% of the completions are wrong: successes are 4.4 deviations")
    assert told(OneSidedRewards, {"rollout/correct": np.full(30, 0.12)}) == []


def test_with_a_pre_clip_no_pre_clip_is_advised(told) -> None:  # type: ignore[no-untyped-def]
    exploded = {"policy/ratio/exploded": np.full(30, 0.02)}
    assert "pre_clip" in told(RatioExplosion, exploded)[0].remedy
    assert "num_passes=1" in told(RatioExplosion, {**exploded, "policy/pre_clipped": np.zeros(30)})[0].remedy


@pytest.mark.parametrize(("kind", "value"), [(RatioExplosion, 0.02), (AdvantageOutliers, 6.0), (OneSidedRewards, 0.97)])
def test_remedies_work_when_pasted_with_one_completion_a_prompt(kind, value, told) -> None:  # type: ignore[no-untyped-def]
    (finding,) = told(kind, {kind.reads[0]: np.full(30, value)})
    names = {"objective": preset("reinforce_pp"), "AdvantageFilter": AdvantageFilter}
    exec(finding.remedy, names)
    rewards = torch.tensor([1.0] * 31 + [0.0])
    zeros = torch.zeros(32, 1)
    batch = PolicyBatch(
        group_ids=torch.arange(32), rewards=rewards, mask=torch.ones(32, 1).bool(), log_probs=zeros,
        behaviour_log_probs=zeros, ref_log_probs=zeros,
    )  # fmt: skip
    told_advantage = names["objective"].advantages(batch)
    assert bool(told_advantage.isfinite().all())
    assert bool(told_advantage[-1].any()) == (kind is OneSidedRewards)
