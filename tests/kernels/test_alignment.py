"""Kernels against labels and against their own past."""

import pytest
import torch
from torch import nn

from dynascope.kernels import (
    centered,
    effective_rank,
    kernel_alignment,
    kernel_distance,
    kernel_velocity,
    label_power,
    ntk,
)

K = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 1.0], [0.0, 1.0, 2.0]])
Y = torch.tensor([1.0, 0.0, -1.0])


def test_alignment_by_hand() -> None:
    assert float(kernel_alignment(K, Y)) == pytest.approx(0.948683, abs=1e-6)
    assert float(kernel_alignment(K, Y, center="none")) == pytest.approx(0.5)
    assert float(kernel_alignment(torch.outer(Y, Y), Y)) == pytest.approx(1.0)


def test_alignment_is_blind_to_scale_and_centred_to_a_constant() -> None:
    for center in ("double", "none"):
        assert kernel_alignment(7 * K, Y, center=center) == pytest.approx(kernel_alignment(K, Y, center=center))
    assert float(kernel_alignment(K + 5, Y)) == pytest.approx(float(kernel_alignment(K, Y)))
    assert float(kernel_alignment(K + 5, Y, center="none")) != pytest.approx(0.5)


def test_several_outputs_align_through_their_own_kernel() -> None:
    targets = torch.randn(3, 2)
    centred = targets - targets.mean(0)
    own, features = centred @ centred.T, centered(K)
    expected = (own * features).sum() / (own.norm() * features.norm())
    assert float(kernel_alignment(K, targets)) == pytest.approx(float(expected), rel=1e-5)


def test_labels_in_the_top_directions() -> None:
    kernel = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    assert label_power(kernel, torch.tensor([0.0, 1.0, 1.0])).tolist() == pytest.approx([0.0, 0.5, 1.0])


def test_effective_rank_counts_equal_eigenvalues() -> None:
    assert float(effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0, -1e-9]))) == pytest.approx(3.0)


def test_the_kernel_of_a_linear_model_stands_still_and_that_of_another_moves() -> None:
    torch.manual_seed(0)
    for model, is_still in (
        (nn.Linear(3, 2), True),
        (nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), False),
    ):
        x = torch.randn(5, 3)
        before = ntk(model, x)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        after = ntk(model, x)
        assert (float(kernel_velocity(before, after)) < 1e-6) is is_still
        assert (float(kernel_distance(after, before)) < 1e-6) is is_still
