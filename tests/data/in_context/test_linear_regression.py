"""Prompts of labelled examples are drawn from the law that they state."""

import math
from collections.abc import Callable

import pytest
import torch

from dynascope.data.in_context.linear_regression import LinearRegressionICL, toeplitz_covariance


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_labels_are_a_regression_and_the_query_carries_none() -> None:
    prompts = LinearRegressionICL(3, 7, 0.0).sample(5, seeded(), dtype=torch.float64)
    assert prompts.context.shape == (5, 7, 4)
    torch.testing.assert_close(prompts.y, torch.einsum("bld,bnd->bln", prompts.x, prompts.beta))
    torch.testing.assert_close(prompts.target, torch.einsum("bd,bnd->bn", prompts.query_x, prompts.beta))
    assert torch.equal(prompts.query[:, 3:], torch.zeros(5, 1, dtype=torch.float64))


@pytest.mark.parametrize("query_noise", [True, False])
def test_noise_has_its_variance_and_beta_one_over_d(query_noise: bool) -> None:
    prompts = LinearRegressionICL(4, 5, 0.3, query_noise=query_noise).sample(20_000, seeded())
    residual = prompts.y - torch.einsum("bld,bnd->bln", prompts.x, prompts.beta)
    assert float(residual.var()) == pytest.approx(0.3, rel=0.02)
    assert float(prompts.beta.var()) == pytest.approx(1 / 4, rel=0.02)
    off = prompts.target - torch.einsum("bd,bnd->bn", prompts.query_x, prompts.beta)
    assert float(off.var()) == pytest.approx(0.3 if query_noise else 0.0, rel=0.05, abs=1e-9)


def test_inputs_and_queries_have_the_covariance() -> None:
    covariance = toeplitz_covariance(3, 0.5)
    assert covariance.tolist() == [[1, 0.5, 0.25], [0.5, 1, 0.5], [0.25, 0.5, 1]]
    prompts = LinearRegressionICL(3, 4, 0.1, covariance=covariance).sample(30_000, seeded())
    for rows in (prompts.x.flatten(0, 1), prompts.query_x):
        torch.testing.assert_close(torch.cov(rows.T).double(), covariance, atol=5 / math.sqrt(len(rows)), rtol=0)


def test_tasks_share_inputs_and_use_their_own_coordinates() -> None:
    prompts = LinearRegressionICL(6, 5, 0.0, tasks=[(0, 1, 2, 3), (2, 3)]).sample(20_000, seeded())
    assert prompts.context.shape[-1] == 8
    assert prompts.beta[:, 0, 4:].abs().max() == 0
    assert prompts.beta[:, 1, [0, 1, 4, 5]].abs().max() == 0
    # Each task's labels have variance 1, however many coordinates it has.
    torch.testing.assert_close(prompts.y.var((0, 1)), torch.ones(2), atol=0.03, rtol=0)


def test_a_seed_gives_the_same_prompts_and_length_is_free() -> None:
    sampler = LinearRegressionICL(3, 7, 0.1)
    assert torch.equal(sampler.sample(5, seeded(1)).context, sampler.sample(5, seeded(1)).context)
    assert sampler.sample(5, seeded(1), length=100).y.shape == (5, 100, 1)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: LinearRegressionICL(0, 5, 0.1), "at least 1"),
        (lambda: LinearRegressionICL(3, 5, -0.1), "negative"),
        (lambda: LinearRegressionICL(3, 5, 0.1, tasks=[(0, 3)]), "coordinates from 0 to 2"),
        (lambda: LinearRegressionICL(3, 5, 0.1, tasks=[]), "one or more tasks"),
        (lambda: LinearRegressionICL(3, 5, 0.1, covariance=torch.eye(2)), "3 × 3"),
        (lambda: LinearRegressionICL(2, 5, 0.1, covariance=torch.tensor([[1.0, 2], [2, 1]])), "positive definite"),
        (lambda: LinearRegressionICL(3, 5, 0.1).sample(0), "at least 1"),
        (lambda: toeplitz_covariance(3, 1.0), "between -1 and 1"),
    ],
)
def test_impossible_requests_are_told(call: Callable[[], object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()
