"""Two passes over completions of different lengths say what one does, with the same gradients, and only where it pays."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from dynascope.rl import scoring
from dynascope.rl.rollout import Rollout, score
from dynascope.rl.scoring import score_by_length


def rollout_of(lengths: list[int], num_prompt_tokens: int = 3) -> Rollout:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 14, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    prompts = torch.randint(1, 14, (len(lengths), num_prompt_tokens), generator=generator)
    told = torch.zeros(mask.shape)
    return Rollout(
        prompts, torch.ones_like(prompts).bool(), tokens, mask, told, told, torch.zeros(len(lengths)).bool(),
        torch.arange(len(lengths)), max(lengths), 0.7, 0,
    )  # fmt: skip


@pytest.mark.parametrize("also", [set(), {"entropy"}, {"entropy", "logits", "hidden"}])
def test_both_ways_say_the_same_of_every_token(
    also: set[str], tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_FEWEST", 2)
    model, rollout = tiny_llama.double(), rollout_of([2, 20, 3, 18, 1, 4, 20])
    parts, whole = (one(model, rollout, also, differentiable_entropy=True) for one in (score_by_length, score))
    assert set(parts) == set(whole)
    assert not parts["log_probs"][2, 4:].any()  # cut to the four tokens of the shorter ones' longest
    for name, value in whole.items():
        if name == "unembedding":
            assert parts[name] is value
        else:
            torch.testing.assert_close(parts[name][rollout.mask], value[rollout.mask], rtol=1e-5, atol=1e-6)
    parameters = list(model.parameters())
    weights = torch.randn_like(whole["log_probs"]) * rollout.mask
    name = "entropy" if "entropy" in also else "log_probs"
    pairs = (torch.autograd.grad((one[name] * weights).sum(), parameters) for one in (parts, whole))
    for mine, other in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_it_takes_two_passes_only_where_that_pays(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(model: Any, rollout: Rollout, *args: Any, **settings: Any) -> dict[str, torch.Tensor]:
        calls.append(rollout.tokens.shape[1])
        return score(model, rollout, *args, **settings)

    monkeypatch.setattr(scoring, "score", counted)
    cases = (([9, 10] * 32, 10), ([1, 10] * 16, 100), ([1, 10] * 15, 3), ([10], 3), ([1, 10, 2, 10] * 8, 3))
    for lengths, prompt in cases:
        score_by_length(tiny_llama, rollout_of(lengths, prompt))
    assert calls == [10, 10, 10, 10, 2, 10]
    held = rollout_of([1, 10, 2, 10] * 8)
    score_by_length(tiny_llama, replace(held, hidden=torch.zeros(32, 10, 5)))
    assert calls[-2:] == [2, 10]
