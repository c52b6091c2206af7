"""Each claim of prefix-grouper tells a world with the effect from one without; and the study runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from every_study import StudyTests
from fabricated import fabricate

from dynascope.rl.prompt_groups import PromptGroups
from dynascope.studies import Runs, load_study
from dynascope.studies.prefix_grouper.method import Config, kept_bytes, make_model

pytest.importorskip("transformers")
STUDY = load_study("prefix-grouper")


def world(folder: Path, seed: int, *, is_effect: bool) -> Runs:
    """One seed's records in a world where the paper is right about everything, or about nothing."""
    tiny = 1e-14 * (1 + seed) if is_effect else 0.1 + 0.001 * seed
    training = {"loss_difference": np.full(3, tiny), "weight_difference": np.full(3, tiny)}
    prompt, _, group = np.meshgrid([1, 2, 3], [1, 2, 3], [1, 2], indexing="ij")
    speedup = 0.9 + 0.01 * seed + (prompt * group) / 1.5 if is_effect else (0.8 - 0.01 * seed) / (prompt * group)
    tokens = 0.5 / (prompt * group)
    cost = {
        "speedup": speedup[None],
        "token_ratio": tokens[None],
        "kept_ratio": (tokens * (1.05 if is_effect else 1.4 + 0.01 * seed))[None],
    }
    return fabricate(folder, {"float32": training, "float64": training, "cost": cost})


class TestStudy(StudyTests):
    study = STUDY
    world = staticmethod(world)
    num_figures = 4


def test_kept_bytes_grow_with_tokens_and_leave_weights_out() -> None:
    model = make_model(Config(num_layers=1, width=32, num_heads=2, prompts=(64,), completions=(8,)), 50)

    def batch(prompt: int) -> PromptGroups:
        ones = torch.ones(2, prompt).bool()
        return PromptGroups(ones[:1].long(), ones[:1], ones[:, :8].long(), ones[:, :8], torch.tensor([2]))

    short, long = (kept_bytes(model, batch(prompt), share=False) for prompt in (16, 32))
    assert 1.5 < long / short < 2.0


def test_impossible_settings_are_told() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Config(groups=(0,))
