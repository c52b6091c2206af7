"""The residual stream."""

import pytest
import torch

from dynascope.probes.residual import Residual, effective_rank, residual_peak
from dynascope.probes.views import ModuleOutput


@pytest.mark.parametrize("shape", [(10, 4), (4, 10)])
def test_effective_rank_of_equal_directions_is_their_number(shape: tuple[int, int]) -> None:
    basis, _ = torch.linalg.qr(torch.randn(max(shape), min(shape)))
    matrix = basis if shape[0] > shape[1] else basis.T
    assert effective_rank(matrix).item() == pytest.approx(4.0, rel=1e-3)


def test_effective_rank_of_one_direction_is_one() -> None:
    assert effective_rank(torch.outer(torch.randn(8), torch.randn(5))).item() == pytest.approx(1.0, abs=0.02)


def test_effective_rank_is_the_entropy_of_singular_values() -> None:
    # singular values 3 and 1: shares 3/4 and 1/4
    share = torch.tensor([0.75, 0.25])
    expected = (-(share * share.log()).sum()).exp().item()
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))).item() == pytest.approx(expected, rel=1e-5)


def test_peak_is_the_largest_norm_over_the_median() -> None:
    states = torch.ones(2, 5, 3)
    states[0, 0] = 10.0
    assert residual_peak(states).item() == pytest.approx((10 + 1) / 2)


def test_images_have_no_positions_to_peak() -> None:
    found = Residual().measure(ModuleOutput("", None, torch.randn(2, 3, 4, 4), is_channels_first=True))
    assert set(found) == {"residual/rms", "residual/effective_rank"}
