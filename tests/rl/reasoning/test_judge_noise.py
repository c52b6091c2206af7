"""Error rates of joined verdicts, and estimates freed of them."""

import itertools

import pytest
import torch

from dynascope.rl.reasoning.judge_noise import JudgeNoiseModel, corrected_share, rogan_gladen


def test_rates_of_three_verdicts() -> None:
    noise = JudgeNoiseModel(0.1, 0.2, n=3)
    assert noise.rates("any") == pytest.approx((0.271, 0.008))
    assert noise.rates("majority") == pytest.approx((0.028, 0.104))
    assert noise.rates("all") == pytest.approx((0.001, 0.488))


@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_rates_by_listing_all_verdicts(n: int) -> None:
    noise = JudgeNoiseModel(0.15, 0.3, n)
    wants = {"any": lambda yes: yes >= 1, "majority": lambda yes: yes > n / 2, "all": lambda yes: yes == n}
    for rule, says in wants.items():
        positive = sum(
            0.15 ** sum(one) * 0.85 ** (n - sum(one)) for one in itertools.product([0, 1], repeat=n) if says(sum(one))
        )
        negative = sum(
            0.7 ** sum(one) * 0.3 ** (n - sum(one)) for one in itertools.product([0, 1], repeat=n) if not says(sum(one))
        )
        assert noise.rates(rule) == pytest.approx((positive, negative))


def test_correction_undoes_the_noise() -> None:
    noise = JudgeNoiseModel(0.1, 0.2)
    for rule in ("any", "majority", "all"):
        assert noise.corrected(noise.expected(0.7, rule), rule) == pytest.approx(0.7)
    assert rogan_gladen(0.01, 0.1, 0.1) == 0.0
    assert rogan_gladen(0.99, 0.1, 0.1) == 1.0
    with pytest.raises(ValueError, match="no better than chance"):
        rogan_gladen(0.5, 0.4, 0.6)


def test_band_holds_as_many_draws_as_it_says() -> None:
    noise = JudgeNoiseModel(0.2, 0.3, n=1)
    low, high = noise.band(40, 60, "majority", confidence=0.9)
    drawn = (torch.rand(20_000, 40) < 0.7).sum(1) + (torch.rand(20_000, 20) < 0.2).sum(1)
    inside = float(((drawn >= low) & (drawn <= high)).double().mean())
    assert inside + 0.01 >= 0.9
    assert inside < 0.96
    assert JudgeNoiseModel(0.0, 0.0).band(3, 5, "all") == (3, 3)
    with pytest.raises(ValueError, match="between 0 and c"):
        noise.band(6, 5, "all")


def test_share_from_a_labelled_sample_covers_the_truth() -> None:
    covered, naive = 0, 0
    for _ in range(200):
        truth, gold = torch.rand(400) < 0.7, torch.rand(200) < 0.5
        judged = torch.where(truth, torch.rand(400) < 0.8, torch.rand(400) < 0.25)
        calibration = torch.where(gold, torch.rand(200) < 0.8, torch.rand(200) < 0.25)
        found = corrected_share(judged, calibration, gold)
        covered += found.low <= 0.7 <= found.high
        naive += abs(float(judged.double().mean()) - 0.7) < 0.03
    assert covered > 180
    assert naive < 80


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        JudgeNoiseModel(1.2, 0.0)
    with pytest.raises(ValueError, match="not 'most'"):
        JudgeNoiseModel(0.1, 0.1).rates("most")
    yes = torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="one kind is missing"):
        corrected_share(yes, yes, yes)
