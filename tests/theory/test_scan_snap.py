"""Scan and snap in closed form: gradients against autograd, the hand-worked case, and the laws of the dynamics."""

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import cross_entropy

from dynascope.data import SequenceClassData
from dynascope.data.sequence_classes import Population
from dynascope.nn import YZTransformer
from dynascope.theory.scan_snap import (
    class_mixtures,
    mixture_entropy,
    population_step,
    relative_gain,
    sample_gradients,
    simulate_population,
    snap_time,
)


def test_closed_form_gradients_are_those_of_autograd() -> None:
    data = SequenceClassData(2, 2, num_unique=3, num_common=4, length=12)
    generator = torch.Generator().manual_seed(0)
    model = YZTransformer(data.vocab).double()
    with torch.no_grad():
        model.Y.copy_(torch.randn(data.vocab, data.vocab, generator=generator))
        model.Z.copy_(torch.randn(data.vocab, data.vocab, generator=generator))
    counts, query, target = data.sample_counts(20, generator)
    cross_entropy(model.forward_counts(counts.double(), query), target).backward()
    assert model.Y.grad is not None
    assert model.Z.grad is not None
    found = sample_gradients(model.Y, model.Z, counts.double(), query, target)
    for_y, for_z = found.mean()
    torch.testing.assert_close(for_y, -model.Y.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(for_z, -model.Z.grad, rtol=0, atol=1e-12)
    assert float(found.attention.detach().sum(1).abs().max()) < 1e-14
    # Two trainings side by side are two trainings.
    twice = torch.stack([model.Y.detach(), 0.5 * model.Y.detach()]), torch.stack([model.Z.detach()] * 2)
    both = sample_gradients(*twice, counts.double()[None], query[None], target[None]).mean()
    alone = sample_gradients(0.5 * model.Y, model.Z, counts.double(), query, target).mean()
    torch.testing.assert_close(both[0][0], for_y)
    torch.testing.assert_close(both[1][1], alone[1])


def small() -> tuple[torch.Tensor, torch.Tensor, Population]:
    """Token 0 is common, tokens 1 and 2 are distinct; both classes are asked by token 0."""
    probs = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]], dtype=torch.float64)
    Y = torch.zeros(3, 3, dtype=torch.float64)
    return Y, torch.zeros_like(Y), Population(probs, torch.zeros(2, dtype=torch.long), torch.tensor([0, 1]))


def test_the_hand_worked_population() -> None:
    Y, Z, population = small()
    Y[0], Y[1], Y[2] = torch.tensor([0.0, 1, -1]), torch.tensor([0.0, -1, 1]), torch.tensor([-1e9, 0, 0])
    mixtures = class_mixtures(Z, population)
    features = mixtures / mixtures.norm(dim=1, keepdim=True)
    torch.testing.assert_close(features[0], torch.tensor([1.0, 1, 0]).double() / math.sqrt(2))
    loss = cross_entropy(features @ Y.T, population.targets)
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-math.sqrt(2))), abs=1e-12)
    assert float(loss) == pytest.approx(0.217622, abs=1e-6)
    moved = population_step(Y, Z, population, 1.0, 1.0)[1] - Z
    torch.testing.assert_close(moved[0], torch.tensor([-0.138289, 0.069145, 0.069145]).double(), rtol=0, atol=1e-6)
    assert torch.equal(moved[1:], torch.zeros(2, 3).double())


def test_at_the_start_attention_is_the_law_of_the_context() -> None:
    data = SequenceClassData(2, 1)
    mixtures = class_mixtures(torch.zeros(data.vocab, data.vocab, dtype=torch.float64), data.population())
    torch.testing.assert_close(mixtures, data.population().probs)
    assert float(mixture_entropy(mixtures)[0]) == pytest.approx(2.8993, abs=1e-4)
    assert float(mixtures[0, data.is_common].sum()) == pytest.approx(0.64516, abs=1e-5)


def test_common_tokens_lose_and_distinct_ones_gain_logits() -> None:
    data = SequenceClassData(2, 1)
    population = data.population()
    Y = Z = torch.zeros(data.vocab, data.vocab, dtype=torch.float64)
    for _ in range(40):
        Y, after = population_step(Y, Z, population, 1.0, 1.0)
        if float(Y.abs().max()) > 1.5:  # once the decoder has moved
            for place, query in enumerate(population.queries):
                moved = (after - Z)[query]
                assert bool((moved[data.is_common] < 0).all())
                assert bool((moved[data.unique[place]] > 0).all())
        Z = after


def test_relative_gains_keep_their_sign_and_grow_and_ties_stay() -> None:
    data = SequenceClassData(2, 1)
    mixtures = torch.stack(list(simulate_population(data.population(), 200, lr_y=1.0, lr_z=1.0)))[:, 0]
    best = int(data.unique[0, -1])
    for other in data.unique[0, :-1].tolist():
        gain = relative_gain(mixtures, best, other)
        assert bool((gain > 0).all())
        # All of them grow while attention scans. Once it is nearly still some give back up to a hundredth.
        assert bool((gain[:50].diff() >= -1e-12).all())
        assert float(gain[-1]) > float(gain[0])
    # Rarer tokens drop further: order of what is left of each by the end is the order of co-occurrence.
    left = (mixtures[-1] / mixtures[0])[data.unique[0]]
    assert bool((left.diff() > 0).all())
    # Common tokens have equal probabilities, and never part.
    assert float(relative_gain(mixtures, 0, 1).abs().max()) < 1e-9


def test_relative_gain_by_hand() -> None:
    assert float(relative_gain(torch.tensor([0.6, 0.3, 0.1]), 0, 1)) == pytest.approx(3.0)


def test_the_population_is_the_limit_of_long_sequences() -> None:
    data = SequenceClassData(2, 1, length=200_001)
    counts, query, target = data.sample_counts(20, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    Y, Z = (torch.randn(2, data.vocab, data.vocab, generator=generator, dtype=torch.float64)) * 0.5
    sampled = sample_gradients(Y, Z, counts.double(), query, target).attention
    population = data.population()
    limit = sample_gradients(Y, Z, population.probs, population.queries, population.targets).attention
    torch.testing.assert_close(sampled, limit[target - population.targets[0]], rtol=0, atol=0.015)


def test_momentum_ends_where_ten_times_the_rate_does_until_the_snap() -> None:
    data = SequenceClassData(2, 1)
    heavy = list(simulate_population(data.population(), 400, lr_y=0.01, lr_z=0.01, momentum=0.9))[-1]
    plain = list(simulate_population(data.population(), 400, lr_y=0.1, lr_z=0.1))[-1]
    torch.testing.assert_close(heavy, plain, rtol=0, atol=2e-3)


def test_snap_time_by_hand() -> None:
    assert snap_time(2, 34, 2.0) == pytest.approx(2 * 2 * 3.526361 / 2.0, rel=1e-6)


@pytest.mark.parametrize("settings", [{"lr_y": 0.0, "lr_z": 1.0}, {"lr_y": 1.0, "lr_z": 1.0, "momentum": 1.0}])
def test_impossible_requests_are_told(settings: dict[str, float]) -> None:
    run: Callable[[], object] = lambda: list(simulate_population(small()[2], 1, **settings))  # type: ignore[arg-type]  # noqa: E731
    with pytest.raises(ValueError, match="must be above 0"):
        run()
