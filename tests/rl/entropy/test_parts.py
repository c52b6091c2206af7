"""HAPO's four parts: each by hand, each switched off, and all of them together."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dynascope.rl.advantages import center, group_z_score, unit_rms
from dynascope.rl.batch import PolicyBatch
from dynascope.rl.entropy.parts import (
    AdaptiveTemperature,
    SamplingCorrection,
    TokenGroupZScore,
    adaptive_clip,
    adaptive_temperature,
    entropy_aware,
    outside_neutral_zone,
    redistribute_advantage,
    token_group_advantage,
)
from dynascope.rl.entropy.signal import EntropySignal, EntropyStats
from dynascope.rl.objective import PolicyObjective
from dynascope.rl.presets import dapo, grpo, hapo, preset
from dynascope.rl.rollout import sample
from dynascope.rl.tasks.arithmetic import PAD, STOP, encode


def lengths_mask(*lengths: int) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def batch(num: int = 8, width: int = 6, **changes: Any) -> PolicyBatch:
    generator = torch.Generator().manual_seed(0)
    behaviour = -torch.randn(num, width, generator=generator).abs()
    known: dict[str, Any] = {
        "mask": torch.arange(width) < torch.randint(1, width + 1, (num, 1), generator=generator),
        "rewards": (torch.rand(num, generator=generator) < 0.5).float(),
        "group_ids": torch.arange(num) // 4,
        "behaviour_log_probs": behaviour,
        "log_probs": behaviour + 0.3 * torch.randn(num, width, generator=generator),
        "entropy": torch.rand(num, width, generator=generator),
    }
    return PolicyBatch(**(known | changes))


def told(objective: PolicyObjective, seen: PolicyBatch) -> tuple[Tensor, Tensor]:
    log_probs = seen.log_probs.clone().requires_grad_()
    seen = seen.having(advantage=objective.advantages(seen), log_probs=log_probs)
    loss, _ = objective.loss(seen)
    return loss.detach(), torch.autograd.grad(loss, log_probs)[0]


@pytest.mark.parametrize("lengths", [(2, 6), (3, 5, 4)])
def test_token_average_by_hand(lengths: tuple[int, ...]) -> None:
    mask, num = lengths_mask(*lengths), len(lengths)
    rewards = torch.tensor([1.0] + [0.0] * (num - 1))
    advantage = token_group_advantage(rewards, mask, torch.zeros(num, dtype=torch.long))
    expected = torch.tensor([1.732047] + [-0.577349] * (num - 1))
    torch.testing.assert_close(advantage, expected, atol=2e-6, rtol=0)
    assert abs(float((advantage[:, None] * mask).sum())) < 1e-5


def test_a_far_advantage_sends_its_group_back_to_completions() -> None:
    mask = torch.cat([lengths_mask(1, 40), torch.nn.functional.pad(lengths_mask(2, 6), (0, 34))])
    group_ids, rewards = torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 0, 1, 0])
    found = token_group_advantage(rewards, mask, group_ids)
    torch.testing.assert_close(found, torch.tensor([0.7071, -0.7071, 1.7320, -0.5773]), atol=1e-4, rtol=0)
    unlimited = token_group_advantage(rewards, mask, group_ids, fallback=None)
    assert unlimited[0].item() == pytest.approx(6.3245, abs=1e-3)


def test_the_slot_tells_what_the_guard_took() -> None:
    mask = torch.cat([lengths_mask(1, 40), torch.nn.functional.pad(lengths_mask(2, 6), (0, 34))])
    seen = PolicyBatch(mask=mask, rewards=torch.tensor([1.0, 0, 1, 0]), group_ids=torch.tensor([0, 0, 1, 1]))
    guarded, free = TokenGroupZScore(), TokenGroupZScore(fallback=None)
    torch.testing.assert_close(guarded(seen), token_group_advantage(seen.rewards, mask, seen.group_ids), atol=0, rtol=0)
    assert abs(float((free(seen)[:, None] * mask).sum())) < 1e-4
    assert float(guarded.metrics["advantage/guarded"]) == pytest.approx(41 / 49)
    assert float(free.metrics["advantage/guarded"]) == 0
    assert dapo.having(advantage=guarded).rollout_metrics.keys() == {"advantage/guarded"}


def test_with_equal_lengths_it_is_grpo_and_equal_rewards_are_nothing() -> None:
    rewards, group_ids = torch.randn(8), torch.arange(8) % 2
    found = token_group_advantage(rewards, torch.ones(8, 5).bool(), group_ids)
    torch.testing.assert_close(found, group_z_score(rewards, group_ids, std="population", eps=1e-6))
    mask = lengths_mask(1, 5, 2, 0)
    assert token_group_advantage(torch.full((4,), 1 / 3), mask, torch.zeros(4, dtype=torch.long)).tolist() == [0.0] * 4
    with pytest.raises(ValueError, match="fallback=0"):
        token_group_advantage(rewards, torch.ones(8, 5).bool(), group_ids, fallback=0.0)


def test_a_completion_without_tokens_is_compared_with_nobody() -> None:
    """Its group's tokens all have reward 1, so that it would be 1 / eps away."""
    mask = lengths_mask(2, 6, 3, 2, 0)
    rewards, group_ids = torch.tensor([1.0, 0, 1, 1, 0]), torch.tensor([0, 0, 1, 1, 1])
    for fallback in (5.0, None):
        found = token_group_advantage(rewards, mask, group_ids, fallback=fallback)
        torch.testing.assert_close(found, torch.tensor([1.7320508, -0.5773503, 0, 0, 0]), atol=1e-5, rtol=0)
    seen = PolicyBatch(mask=mask, rewards=rewards, group_ids=group_ids)
    unit = dapo.having(advantage=TokenGroupZScore(), post=(unit_rms,)).advantages(seen)
    torch.testing.assert_close(unit, found / (10 / 15) ** 0.5, atol=1e-4, rtol=0)
    centred = dapo.having(advantage=TokenGroupZScore(), post=(center,)).advantages(seen)
    torch.testing.assert_close(centred, found - found.mean(), atol=1e-4, rtol=0)


def test_clip_bounds_by_hand() -> None:
    low, high = adaptive_clip(torch.tensor([[-0.5, 0.5, 0.0, -1.0, 1.0]]))
    torch.testing.assert_close(low, torch.tensor([[0.3, 0.2, 0.2, 0.4, 0.2]]))
    torch.testing.assert_close(high, torch.tensor([[0.28, 0.42, 0.28, 0.28, 0.56]]))


def test_redistribution_by_hand() -> None:
    signal, ratio = torch.tensor([[0.5, 0.5, -0.5, -0.5, -1.0]]), torch.tensor([[1.0, 1.5, 1.0, 1.5, 1.0]])
    found = redistribute_advantage(torch.full((1, 1), -2.0), signal, ratio, 0.2, 0.28)
    assert found.tolist() == [[-2, -3, -1, -2, 0]]
    assert outside_neutral_zone(ratio, None, None).any().item() is False
    random = redistribute_advantage(
        torch.full((1, 1), -2.0), 2 * torch.rand(1, 99) - 1, 2 * torch.rand(1, 99), 0.2, 0.2
    )
    assert random.max() <= 0


def test_all_parts_off_is_dapo_to_the_bit() -> None:
    off = entropy_aware(dapo, averages_tokens=False, redistributes=False, adapts_clip=False)
    assert off == dapo
    seen = batch()
    for found, expected in zip(told(off, seen), told(dapo, seen), strict=True):
        assert torch.equal(found, expected)
    # With alpha and beta 0 both parts are there and do nothing.
    idle = entropy_aware(dapo, averages_tokens=False, alpha=0.0, beta=0.0)
    for found, expected in zip(told(idle, seen), told(dapo, seen), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)
    # As they do where every token is as uncertain as another.
    flat = seen.having(entropy=torch.full_like(seen.entropy, 0.3))
    parts = entropy_aware(dapo, averages_tokens=False)
    for found, expected in zip(told(parts, flat), told(dapo, flat), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)


def test_the_whole_by_hand() -> None:
    seen = batch()
    signal = EntropyStats.of(seen.entropy, seen.mask).signal(seen.entropy)
    low, high = 0.2 * (1 - signal.clamp(max=0)), 0.28 * (1 + signal.clamp(min=0))
    ratio = (seen.log_probs - seen.behaviour_log_probs).exp()
    has_moved = (ratio < 1 - low / 2) | (ratio > 1 + high / 2)
    counts = torch.where(signal > 0, has_moved, ~has_moved)
    advantage = token_group_advantage(seen.rewards, seen.mask, seen.group_ids)[:, None]
    advantage = advantage * torch.where(counts, 1 + signal, 1.0)
    by_token = -torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    torch.testing.assert_close(told(hapo, seen)[0], by_token[seen.mask].mean())
    whole = seen.having(advantage=hapo.advantages(seen))
    _, metrics = hapo.loss(whole)
    torch.testing.assert_close(metrics["redistribution/moved"], has_moved[seen.mask].float().mean())
    assert metrics["signal/pivot_entropy"] > 0


def test_one_signal_serves_both_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = EntropySignal.__call__
    monkeypatch.setattr(EntropySignal, "__call__", lambda self, view: calls.append(1) or original(self, view))
    told(preset("hapo"), batch())
    assert len(calls) == 1
    assert hapo.loss_needs == {"entropy"}


def test_padding_and_the_order_of_rows_change_nothing() -> None:
    seen = batch()
    whole = seen.having(advantage=hapo.advantages(seen))
    expected = hapo.loss(whole)[0]
    order = torch.tensor([3, 0, 2, 1, 7, 6, 5, 4])
    torch.testing.assert_close(hapo.loss(whole.select(order))[0], expected)
    names = ("mask", "behaviour_log_probs", "log_probs", "entropy")
    pads = {name: torch.nn.functional.pad(getattr(whole, name), (0, 3)) for name in names}
    torch.testing.assert_close(hapo.loss(whole.having(**pads))[0], expected)


def test_no_gradient_reaches_the_entropy() -> None:
    seen = batch()
    entropy = seen.entropy.clone().requires_grad_()
    log_probs = seen.log_probs.clone().requires_grad_()
    whole = seen.having(advantage=hapo.advantages(seen), log_probs=log_probs, entropy=entropy)
    hapo.loss(whole)[0].backward()
    assert entropy.grad is None
    assert log_probs.grad.abs().max() > 0


def test_a_rollouts_statistics_come_with_the_objective() -> None:
    seen = batch()
    objective = entropy_aware(dapo, signal=EntropySignal(scope="rollout"))
    assert objective.rollout_needs == {"entropy"}
    torch.testing.assert_close(told(objective, seen)[0], told(hapo, seen)[0])


def test_a_base_without_two_bounds_is_told() -> None:
    with pytest.raises(ValueError, match="two numbers"):
        entropy_aware(grpo.having(clip=(0.2, None)))
    assert entropy_aware(grpo.having(clip=(0.2, None)), adapts_clip=False).clip == (0.2, None)


def test_temperatures_stay_in_their_bounds_and_keep_the_likeliest_token() -> None:
    entropy = torch.rand(500, generator=torch.Generator().manual_seed(0)) * 3
    stats = EntropyStats.of(entropy[:100])
    temperature = adaptive_temperature(entropy, stats, tau=0.1, base=0.8)
    assert temperature.min() >= 0.8 * 0.9 - 1e-6
    assert temperature.max() <= 0.8 * 1.1 + 1e-6
    assert (temperature[entropy.argsort()].diff() >= 0).all()
    unbounded = adaptive_temperature(torch.tensor([0.0, stats.pivot.exp().item()]), stats, is_bounded=False, tau=0.9)
    torch.testing.assert_close(unbounded, torch.tensor([0.1, 1.0]), atol=1e-4, rtol=0)
    away = (torch.tensor(2.0).log() - stats.pivot) / stats.spread
    found = adaptive_temperature(torch.tensor([2.0]), stats, is_bounded=False, tau=0.1)
    torch.testing.assert_close(found[0], 1 + 0.1 * away)


def test_the_processor_uses_the_rollout_before_and_forgets_finished_rows() -> None:
    process = AdaptiveTemperature(ends={9}, tau=0.5)
    scores = torch.tensor([[2.0, 0.0, 0.0], [0.1, 0.0, 0.0]])
    assert torch.equal(process(torch.zeros(2, 3, dtype=torch.long), scores), scores)
    second = torch.tensor([[0, 0, 0, 9], [0, 0, 0, 1]])
    assert torch.equal(process(second, 3 * scores), 3 * scores)
    assert process.stats is None
    found = process(torch.zeros(2, 3, dtype=torch.long), scores)  # a new rollout
    entropies = torch.distributions.Categorical(logits=torch.cat([scores, 3 * scores[1:]])).entropy()
    torch.testing.assert_close(process.stats.pivot, EntropyStats.of(entropies).pivot)
    assert torch.equal(found.argmax(1), scores.argmax(1))
    own = torch.distributions.Categorical(logits=scores).entropy()
    expected = scores / adaptive_temperature(own, process.stats, tau=0.5)[:, None]
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="tau=1"):
        AdaptiveTemperature(tau=1.0)


def test_it_samples_in_the_loop_and_in_generate(tiny_llama: Any) -> None:
    prompts, _ = encode(["1+2=", "3+4="])
    settings: dict[str, Any] = {"num_samples": 8, "max_new_tokens": 6, "stop_token": STOP, "pad_token": PAD}

    def draw(process: Any, times: int = 2) -> Any:
        generator = torch.Generator().manual_seed(0)
        return [sample(tiny_llama, prompts, process=process, generator=generator, **settings) for _ in range(times)][-1]

    plain, idle = draw(None), draw(AdaptiveTemperature({STOP, PAD}, tau=0.0))
    assert torch.equal(plain.tokens, idle.tokens)
    hot = draw(AdaptiveTemperature({STOP, PAD}, tau=0.5))
    drift = (hot.sampling_log_probs - hot.behaviour_log_probs)[hot.mask]
    assert drift.abs().max() > 0.01


def test_a_rollout_that_drops_ended_rows_is_one_rollout(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    turns, rows = [], []
    original = AdaptiveTemperature._turn
    monkeypatch.setattr(AdaptiveTemperature, "_turn", lambda self: turns.append(len(rows)) or original(self))
    process = AdaptiveTemperature({STOP, PAD}, tau=0.9)

    def ending_early(tokens: Tensor, scores: Tensor) -> Tensor:
        """Three quarters of the rows end at once, and sampling leaves them out from then on."""
        rows.append(len(tokens))
        barred = scores.clone()
        barred[:, [STOP, PAD]] = -torch.inf
        if tokens.shape[1] == 4:
            barred[: 3 * len(tokens) // 4] = -torch.inf
            barred[: 3 * len(tokens) // 4, STOP] = 0.0
        return process(tokens, barred)

    def draw() -> Tensor:
        return sample(
            tiny_llama, encode(["1+2=", "3+4="])[0], num_samples=8, max_new_tokens=5, stop_token=STOP, pad_token=PAD,
            process=ending_early, generator=torch.Generator().manual_seed(0),
        ).sampling_log_probs  # fmt: skip

    drawn = [draw() for _ in range(3)]
    assert rows == 3 * [16, 4, 4, 4, 4]  # the four that go on are all that is worked on
    assert turns == [6, 11]
    assert sum(int(counts.sum()) for _, counts in process._seen) == 16 + 4 * 4
    # No temperature in the first rollout: what was drawn from differs by the barred tokens alone.
    process = AdaptiveTemperature({STOP, PAD}, tau=0.0)
    plain = draw()
    assert torch.equal(drawn[0], plain)
    assert not torch.equal(drawn[1], plain)


def test_it_turns_once_a_call_of_generate(tiny_llama: Any) -> None:
    process = AdaptiveTemperature({STOP, PAD}, tau=0.5)
    prompts, _ = encode(["1+2=", "3+4="])
    told = [
        tiny_llama.generate(
            prompts, do_sample=True, max_new_tokens=5, logits_processor=[process],
            output_logits=True, output_scores=True, return_dict_in_generate=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    for scores, logits in zip(told[0].scores, told[0].logits, strict=True):
        torch.testing.assert_close(scores, logits)
    counts = ~torch.isin(told[0].sequences[:, 3:-1], torch.tensor([STOP, PAD])).T
    entropies = torch.distributions.Categorical(logits=torch.stack(told[0].logits)).entropy()
    torch.testing.assert_close(process.stats.pivot, EntropyStats.of(entropies, counts, eps=1e-6).pivot)
    for scores, logits in zip(told[1].scores, told[1].logits, strict=True):
        own = torch.distributions.Categorical(logits=logits).entropy()
        temperature = adaptive_temperature(own, process.stats, tau=0.5)[:, None]
        assert (temperature - 1).abs().max() > 0.01
        # Entropies of a fresh model lie close together, so that rounding is magnified.
        torch.testing.assert_close(scores, logits / temperature, atol=2e-4, rtol=1e-3)


def test_the_correction_weighs_the_sampler_out() -> None:
    seen = batch(num=4, width=2, mask=torch.tensor([[True, False]]).expand(4, 2).clone())
    sampling = seen.behaviour_log_probs - torch.tensor([[0.5, 3.0], [2.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    found = SamplingCorrection(cap=2.0)(torch.ones(4), seen.having(sampling_log_probs=sampling))
    torch.testing.assert_close(found[:, 0], torch.tensor([0.5, 2.0, -1.0, 0.0]).exp().clamp(max=2))
    objective = hapo.having(post=(SamplingCorrection(),))
    with pytest.raises(ValueError, match="needs sampling_log_probs"):
        objective.advantages(seen)
    with pytest.raises(ValueError, match="cap=0"):
        SamplingCorrection(0.5)
