"""Reinforcement learning in a study: what is recorded, and that looking changes nothing."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import dynascope
from dynascope.record import RecordWriter
from dynascope.rl.loop import LoopConfig
from dynascope.rl.presets import preset
from dynascope.rl.tasks.arithmetic import Arithmetic
from dynascope.rl.tasks.base_model import BaseModel, base_model
from dynascope.studies.harness.policy import Evaluation, measure_greedy, measure_policy, reinforce

pytest.importorskip("transformers")
TASK = Arithmetic((1,))
SPEC = BaseModel(TASK, num_layers=1, width=32, num_heads=2, num_steps=20)
LOOP = LoopConfig(num_steps=5, num_prompts=4, num_samples=4)
SELDOM, OFTEN = Evaluation(8, 4, every=100), Evaluation(8, 4, every=2)


def trained(folder: Path, evaluation: Evaluation | None, **more: Any) -> tuple[Any, dynascope.Record]:
    model = base_model(SPEC, 0, folder.parent / "models")
    with RecordWriter(folder) as record:
        reinforce(record, model, preset("grpo"), TASK, LOOP, lr=1e-3, seed=0, evaluation=evaluation, **more)
    return model, dynascope.open(folder)


def test_every_step_and_every_test_is_on_record(tmp_path: Path) -> None:
    _, record = trained(tmp_path / "run", OFTEN)
    assert record["rollout/reward"].step.values.tolist() == [0, 1, 2, 3, 4]
    assert record["policy/entropy"].sizes["step"] == 5
    assert record["test/correct"].step.values.tolist() == [0, 2, 4, 5]
    assert record["test/pass_at_k"].dims == ("step", "k")
    assert record["test/pass_at_k"].k.values.tolist() == [1, 2, 4]
    assert record["test/pass_at_k"].sel(k=1).values == pytest.approx(record["test/correct"].values)
    assert (record["rollout/tokens_per_second"] > 0).all()


def test_testing_changes_nothing_in_training(tmp_path: Path) -> None:
    seldom, first = trained(tmp_path / "seldom", SELDOM)
    often, second = trained(tmp_path / "often", OFTEN)
    assert torch.equal(seldom.lm_head.weight, often.lm_head.weight)
    assert first["rollout/reward"].values.tolist() == second["rollout/reward"].values.tolist()


def test_a_study_that_tests_by_itself_takes_the_same_steps(tmp_path: Path) -> None:
    plain, first = trained(tmp_path / "plain", None)
    tested, second = trained(tmp_path / "tested", SELDOM)
    assert torch.equal(plain.lm_head.weight, tested.lm_head.weight)
    assert not [name for name in first.names() if name.startswith("test/")]
    assert first["rollout/reward"].values.tolist() == second["rollout/reward"].values.tolist()


def test_the_same_policy_tests_the_same(tmp_path: Path) -> None:
    model = base_model(SPEC, 0, tmp_path)
    first, second = (measure_policy(model, TASK, OFTEN) for _ in range(2))
    assert {name: torch.as_tensor(one).tolist() for name, one in first.items()} == {
        name: torch.as_tensor(one).tolist() for name, one in second.items()
    }


def test_greedy_answers_are_those_of_the_coldest_policy(tmp_path: Path) -> None:
    model = base_model(BaseModel(TASK, num_layers=1, width=32, num_heads=2, num_steps=150), 0, tmp_path)
    told = measure_greedy(model, TASK, Evaluation(64, 16))
    cold = measure_policy(model, TASK, Evaluation(64, 1), temperature=1e-4)["test/correct"]
    assert 0 < float(told) == float(cold)


def test_the_entropy_of_tests_is_that_of_the_distribution(tmp_path: Path) -> None:
    model = base_model(SPEC, 0, tmp_path)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every character is as likely
    told = measure_policy(model, TASK, Evaluation(8, 4, measures_entropy=True))
    assert float(told["test/entropy"]) == pytest.approx(math.log(TASK.vocabulary))
    assert "test/entropy" not in measure_policy(model, TASK, Evaluation(8, 4))


def test_an_evaluation_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Evaluation(num_samples=0)
