"""The entropy of a softmax under a step, and the covariance of two objectives with the log-probabilities."""

import pytest
import torch

from dynascope.rl.monitors import entropy_covariance
from dynascope.rl.risk.measures import mvar_advantage
from dynascope.theory.riskpo import discrete_quantile, entropy_rate


def entropy(logits: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()


def test_the_rate_is_that_of_the_entropy() -> None:
    logits, advantage = torch.tensor([1.0, 0, -1], dtype=torch.float64), torch.tensor([1.0, 0, -1], dtype=torch.float64)
    step = 1e-4
    difference = (entropy(logits + step * advantage) - entropy(logits)) / step
    assert difference.item() == pytest.approx(-0.42441, abs=1e-5)
    assert entropy_rate(logits, advantage).item() == pytest.approx(-0.42440, abs=1e-5)
    assert torch.allclose(entropy_rate(logits, advantage + 7), entropy_rate(logits, advantage))


def test_samples_estimate_it() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, advantage = torch.tensor([2.0, 0, -1, 0.5]), torch.tensor([1.0, -1, 3, 0])
    drawn = torch.multinomial(logits.softmax(-1), 200_000, replacement=True, generator=generator)
    found = entropy_covariance(logits.log_softmax(-1)[drawn], advantage[drawn])
    assert found.item() == pytest.approx(-entropy_rate(logits, advantage).item(), abs=0.01)


def test_padding_has_no_part_in_the_covariance() -> None:
    log_probs, advantage = torch.tensor([[-1.0, -2.0, torch.nan]]), torch.tensor([[1.0, 0.0, torch.nan]])
    assert entropy_covariance(log_probs, advantage, torch.tensor([[True, True, False]])).item() == pytest.approx(0.25)


def covariances(logits: torch.Tensor, omega: float) -> tuple[float, float]:
    """Of the averse measure and of the mean, over scores 0, 1, 2, …"""
    scores, probs = torch.arange(len(logits), dtype=torch.float64), logits.softmax(-1)
    low, high = (discrete_quantile(scores, probs, level) for level in (0.2, 0.8))
    assert scores[0] < low < high < scores[-1]
    return -entropy_rate(logits, mvar_advantage(scores, low, high, omega)).item(), -entropy_rate(logits, scores).item()


@pytest.mark.parametrize("omega", [0.0, 0.5])
def test_where_log_probabilities_rise_into_both_tails_the_averse_measure_keeps_more_entropy_than_the_mean(
    omega: float,
) -> None:
    """Theorem 2: it drops what the upper tail asks for, and asks more of the lower one, whose worst answers are its likeliest."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        steps = 0.2 * torch.rand(15, generator=generator, dtype=torch.float64).cumsum(0)
        logits = torch.cat([steps.flip(0), torch.zeros(1, dtype=torch.float64), steps])
        averse, mean = covariances(logits, omega)
        assert averse < mean - 1e-3


def test_the_two_differ_by_what_the_tails_ask_for() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, scores = torch.randn(31, generator=generator, dtype=torch.float64), torch.arange(31.0, dtype=torch.float64)
    low, high = (discrete_quantile(scores, logits.softmax(-1), level) for level in (0.2, 0.8))
    upper, lower = (-entropy_rate(logits, tail.clamp(min=0)).item() for tail in (scores - high, low - scores))
    averse, mean = covariances(logits, 0.5)
    assert averse - mean == pytest.approx(-upper - 0.5 * lower)


def test_without_its_premise_theorem_2_says_nothing() -> None:
    """Where the worst answers are the rarest, the tail's own weight costs entropy."""
    generator = torch.Generator().manual_seed(0)
    logits = 0.2 * torch.rand(31, generator=generator, dtype=torch.float64).cumsum(0)
    plain, mean = covariances(logits, 0.0)
    assert plain < mean < covariances(logits, 0.5)[0]


def test_quantiles_of_a_discrete_distribution() -> None:
    scores, probs = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([0.5, 0.2, 0.3])
    assert [discrete_quantile(scores, probs, level).item() for level in (0.2, 0.21, 0.5, 0.51, 1.0)] == [0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="above 0"):
        discrete_quantile(scores, probs, 0.0)
