"""Reasoning dynamics: hand-counted rollouts, the cohort, and one record."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dynascope
from dynascope.probes.reasoning import ReasoningDynamics, reasoning_monitored
from dynascope.rl.reasoning.judge_ensemble import JudgeEnsemble
from dynascope.rl.reasoning.judges import Solution


def test_hand_counted() -> None:
    answers = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    chains = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 1, 1]]).bool()
    found = ReasoningDynamics([1, 4]).measure(torch.arange(3), answers, chains)
    assert float(found["reasoning/answer_correct"]) == pytest.approx(0.5)
    assert [float(found[f"reasoning/{one}"]) for one in ("solved", "learnable", "unsolved")] == pytest.approx(
        [1 / 3] * 3
    )
    assert float(found["reasoning/chain_correct"]) == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert found["reasoning/pass_at_k"].tolist() == pytest.approx([0.5, 2 / 3])
    assert found["reasoning/cot_pass_at_k"].tolist() == pytest.approx([(3 / 4 + 1 / 4) / 3, 2 / 3])


def test_newly_solved_prompts_lower_the_mean_but_not_the_cohort() -> None:
    dynamics, ids = ReasoningDynamics([1]), torch.tensor([5, 9])
    chains = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    first = dynamics.measure(ids, torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]]).bool(), chains)
    chains = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    second = dynamics.measure(ids, torch.ones(2, 4, dtype=torch.bool), chains)
    name = "reasoning/chain_correct"
    assert float(second[name]) < float(first[name])
    assert float(second["reasoning/cohort_chain_correct"]) > float(first["reasoning/cohort_chain_correct"])


def test_masks_answers_only_and_nothing_solved() -> None:
    answers = torch.tensor([[True, False, True]])
    found = ReasoningDynamics([2]).measure(torch.tensor([0]), answers, mask=torch.tensor([[True, True, False]]))
    assert float(found["reasoning/answer_correct"]) == 0.5
    assert "reasoning/chain_correct" not in found
    none = ReasoningDynamics([2]).measure(torch.tensor([0]), ~answers & False, answers)
    assert math.isnan(float(none["reasoning/chain_correct"]))
    with pytest.raises(ValueError, match="fewest answers"):
        ReasoningDynamics([4]).measure(torch.tensor([0]), answers)
    with pytest.raises(ValueError, match="at least one K"):
        ReasoningDynamics([])


def test_logged_beside_a_watched_run(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    dynamics = ReasoningDynamics([1, 8])
    answers = torch.rand(6, 8) < 0.5
    with dynascope.watch(model, optimizer, run=tmp_path / "run", probes=[]) as w:
        for _ in range(3):
            model(torch.randn(4, 2)).square().mean().backward()
            optimizer.step()
            w.log(dynamics.measure(torch.arange(6), answers, answers))
    record = dynascope.open(tmp_path / "run")
    assert {one.name for one in dynamics.series} <= set(record.names())
    assert record["reasoning/pass_at_k"].shape == (3, 2)
    assert record["reasoning/chain_correct"].values.tolist() == [1.0] * 3


def test_trls_rewards_tell_it_by_the_way() -> None:
    """Two prompts of three and two answers; right are 2 of 3 and 0 of 2, and of the right ones one is reasoned rightly."""
    told: dict[str, float] = {}
    judged: list[Solution] = []

    def judge(solutions: Sequence[Solution]) -> list[bool]:
        judged.extend(solutions)
        return ["so" in one.reasoning for one in solutions]

    def reward(completions: Sequence[str], **columns: Any) -> list[float | None]:
        return [1.0 if text.endswith("3") else None if text == "?" else 0.0 for text in completions]

    watched = reasoning_monitored(reward, ReasoningDynamics([1, 2]), JudgeEnsemble(judge, n=1), reference="answer")
    completions = ["so 3", "3", "so 4", "?", "5"]
    asked = {"prompts": ["1+2"] * 3 + ["2+2"] * 2, "completions": completions, "answer": ["3"] * 3 + ["4"] * 2}
    assert watched(**asked, log_metric=told.__setitem__) == [1.0, 1.0, 0.0, None, 0.0]
    assert [(one.question, one.reasoning, one.reference) for one in judged] == [("1+2", "so 3", "3"), ("1+2", "3", "3")]
    assert told["reasoning/answer_correct"] == pytest.approx((2 / 3 + 0) / 2)
    assert told["reasoning/chain_correct"] == pytest.approx(1 / 2)  # of the one prompt that has right answers
    assert told["reasoning/pass_at_k/2"] == pytest.approx((1 + 0) / 2)
    assert told["reasoning/cot_pass_at_k/2"] == pytest.approx((2 / 3 + 0) / 2)
    assert (told["reasoning/learnable"], told["reasoning/unsolved"]) == (0.5, 0.5)

    wide: dict[str, float] = {}
    too_many = reasoning_monitored(reward, ReasoningDynamics([2, 4]))
    assert too_many(**asked, log_metric=wide.__setitem__) == [1.0, 1.0, 0.0, None, 0.0]
    assert wide["reasoning/pass_at_k/2"] == told["reasoning/pass_at_k/2"]
    assert "reasoning/pass_at_k/4" not in wide  # a prompt has two answers

    silent: dict[str, float] = {}
    chat = {
        "prompts": [[{"role": "user", "content": "1+2"}]] * 2,
        "completions": [[{"content": "5"}], [{"content": "6"}]],
    }
    judgeless = reasoning_monitored(lambda completions, **_: [0.0, 0.0], ReasoningDynamics([1]))
    judgeless(**chat, log_metric=silent.__setitem__)
    assert silent["reasoning/unsolved"] == 1
    assert not [name for name in silent if "chain" in name]


def test_a_judge_that_fails_does_not_end_training() -> None:
    told: dict[str, float] = {}

    def judge(solutions: Sequence[Solution]) -> list[bool]:
        raise RuntimeError("the server is gone")

    def reward(completions: Sequence[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    watched = reasoning_monitored(reward, ReasoningDynamics([1]), JudgeEnsemble(judge, n=1))
    given = {"prompts": ["1+2"] * 2, "completions": ["3", "3"], "log_metric": told.__setitem__}
    with pytest.warns(
        UserWarning, match=r"dynamics of the reward 'reward' failed, .* RuntimeError: the server is gone"
    ):
        assert watched(**given) == [1.0, 1.0]
    assert watched(**given) == [1.0, 1.0]  # and says so once
    assert not told
    with pytest.raises(ZeroDivisionError):
        reasoning_monitored(lambda **_: [1 / 0], ReasoningDynamics([1]))(**given)
