"""Weights, updates and their ratio."""

import torch

from dynascope.probes.updates import Updates, update_ratio
from dynascope.probes.views import StepView


def test_ratio_of_a_thousandth_and_of_a_zero_weight() -> None:
    ratios = update_ratio(torch.tensor([1e-3, 1.0]), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(ratios, torch.tensor([1e-3, torch.inf]))


def test_norms_of_weights_and_updates() -> None:
    weights, updates = {"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([0.6, 0.8])}
    found = Updates().measure(StepView(0, weights, {}, {}, updates, {}, {}))
    assert found["weights/norm"].tolist() == [5.0]
    torch.testing.assert_close(found["updates/norm"], torch.tensor([1.0]))
    torch.testing.assert_close(found["updates/ratio"], torch.tensor([0.2]))


def test_half_precision_does_not_overflow() -> None:
    large = {"w": torch.full((1000,), 300.0, dtype=torch.float16)}  # the sum of squares is 9e7, beyond float16
    found = Updates().measure(StepView(0, large, {}, {}, large, {}, {}))
    torch.testing.assert_close(found["weights/norm"], torch.tensor([300.0 * 1000**0.5]))
