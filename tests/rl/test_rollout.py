"""Sampling with a cache says what the model says without one; records are what was drawn."""

from typing import Any

import pytest
import torch
from torch import nn

from dynascope.rl.monitors import learnable_groups, watch_rollout
from dynascope.rl.rollout import Rollout, _draw, sample, score, unembedding
from dynascope.rl.tasks.arithmetic import STOP, encode


def drawn(model: Any, texts: tuple[str, ...] = ("47+85=", "12+34="), **changes: Any) -> Rollout:
    prompts, mask = encode(texts, side="left")
    settings = {"num_samples": 4, "max_new_tokens": 8, "stop_token": STOP} | changes
    generator = torch.Generator().manual_seed(0)
    return sample(model, prompts, None if mask.all() else mask, generator=generator, **settings)


@pytest.mark.parametrize("texts", [("47+85=", "12+34="), ("7+5=", "123+456=", "0+0=")])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_the_log_probs_it_was_sampled_with(
    tiny_llama: Any, texts: tuple[str, ...], temperature: float
) -> None:
    rollout = drawn(tiny_llama, texts, temperature=temperature)
    found = score(tiny_llama, rollout)["log_probs"]
    torch.testing.assert_close(found[rollout.mask], rollout.behaviour_log_probs[rollout.mask], atol=1e-5, rtol=1e-4)
    assert torch.equal(rollout.sampling_log_probs, rollout.behaviour_log_probs)
    assert rollout.group_ids.tolist() == [place for place in range(len(texts)) for _ in range(4)]


def test_padding_on_the_left_changes_nothing(tiny_llama: Any) -> None:
    prompts, mask = encode(["7+5=", "123+456="], side="left")
    both = sample(tiny_llama, prompts, mask, num_samples=1, max_new_tokens=6, stop_token=STOP, temperature=0.0)
    alone, _ = encode(["7+5="])
    one = sample(tiny_llama, alone, num_samples=1, max_new_tokens=6, stop_token=STOP, temperature=0.0)
    width = one.tokens.shape[1]
    assert torch.equal(both.tokens[0, :width], one.tokens[0])
    torch.testing.assert_close(both.behaviour_log_probs[0, :width], one.behaviour_log_probs[0], atol=1e-5, rtol=1e-4)


def test_a_seed_is_a_rollout_and_the_models_mode_is_put_back(tiny_llama: Any) -> None:
    tiny_llama.train()
    first, second = drawn(tiny_llama), drawn(tiny_llama)
    assert torch.equal(first.tokens, second.tokens)
    assert tiny_llama.training


def test_completions_end_at_the_stop_token_or_at_the_limit(tiny_llama: Any) -> None:
    with torch.no_grad():
        tiny_llama.lm_head.weight[STOP] += 0.1 * tiny_llama.lm_head.weight.sum(0)
    rollout = drawn(tiny_llama, num_samples=64)
    stops = (rollout.tokens == STOP) & rollout.mask
    assert torch.equal(stops.any(1), ~rollout.is_truncated)
    assert (stops.sum(1) <= 1).all()
    ended = stops.float().argmax(1) + 1
    assert torch.equal(rollout.lengths[~rollout.is_truncated], ended[~rollout.is_truncated])
    assert (rollout.lengths[rollout.is_truncated] == 8).all()
    assert rollout.tokens[~rollout.mask].abs().sum() == 0
    assert rollout.is_truncated.any()
    assert not rollout.is_truncated.all()


def test_the_likeliest_token_at_temperature_zero(tiny_llama: Any) -> None:
    rollout = drawn(tiny_llama, temperature=0.0, num_samples=1)
    logits = score(tiny_llama, rollout, {"logits"})["logits"]
    assert torch.equal(logits.argmax(-1)[rollout.mask], rollout.tokens[rollout.mask])


def test_what_is_drawn_from_may_be_changed_and_is_remembered(tiny_llama: Any) -> None:
    rollout = drawn(tiny_llama, process=lambda history, logits: 2 * logits)
    logits = score(tiny_llama, rollout, {"logits"})["logits"]
    sharper = (2 * logits.log_softmax(-1)).log_softmax(-1).gather(2, rollout.tokens[..., None])[..., 0]
    torch.testing.assert_close(rollout.sampling_log_probs[rollout.mask], sharper[rollout.mask], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(rollout.sampling_log_probs, rollout.behaviour_log_probs)
    same = drawn(tiny_llama, process=lambda history, logits: logits)
    assert torch.equal(same.tokens, drawn(tiny_llama).tokens)


def test_draws_follow_the_distribution(tiny_llama: Any) -> None:
    rollout = drawn(tiny_llama, ("47+85=",), num_samples=20_000, max_new_tokens=1)
    probabilities = score(tiny_llama, rollout.select(torch.tensor([0])), {"logits"})["logits"][0, 0].softmax(-1)
    shares = rollout.tokens[:, 0].bincount(minlength=len(probabilities)) / 20_000
    assert (shares - probabilities).abs().max() < 0.015


def test_what_cannot_be_drawn_is_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    found = []
    for number in (0.0, 0.5, 0.75, 0.76, 1 - 2**-24):  # the least and the greatest that torch.rand gives among them
        monkeypatch.setattr(torch, "rand", lambda *size, number=number, **settings: torch.full(size, number))
        found.append(int(_draw(weights, None)))
    assert found == [3, 3, 1, 1, 1]


def test_logits_that_become_nan_on_the_way_are_told(tiny_llama: Any) -> None:
    with pytest.raises(ValueError, match="logits are NaN"):
        drawn(tiny_llama, process=lambda history, logits: logits * (torch.nan if history.shape[1] > 6 else 1.0))


def test_processors_come_before_the_temperature_as_hugging_faces_do(tiny_llama: Any) -> None:
    seen = []
    drawn(tiny_llama, temperature=0.5, max_new_tokens=1, process=lambda history, logits: seen.append(logits) or logits)
    plain = []
    drawn(tiny_llama, temperature=1.0, max_new_tokens=1, process=lambda history, logits: plain.append(logits) or logits)
    assert torch.equal(seen[0], plain[0])


def test_a_token_that_is_ruled_out_has_no_part_in_the_entropy(tiny_llama: Any) -> None:
    tiny_llama.lm_head.register_forward_hook(
        lambda module, args, logits: logits.masked_fill(torch.arange(logits.shape[-1]) == 3, -torch.inf)
    )
    rollout = drawn(tiny_llama)
    for is_differentiable in (False, True):
        entropy = score(tiny_llama, rollout, {"entropy"}, differentiable_entropy=is_differentiable)["entropy"]
        assert entropy.isfinite().all()
    entropy.sum().backward()
    assert all(one.grad is None or one.grad.isfinite().all() for one in tiny_llama.parameters())


def test_hidden_states_and_unembedding_give_the_logits(tiny_llama: Any) -> None:
    rollout = drawn(tiny_llama)
    told = score(tiny_llama, rollout, {"hidden", "logits", "entropy"})
    torch.testing.assert_close(told["hidden"] @ told["unembedding"].T, told["logits"], atol=1e-5, rtol=1e-4)
    probabilities = told["logits"].softmax(-1)
    torch.testing.assert_close(told["entropy"], -(probabilities * probabilities.log()).sum(-1))
    assert not told["entropy"].requires_grad
    assert score(tiny_llama, rollout, {"entropy"}, differentiable_entropy=True)["entropy"].requires_grad
    with pytest.raises(ValueError, match="not attention"):
        score(tiny_llama, rollout, {"attention"})


def test_logits_that_are_not_the_product_are_refused_where_it_counts(tiny_llama: Any) -> None:
    assert unembedding(tiny_llama) is tiny_llama.lm_head.weight
    rollout = drawn(tiny_llama)
    tiny_llama.config.final_logit_softcapping = 30.0
    assert "hidden" in score(tiny_llama, rollout, {"hidden"})
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        score(tiny_llama, rollout, {"unembedding"})
    tiny_llama.config.final_logit_softcapping = None
    tiny_llama.lm_head.bias = nn.Parameter(torch.zeros(len(tiny_llama.lm_head.weight)))
    with pytest.raises(ValueError, match="a bias of the head"):
        unembedding(tiny_llama)


def test_impossible_settings_are_told(tiny_llama: Any) -> None:
    for changes in ({"num_samples": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}):
        with pytest.raises(ValueError, match="must"):
            drawn(tiny_llama, **changes)


def made_up(lengths: list[int], is_truncated: list[bool], group_ids: list[int]) -> Rollout:
    width, num = max(lengths), len(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return Rollout(
        prompts=torch.ones(num, 1, dtype=torch.long),
        prompt_mask=torch.ones(num, 1).bool(),
        tokens=torch.ones(num, width, dtype=torch.long),
        mask=mask,
        behaviour_log_probs=-0.5 * mask,
        sampling_log_probs=-0.25 * mask,
        is_truncated=torch.tensor(is_truncated),
        group_ids=torch.tensor(group_ids),
        max_length=width,
        temperature=1.0,
        weights_version=0,
    )


def test_monitors_by_hand() -> None:
    rollout = made_up([100, 200, 300, 8192, 8192], [False, False, False, True, True], [0, 0, 4, 4, 7])
    correct = torch.tensor([True, False, True, False, False])
    told = {name: float(value) for name, value in watch_rollout(rollout, correct.float(), correct).items()}
    expected = {
        "length": 3396.8,
        "truncated": 0.4,
        "length_stopped": 200,
        "length_right": 200,
        "length_wrong": 5528,
        "correct": 0.4,
        "learnable": 2 / 3,
        "solved": 0,
        "unsolved": 1 / 3,
        "surprise": 0.5,
        "off_policy": 0.25,
    }
    for name, value in expected.items():
        assert told[f"rollout/{name}"] == pytest.approx(value, rel=1e-5), name


def test_only_groups_with_a_spread_are_learnable() -> None:
    rewards, ids = torch.tensor([1.0, 0, 1, 1, 0.5]), torch.tensor([3, 3, 1, 1, 0])
    assert learnable_groups(rewards, ids).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("texts", [("47+85=",), ("7+5=", "123+456=")])
def test_hidden_states_kept_while_sampling_are_those_of_a_pass_afterwards(
    tiny_llama: Any, texts: tuple[str, ...]
) -> None:
    rollout = drawn(tiny_llama, texts, keeps_hidden=True)
    assert rollout.hidden is not None
    again = score(tiny_llama, rollout, {"hidden"})["hidden"]
    torch.testing.assert_close(rollout.hidden[rollout.mask], again[rollout.mask], atol=1e-5, rtol=1e-4)
    assert torch.equal(rollout.tokens, drawn(tiny_llama, texts).tokens)


def test_a_model_that_has_diverged_is_told(tiny_llama: Any) -> None:
    torch.nn.init.constant_(tiny_llama.lm_head.weight, torch.nan)
    with pytest.raises(ValueError, match="logits are NaN"):
        sample(tiny_llama, torch.ones(2, 3).long(), num_samples=2, max_new_tokens=4, stop_token=STOP)
