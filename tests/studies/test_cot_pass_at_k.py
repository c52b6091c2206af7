"""Each claim of cot-pass-at-k tells a world with the effect from one without; the task is what it says; the study runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every_study import StudyTests
from fabricated import fabricate

from dynascope.studies import Runs, load_study
from dynascope.studies.cot_pass_at_k.claims import early_rise
from dynascope.studies.cot_pass_at_k.method import Config, spread
from dynascope.studies.cot_pass_at_k.scratchpads import Puzzle, Scratchpads
from dynascope.theory.logic_prior import estimate_logic_prior

STUDY = load_study("cot-pass-at-k")


def world(folder: Path, seed: int, *, is_effect: bool) -> Runs:
    """One seed's records in a world where the paper is right about everything, or about nothing."""
    noise = 0.001 * seed
    ends = (0.99, 0.2, 0.02) if is_effect else (0.2, 0.8, 0.9)
    bandits = {
        f"bandit-{name}": {"bandit/chain_correct": np.array([[0.2] * 5, [end - noise] * 5])}
        for name, end in zip(("prior", "equal", "violated"), ends, strict=True)
    }
    before, after = np.array([0.2, 0.5, 0.7]), np.array([0.8, 0.82, 0.84])
    if not is_effect:
        before, after = after, before - 0.05
    sign = 1 if is_effect else -1
    grpo: dict[str, Any] = {
        "advantage/right_chain": np.full(50, sign * 1.2 + noise),
        "advantage/wrong_chain": np.full(50, sign * -0.3 - noise),
        "test/pass_at_k": np.array([[0.3, 0.6, 0.99 + noise if is_effect else 0.85 + noise]] * 2),
        "test/cot_pass_at_k": np.stack([before, after]) + noise,
        "reasoning/chain_correct": np.linspace(0.5, 0.5 + sign * 0.4, 50) + noise,
        "sft/chain": np.array([0.4, 0.4 + sign * 0.3 + noise]),
        "sft/correct": np.array([0.3, (0.8 if is_effect else 0.6) + noise]),
        "sft/cot_pass_at_k": np.stack([before, after]) + noise,
        "test/correct": np.array([0.3, 0.8]),
    }
    shortcut = {"test/chain": np.array([0.4, 0.4 - sign * 0.3 + noise])}
    return fabricate(folder, {**bandits, "grpo": grpo, "shortcut": shortcut})


class TestStudy(StudyTests):
    study = STUDY
    world = staticmethod(world)
    num_figures = 6


def test_early_rise_looks_at_the_first_fifth_alone(tmp_path: Path) -> None:
    flat = np.concatenate([np.full(20, 0.5), np.full(80, 0.9)])
    runs = fabricate(tmp_path, {"grpo": {"reasoning/chain_correct": flat}})
    assert early_rise(runs["grpo"]) == pytest.approx(0)


def test_prompts_lie_by_their_answers_and_their_reasoning() -> None:
    answers = torch.tensor([[True] * 4, [True, False, False, False], [False] * 4])
    chains = torch.tensor([[True, True, True, False], [False, True, True, True], [True] * 4])
    told = spread(answers, chains)
    assert told["prompts/answer"].tolist() == pytest.approx([1 / 3, 1 / 3, 0, 0, 1 / 3])
    assert told["prompts/chain_solved"].tolist() == [0, 0, 0, 1, 0]
    assert told["prompts/chain_hard"].tolist() == [1, 0, 0, 0, 0]


def test_the_rule_checks_chain_and_answer_apart() -> None:
    puzzle = Puzzle((2, 4, 3), "")
    assert puzzle.prompt == "2+4+3="
    checked = [
        (puzzle.is_answer_right(text), puzzle.is_chain_right(text)) for text in ("1,4>4$", "0,4>4$", "1,4>3$", "1,4>4")
    ]
    assert checked == [(True, True), (True, False), (False, True), (False, True)]
    numbers = {Puzzle((one, two), "").number for one in range(5) for two in range(5)}
    assert len(numbers) == 25


@pytest.mark.parametrize(("kind", "alpha", "beta"), [("guess", 0.92, (0.0, 0.2)), ("shortcut", 0.075, (0.68, 0.72))])
def test_demonstrations_have_the_prior_that_they_claim(kind: Any, alpha: float, beta: tuple[float, float]) -> None:
    task = Scratchpads(kind)
    puzzles = task.draw(20_000, torch.Generator().manual_seed(0))
    chains = torch.tensor(task.are_chains_right(puzzles, [one.completion for one in puzzles]))[None]
    answers = torch.tensor(task.are_right(puzzles, [one.completion for one in puzzles]))[None]
    prior = estimate_logic_prior(chains, answers, resamples=0)
    assert float(prior.alpha.value) == pytest.approx(alpha, abs=0.015)
    assert beta[0] < float(prior.beta.value) < beta[1]
    assert max(len(one.completion) for one in puzzles) < task.max_new_tokens


@pytest.mark.parametrize("settings", [{"num_steps": 0}, {"width": 30}, {"num_samples": 1}])
def test_impossible_settings_are_told(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Config(**settings)
    with pytest.raises(ValueError, match="must be"):
        Scratchpads(num_digits=1)
