"""Spectral norms by power iteration against the singular value decomposition."""

import torch

from dynascope.probes.views import StepView
from dynascope.probes.weights import Weights, spectral_norms, stable_rank


def view_of(**parameters: torch.Tensor) -> StepView:
    return StepView(0, parameters, {}, {}, {}, {}, {})


def test_spectral_norm_of_a_diagonal_matrix() -> None:
    norms, _ = spectral_norms(torch.diag(torch.tensor([3.0, 1.0]))[None], torch.ones(1, 2, 1), iterations=20)
    torch.testing.assert_close(norms, torch.tensor([3.0]))


def test_first_look_is_right_within_one_percent_and_later_ones_follow() -> None:
    probe = Weights()
    weight = torch.randn(64, 48)
    for _ in range(6):
        seen = probe.measure(view_of(a=weight, b=torch.randn(64, 48), bias=torch.randn(64)))["weights/spectral_norm"][0]
        weight = weight + 0.01 * torch.randn(64, 48)
    expected = torch.linalg.matrix_norm(weight, ord=2)
    torch.testing.assert_close(seen, expected, rtol=0.03, atol=0)
    first = Weights().measure(view_of(a=weight))["weights/spectral_norm"][0]
    torch.testing.assert_close(first, expected, rtol=0.03, atol=0)


def test_power_iteration_never_exceeds_the_true_norm() -> None:
    matrices = torch.randn(5, 20, 30)
    norms, _ = spectral_norms(matrices, torch.randn(5, 30, 3), iterations=1)
    assert (norms <= torch.linalg.matrix_norm(matrices, ord=2) + 1e-5).all()


def test_one_product_with_every_direction_is_exact() -> None:
    matrices = torch.randn(5, 20, 8)
    norms, right = spectral_norms(matrices, torch.randn(5, 8, 8), iterations=0)
    torch.testing.assert_close(norms, torch.linalg.matrix_norm(matrices, ord=2))
    torch.testing.assert_close(right.transpose(1, 2) @ right, torch.eye(8).expand(5, 8, 8), atol=1e-5, rtol=0)


def test_only_matrices_are_measured_and_a_convolution_is_one() -> None:
    view = view_of(conv=torch.randn(4, 3, 2, 2), bias=torch.randn(4), row=torch.randn(1, 9), matrix=torch.randn(5, 6))
    assert Weights().coords(view) == {"matrix": ["conv", "matrix"]}
    measured = Weights().measure(view)
    expected = torch.linalg.matrix_norm(view.parameters["conv"].reshape(4, 12), ord=2)
    torch.testing.assert_close(measured["weights/spectral_norm"][0], expected, rtol=0.02, atol=0)


def test_stable_rank_of_the_identity_is_its_size() -> None:
    eye = torch.eye(7)
    torch.testing.assert_close(stable_rank(eye.norm()[None], torch.ones(1)), torch.tensor([7.0]))


def test_a_zero_matrix_has_norm_zero() -> None:
    assert Weights().measure(view_of(zero=torch.zeros(3, 3)))["weights/spectral_norm"].item() == 0
