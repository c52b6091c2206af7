"""Each claim of r1-reward tells a world with the effect from one without; the task is what it says; the study runs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from every_study import StudyTests
from fabricated import fabricate

from dynascope.rl.presets import preset
from dynascope.rl.tasks.arithmetic import encode
from dynascope.studies import Runs, Verdict, load_study
from dynascope.studies.r1_reward import method
from dynascope.studies.r1_reward.judging import Judging, Pair, SumReward
from dynascope.studies.r1_reward.method import Arm, Config

STUDY = load_study("r1-reward")


def world(folder: Path, seed: int, *, is_effect: bool) -> Runs:
    """One seed's records in a world where the paper is right about everything, or about nothing."""
    noise = 0.001 * seed

    def judge(accuracy: float, consistent: float, vote: float) -> dict[str, Any]:
        ends = {"accuracy": accuracy, "consistent": consistent, "vote": vote}
        ends |= {"vote_more": vote + 0.05, "format": 0.995} if is_effect else {"vote_more": vote - 0.05, "format": 0.9}
        return {
            f"judge/{name}": np.array([0.5, end + noise * (2 if name == "vote" else 1)]) for name, end in ends.items()
        }

    def easy(high: float, norm: float) -> dict[str, Any]:
        return {"advantage/used_max_abs": np.full(10, high + noise), "gradient_norm": np.full(10, norm + noise)}

    both, paid = (
        (judge(0.8, 0.6, 0.85), judge(0.8, 0.95, 0.9)) if is_effect else (judge(0.7, 0.6, 0.7), judge(0.6, 0.5, 0.5))
    )
    broken, whole = np.array([1.0, 0.0]), np.ones(10)
    return fabricate(
        folder,
        {
            "drift": {"finite": broken if is_effect else whole},
            "drift-pre-clip": {"finite": whole if is_effect else broken},
            "easy": easy(5.6, 2.0) if is_effect else easy(2.0, 1.0),
            "easy-filter": easy(2.9, 1.0) if is_effect else easy(4.0, 1.5),
            "reinforce_pp": judge(0.8, 0.6, 0.85) if is_effect else judge(0.8, 0.6, 0.8),
            "both": both,
            "cold": judge(0.3 if is_effect else 0.8, 0.5, 0.5),
            "hard": judge(0.85 if is_effect else 0.5, 0.5, 0.5),
            "consistency": paid,
        },
    )


class TestStudy(StudyTests):
    study = STUDY
    world = staticmethod(world)
    num_figures = 4

    def test_smoke_preset_breaks_what_must_break(self, smoke: Verdict) -> None:
        measured = {one.claim.id: one.measured for one in smoke.judgements}
        assert (measured["C1-broken"], measured["C1-held"]) == (1, 0)


def test_both_parts_are_the_preset() -> None:
    both, known = Arm(pre_clip=True, filter=True).objective(), preset("stable_reinforce")
    assert both.pre_clip == known.pre_clip
    assert [type(one) for one in both.post] == [type(one) for one in known.post]
    assert Arm().objective() == preset("reinforce_pp")


def test_pairs_have_the_right_result_on_either_side_and_rewards_follow_the_table() -> None:
    pairs = Judging().draw(4000, torch.Generator().manual_seed(0))
    assert all((one.first == one.one + one.other) != (one.second == one.one + one.other) for one in pairs)
    assert 0.47 < sum(one.label == 1 for one in pairs) / 4000 < 0.53
    consistent = [one.is_consistent(one.completion) for one in pairs]
    assert 0.72 < sum(consistent) / 4000 < 0.78
    assert all(one.is_consistent(f"{one.first:02}>1$") and not one.is_consistent(f"{one.first:02}>2$") for one in pairs)
    pair = Pair(3, 9, 13, 12, "")
    texts = ["12>2$", "13>2$", "12>1$", "7>2$", "12>2", ""]
    assert SumReward(with_consistency=True)(texts, problem=[pair] * 6) == [2.0, 1.0, 0.5, 0.5, 0.0, 0.0]
    assert SumReward(with_consistency=False)(texts[:2], problem=[pair] * 2) == [1.5, 1.5]
    obvious = Judging(is_obvious=True).draw(50, torch.Generator().manual_seed(0))
    assert all(99 in (one.first, one.second) for one in obvious)


def test_hard_pairs_are_those_not_right_at_the_first_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    task, config = Judging(), Config(num_prompts=2)
    pairs = task.draw(32, torch.Generator().manual_seed(0))
    said = [
        [f"00>{pair.label if place % 3 else 3 - pair.label}$"] * 4 if place % 2 else [f"00>{pair.label}$"] * 4
        for place, pair in enumerate(pairs)
    ]
    rollout = SimpleNamespace(tokens=encode([text for four in said for text in four])[0])
    monkeypatch.setattr(method, "draw_rollout", lambda *_: ([pair for pair in pairs for _ in range(4)], rollout))
    found = method.hard_pairs(config, torch.nn.Identity(), task)
    assert found.pairs == tuple(pair for place, pair in enumerate(pairs) if place % 2 and not place % 3)
    assert set(found.draw(200, torch.Generator().manual_seed(0))) == set(found.pairs)


@pytest.mark.parametrize("settings", [{"num_steps": 0}, {"width": 30}, {"num_prompts": 1}])
def test_impossible_settings_are_told(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Config(**settings)
    with pytest.raises(ValueError, match="chances"):
        Judging(beside=1.5)
