"""The quantile tracker really tracks."""

import pytest
import torch

from dynascope.rl.risk.quantiles import QuantileTracker


def started(values: list[float], levels: list[float], lr: float = 0.1) -> QuantileTracker:
    tracker = QuantileTracker(levels, lr)
    tracker.load_state_dict({"levels": tuple(levels), "values": torch.tensor(values)})
    return tracker


def test_updates_by_hand() -> None:
    tracker = started([2.0], [0.2])
    for scores, expected in (([0.0, 1, 2, 3, 4], 1.98), ([2.0, 2, 2, 2], 2.0), ([1.9, 5, 5, 5], 1.995)):
        tracker.update(torch.tensor(scores))
        assert tracker.value(0.2).item() == pytest.approx(expected, abs=1e-6)


def test_the_first_batch_starts_it_at_its_own_quantiles() -> None:
    tracker = QuantileTracker([0.8, 0.2])
    tracker.update(torch.arange(6.0).view(2, 3))
    assert tracker.levels == (0.2, 0.8)
    assert tracker.values.tolist() == [1.0, 4.0]
    assert tracker.value(0.7).item() == 4.0  # the nearest level
    with pytest.raises(ValueError, match="call update first"):
        QuantileTracker([0.5]).value(0.5)


def test_it_converges_to_the_quantiles_of_a_stream_and_follows_when_that_moves() -> None:
    generator = torch.Generator().manual_seed(0)
    levels = [0.1, 0.2, 0.5, 0.8]
    tracker = QuantileTracker(levels, lr=0.05)
    exact = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(levels))
    for shift in (0.0, 3.0):
        for _ in range(1500):
            tracker.update(torch.randn(32, generator=generator) + shift)
        torch.testing.assert_close(tracker.values, exact + shift, atol=0.12, rtol=0)
    assert (tracker.values.diff() > 0).all()


def test_scores_that_are_not_finite_are_left_out() -> None:
    tracker = started([2.0], [0.5])
    tracker.update(torch.tensor([torch.nan, 1.0, torch.inf]))
    assert tracker.values.tolist() == pytest.approx([1.95])  # the only finite one is below
    tracker.update(torch.full((3,), torch.nan))
    assert tracker.values.tolist() == pytest.approx([1.95])


def test_bad_input_is_told() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        QuantileTracker([0.0, 0.5])
    with pytest.raises(ValueError, match="above 0"):
        QuantileTracker([0.5], lr=0.0)
    with pytest.raises(ValueError, match="at least one"):
        QuantileTracker([0.5]).update(torch.zeros(0))
    with pytest.raises(ValueError, match="none of the first scores"):
        QuantileTracker([0.5]).update(torch.full((2,), torch.nan))
    with pytest.raises(ValueError, match="of levels"):
        QuantileTracker([0.5]).load_state_dict(QuantileTracker([0.2]).state_dict())


def test_processes_with_unequal_numbers_of_scores_follow_the_quantiles_of_all(
    of_two_processes: list[dict[str, torch.Tensor]],
) -> None:
    whole = QuantileTracker([0.2, 0.8])
    whole.update(torch.arange(10.0))
    whole.update(2 * torch.arange(10.0))
    for one in of_two_processes:
        torch.testing.assert_close(one["quantiles"], whole.values)
