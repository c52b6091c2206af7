"""Each claim of hapo tells a world with the effect from one without; and the study runs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from every_study import StudyTests
from fabricated import fabricate

from dynascope.record import open_record
from dynascope.rl.batch import PolicyBatch
from dynascope.rl.tasks.arithmetic import Sum
from dynascope.studies import Runs, StudyRecord, judge, load_study
from dynascope.studies.hapo.method import ARMS, Config, learnable, penalised_reward

STUDY = load_study("hapo")


def world(folder: Path, seed: int, *, is_effect: bool) -> Runs:
    """One seed's records in a world where the paper is right about everything, or about nothing."""
    arms = {}
    for number, (name, arm) in enumerate(ARMS.items()):
        is_even = arm.averages_tokens == is_effect
        better = (0.1 if is_effect else -0.1) * (name != "dapo") + 0.002 * seed * number
        arms[name] = {
            "policy/entropy": np.full(22, 0.5 - better),  # of rollouts, which differ in their prompts
            "policy/redistribution/moved": np.full(22, (0.03 if is_effect else 0.005) + 1e-4 * seed),
            "policy/clip/low": np.full(22, (0.01 if is_effect else 1e-4) + 1e-4 * seed),
            "policy/clip/high": np.full(22, (0.005 if is_effect else 1e-4) + 1e-4 * seed),
            "test/entropy": np.array([0.5, 0.5 + better, 0.5 + better]),
            "test/correct": np.array([0.5, 0.7 + better]),
            "weight/length_wrong_over_right": np.full(22, 1.395 + 0.01 * seed),
            "weight/token_mean": np.full(22, 1e-6 if is_even else -0.1 - 0.01 * seed),
            "weight/wrong_over_right": np.full(22, 1 + 1e-5 if is_even else 1.4 + 0.01 * seed),
        }
        if name == "dapo" and not is_effect:
            arms[name]["weight/wrong_over_right"] = np.ones(22)  # whatever the lengths
    return fabricate(folder, arms)


class TestStudy(StudyTests):
    study = STUDY
    world = staticmethod(world)
    num_figures = 5


def test_without_the_guard_the_token_average_alone_differs() -> None:
    config = Config()
    free, guarded = (ARMS[name].objective(config) for name in ("token-average-unguarded", "token-average"))
    assert (free.advantage.fallback, guarded.advantage.fallback) == (None, 5.0)
    assert free.having(advantage=guarded.advantage) == guarded


def test_a_part_that_fails_is_not_hidden_by_the_others(tmp_path: Path) -> None:
    worlds = [dict(world(tmp_path / str(seed), seed, is_effect=True)) for seed in range(3)]
    for seed, runs in enumerate(worlds):
        worse = {"clip": {"test/correct": np.array([0.5, 0.6 + 0.001 * seed])}}
        runs |= fabricate(tmp_path / f"worse-{seed}", worse)
    told = {claim.id: judge(claim, worlds).holds for claim in STUDY.claims if claim.id.startswith("C4-")}
    assert told == {"C4-temperature": True, "C4-token-average": True, "C4-redistribution": True, "C4-clip": False}


def test_the_papers_setting_has_the_recipes_dual_clip_and_penalty() -> None:
    paper = STUDY.presets["paper"]
    assert {arm.objective(paper).dual_clip for arm in ARMS.values()} == {10.0}
    assert {arm.objective(Config()).dual_clip for arm in ARMS.values()} == {None}
    problem, limit = Sum(999, 999), paper.task.max_new_tokens
    texts = [problem.completion, "9" * (limit - 3) + "$", "9" * limit]
    reward = penalised_reward(paper)
    assert reward(texts, problem=[problem] * 3) == [1.0, -0.5, -1.0]
    with pytest.raises(ValueError, match="overlong_buffer=99"):
        Config(overlong_buffer=99)


def test_prompts_are_kept_by_answers_and_not_by_the_penalty() -> None:
    batch = PolicyBatch(
        mask=torch.ones(4, 1).bool(), rewards=torch.tensor([-1.0, 0.0, 1.0, 0.0]), group_ids=torch.tensor([0, 0, 1, 1]),
        correct=torch.tensor([False, False, True, False]),
    )  # fmt: skip
    assert learnable(batch).tolist() == [False, False, True, True]


def test_a_penalty_trains(tmp_path: Path) -> None:
    config = replace(STUDY.presets["smoke"], base_steps=40, overlong_buffer=4, dual_clip=10.0)
    with StudyRecord(tmp_path / "a" / "b" / "seed-0", earlier={}, config={}) as record:
        STUDY.train(config, ARMS["hapo"], 0, record)
    told = open_record(tmp_path / "a" / "b" / "seed-0")
    assert (told["rollout/reward"].values < told["rollout/correct"].values).any()


def test_one_optimizer_step_a_rollout_is_told() -> None:
    with pytest.raises(ValueError, match="num_passes=2"):
        Config(num_minibatches=1, num_passes=1)
