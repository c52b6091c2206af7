"""Pass@K: worked numbers, unbiasedness, and what curves make of ragged and weighted prompts."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
import torch

from dynascope.rl.reasoning.pass_at_k import (
    cot_pass_at_k,
    curve_from_counts,
    pass_at_k,
    pass_at_k_curve,
    pass_at_k_variance,
)


def test_worked_numbers() -> None:
    close = {"atol": 5e-7, "rtol": 0}
    expected = torch.tensor([0.5, 11 / 12, 0.996032, 1.0], dtype=torch.float64)
    torch.testing.assert_close(pass_at_k(10, 5, [1, 3, 5, 8]), expected, **close)
    expected = torch.tensor([0.2, 0.533333, 0.777778, 0.977778, 1.0], dtype=torch.float64)
    torch.testing.assert_close(cot_pass_at_k(10, 2, [1, 3, 5, 8, 9]), expected, **close)
    assert float(pass_at_k(1024, 3, 512)) == pytest.approx(0.8753666, abs=5e-8)
    assert float(pass_at_k(1024, 40, 64)) == pytest.approx(0.9281887, abs=5e-8)


def test_every_subset_counted() -> None:
    right = [True, True, False, False, False, False, True]
    for k in range(1, 8):
        hits = [any(right[i] for i in chosen) for chosen in combinations(range(7), k)]
        assert float(pass_at_k(7, 3, k)) == pytest.approx(sum(hits) / len(hits), abs=1e-15)


def test_exact_to_twelve_digits_at_1024() -> None:
    ks = [1, 2, 7, 64, 300, 512, 1000, 1023, 1024]
    counts = [0, 1, 2, 3, 40, 500, 512, 900, 1023, 1024]
    exact = [[1 - comb(1024 - c, k) / comb(1024, k) for k in ks] for c in counts]
    found = pass_at_k(1024, counts, ks)
    assert float((found - torch.tensor(exact, dtype=torch.float64)).abs().max()) < 1e-12


def test_ends_and_order() -> None:
    n = 12
    table = pass_at_k(n, torch.arange(n + 1), torch.arange(1, n + 1))
    torch.testing.assert_close(table[:, 0], torch.arange(n + 1) / torch.tensor(12.0, dtype=torch.float64))
    assert table[:, -1].tolist() == [0.0] + [1.0] * n
    assert bool((table.diff(dim=0) >= 0).all())
    assert bool((table.diff(dim=1) >= 0).all())
    assert bool((table[5, n - 5 :] == 1).all())  # fewer than k wrong answers: success is sure


def test_cot_pass_at_k_is_never_above_pass_at_k() -> None:
    c = torch.arange(17)
    ks = [1, 2, 4, 8, 16]
    for d in range(17):
        behind = pass_at_k(16, c[d:], ks) - cot_pass_at_k(16, d, ks)
        assert bool((behind >= 0).all())
        assert bool((behind[0] == 0).all())
        is_saturated = cot_pass_at_k(16, d, ks) == 1
        assert bool(((behind[1:] == 0) == is_saturated).all())


@pytest.mark.parametrize(("n", "k", "p"), [(5, 2, 0.3), (20, 7, 0.05), (64, 32, 0.9), (300, 10, 0.01)])
def test_unbiased_and_its_variance(n: int, k: int, p: float) -> None:
    pmf = [comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    estimates = pass_at_k(n, range(n + 1), k).tolist()
    mean = sum(weight * value for weight, value in zip(pmf, estimates, strict=True))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    variance = sum(weight * (value - mean) ** 2 for weight, value in zip(pmf, estimates, strict=True))
    assert float(pass_at_k_variance(n, p, k)) == pytest.approx(variance, abs=1e-12)


def test_variance_of_pass_at_1_is_that_of_a_mean() -> None:
    p = torch.tensor([0.0, 0.2, 1.0])
    found = pass_at_k_variance(100, p, [1, 100])
    assert found.shape == (3, 2)
    torch.testing.assert_close(found[:, 0], (p * (1 - p) / 100).double(), atol=1e-9, rtol=0)
    assert found[0].tolist() == [0.0, 0.0]


def test_arrays_lists_and_tensors_give_the_same() -> None:
    whole = pass_at_k(torch.tensor([4, 6]), torch.tensor([1, 2]), torch.tensor([1, 3]))
    assert whole.shape == (2, 2)
    assert torch.equal(whole, pass_at_k(np.array([4, 6]), [1, 2], (1, 3)))
    assert float(whole[1, 1]) == float(pass_at_k(6, 2, 3))
    assert pass_at_k(torch.tensor([[4, 6]]), 1, 2).shape == (1, 2)


@pytest.mark.parametrize(
    ("n", "c", "k", "told"),
    [
        (4, 1, 5, "fewest answers"),
        ([8, 4], [1, 1], 8, "fewest answers of a prompt, 4"),
        (4, 1, 0, "between 1"),
        (4, 5, 1, "between 0 and n"),
        (4, -1, 1, "between 0 and n"),
        (4, torch.tensor([0.5]), 1, "whole numbers"),
        ([], [], 1, "n is empty"),
    ],
)
def test_what_is_refused(n: object, c: object, k: object, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        pass_at_k(n, c, k)  # type: ignore[arg-type]


def test_ragged_rows_count_only_their_own_answers() -> None:
    correct = torch.tensor([[1, 0, 0, 0], [1, 0, 1, 1]]).bool()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    curve = pass_at_k_curve(correct, [1, 2], mask=mask)
    torch.testing.assert_close(curve.per_prompt, torch.tensor([[0.25, 0.5], [0.5, 1.0]]).double())
    assert curve.mean.tolist() == [0.375, 0.75]
    torch.testing.assert_close(curve.mean, curve_from_counts([4, 2], [1, 1], [1, 2]).mean)


def test_weights_are_repetitions() -> None:
    n, c = [10, 10, 10], [0, 3, 9]
    weighted = curve_from_counts(n, c, [1, 4], weights=torch.tensor([1.0, 2.0, 1.0]))
    repeated = curve_from_counts([10] * 4, [0, 3, 3, 9], [1, 4])
    torch.testing.assert_close(weighted.mean, repeated.mean)
    with pytest.raises(ValueError, match="negative"):
        curve_from_counts(n, c, [1], weights=torch.tensor([1.0, -1.0, 1.0]))
    with pytest.raises(ValueError, match="one weight a prompt"):
        curve_from_counts(n, c, [1], weights=torch.ones(2))


def test_standard_error_is_that_of_a_mean_and_bootstrap_agrees() -> None:
    correct = torch.rand(400, 16) < torch.rand(400, 1)
    curve = pass_at_k_curve(correct, [1, 4, 16])
    torch.testing.assert_close(curve.standard_error, curve.per_prompt.std(0) / 20)
    resampled = pass_at_k_curve(correct, [1, 4, 16], resamples=4000, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(resampled.mean, curve.mean)
    torch.testing.assert_close(resampled.low, curve.low, atol=3e-3, rtol=0)
    torch.testing.assert_close(resampled.high, curve.high, atol=3e-3, rtol=0)


def test_one_prompt_has_no_interval() -> None:
    curve = curve_from_counts([8], [2], [1, 8], resamples=10)
    assert curve.mean.tolist() == [0.25, 1.0]
    assert bool(curve.low.isnan().all())
