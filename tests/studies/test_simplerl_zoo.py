"""Each claim of simplerl-zoo tells a world with the effect from one without; its task and bandits; and it runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from every_study import StudyTests
from fabricated import fabricate

from dynascope.rl.tasks.reward_rules import RewardRule
from dynascope.studies import Runs, load_study
from dynascope.studies.harness.verdict import judge
from dynascope.studies.simplerl_zoo.bandits import difficulty_bandit, format_bandit
from dynascope.studies.simplerl_zoo.claims import TRAINED
from dynascope.studies.simplerl_zoo.method import Config
from dynascope.studies.simplerl_zoo.task import CheckLabeller, StyledArithmetic, StyledSum, is_boxed

STUDY = load_study("simplerl-zoo")
CLAIMS = {claim.id: claim for claim in STUDY.claims}


def world(folder: Path, seed: int, *, is_effect: bool) -> Runs:
    """One seed's records in a world where the paper is right about everything, or about nothing."""
    noise = 0.002 * seed
    arms: dict[str, dict[str, object]] = {}
    for arm in STUDY.arms:
        if "bandit" in arm:
            last = 0.91 if (arm == "format-bandit") == is_effect else 0.3
            grows = (arm == "difficulty-bandit-strong") == is_effect
            gains = [1.0, 2.0, 3.0, 4.0] if grows else [3.0, 4.0, 1.0, 0.0] if is_effect else [4.0, 3.0, 2.0, 1.0]
            if not is_effect:
                gains = [4.0, 3.0, 2.0, 1.0]
            arms[arm] = {"bandit/correct": np.linspace(0.15, last + noise, 41), "bandit/gain": np.array([gains])}
            continue
        is_bad = arm == "weak-hard"
        is_cold = arm in ("cold-short", "cold-long")
        first = 0.35 if is_cold == is_effect else 0.2
        last = {"weak-strict": 0.35, "cold-long": 0.5, "cold-short": 0.6, "weak-hard": 0.2, "weak-easy": 0.5}.get(
            arm, 0.7
        )
        if not is_effect:  # the hard run learns and nothing else does
            first, last = 0.2, 0.6 if arm == "weak-hard" else 0.15 if arm in ("weak", "middle", "strong") else 0.4
            first = 0.1 if is_cold else first
        course = np.linspace(first, last + noise, 4)
        num = 60
        cut = np.linspace(0.02, 0.5 if is_bad and is_effect else 0.02, num)
        told_of = is_bad == is_effect
        arms[arm] = {
            "benchmark/correct": course,
            "benchmark/pass_at_k": np.stack([np.linspace(one, one + 0.1, 4) for one in course]),
            "benchmark/length": np.linspace(20, 15 if (arm == "weak-easy") == is_effect else 22, 4),
            "rollout/truncated": cut,
            "rollout/behaviours": np.full(num, (0.05 if is_cold == is_effect else 0.3) + noise),
            "rollout/learnable": np.full(num, 0.02 if told_of else 0.5),
            "rollout/solved": np.full(num, 0.0),
            "rollout/unsolved": np.full(num, 0.98 if told_of else 0.5),
        }
    return fabricate(folder, arms)


class TestStudy(StudyTests):
    study = STUDY
    world = staticmethod(world)
    num_figures = 7


@pytest.mark.parametrize("is_mute", [True, False])
def test_monitors_that_are_mute_or_cry_wolf_tell_nothing_apart(is_mute: bool, tmp_path: Path) -> None:
    def records(seed: int) -> Runs:
        arms = {
            arm: {
                "benchmark/correct": np.linspace(0.2, 0.2 if arm.startswith("weak-") else 0.7, 4),
                "rollout/learnable": np.full(60, 0.5 if is_mute else 0.02),
                "rollout/solved": np.full(60, 0.0),
                "rollout/unsolved": np.full(60, 0.5 if is_mute else 0.98),
            }
            for arm in TRAINED
        }
        return fabricate(tmp_path / str(seed), arms)

    judgement = judge(CLAIMS["C4-monitors"], [records(seed) for seed in range(3)])
    assert (judgement.measured, judgement.holds) == (0.0, False)


@pytest.mark.parametrize("gains", [[4.0, 3.0, 2.0, 1.0], [3.0, 4.0, 9.0, 0.0]])
def test_the_weak_learner_has_to_gain_most_at_the_middle(gains: list[float], tmp_path: Path) -> None:
    runs = fabricate(tmp_path, {"difficulty-bandit-weak": {"bandit/gain": np.array([gains])}})
    assert judge(CLAIMS["B1-weak"], [runs, runs]).holds is False


def test_styles_are_no_matter_to_what_is_right() -> None:
    for is_box in (False, True):
        for is_check in (False, True):
            one = StyledSum(47, 85, is_box, is_check)
            checked = one.check(one.completion)
            assert checked.is_answer_right
            assert checked.is_chain_right
            assert is_boxed(one.completion) is is_box
            assert bool(CheckLabeller()([one.completion])[0, 0]) is is_check
            assert not one.check(one.completion.replace(">", ">1")).is_answer_right
    assert StyledSum(47, 85, True, True).completion == "7+5=12,4+8+1=13,132=47+85>=132$"
    assert not is_boxed("7+5=12>=12")  # never ended
    assert not bool(CheckLabeller()(["12>12=7+5$"])[0, 0])  # behind the answer it checks nothing


def test_styles_come_as_often_as_they_should() -> None:
    texts = [one.completion for one in StyledArithmetic((2,)).draw(2000, torch.Generator().manual_seed(0))]
    assert np.mean([is_boxed(text) for text in texts]) == pytest.approx(0.15, abs=0.03)
    assert float(CheckLabeller()(texts).float().mean()) == pytest.approx(0.2, abs=0.03)
    assert max(map(len, texts)) <= StyledArithmetic((2,)).max_new_tokens


@pytest.mark.parametrize(("rule", "early"), [("correctness", (0.89, 0.93)), ("strict_format", (0.25, 0.35))])
def test_the_format_bandit_is_delayed_by_a_strict_format(rule: str, early: tuple[float, float]) -> None:
    course = format_bandit(RewardRule.named(rule), 150, torch.Generator().manual_seed(0))
    assert early[0] < float(course[40]) < early[1]
    assert float(course[150]) > 0.96


def test_the_difficulty_bandit_by_its_calibrated_figures() -> None:
    difficulties = torch.tensor([0.0, 2.0, 4.0, 8.0])
    weak, strong = (
        difficulty_bandit(skill, difficulties, 200, torch.Generator().manual_seed(0)).tolist() for skill in (-2.0, 3.0)
    )
    assert weak == pytest.approx([5.4, 7.1, -0.9, -2.0], abs=0.35)
    assert strong == pytest.approx([5.6, 7.4, 9.4, 12.3], abs=0.35)


@pytest.mark.parametrize("settings", [{"num_steps": 0}, {"test_samples": 4}, {"base_steps": (0, 1, 1)}])
def test_impossible_settings_are_told(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="at least"):
        Config(**settings)  # type: ignore[arg-type]
