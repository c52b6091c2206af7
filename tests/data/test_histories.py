"""Forgetting and cartography over visits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynascope.data import ForgettingTracker, cartography, stacked_visits


def tracked(histories: list[list[int]]) -> list[float]:
    tracker = ForgettingTracker(len(histories))
    for visit in range(max(map(len, histories))):
        ids = [index for index, history in enumerate(histories) if visit < len(history)]
        tracker.update(torch.tensor(ids), torch.tensor([bool(histories[index][visit]) for index in ids]))
    return tracker.scores().tolist()


def test_forgetting_counts_falls_from_right_to_wrong() -> None:
    assert tracked([[1, 1, 0, 1, 0], [0, 0, 0], [0, 1, 1]]) == [2.0, float("inf"), 0.0]


def test_never_seen_is_not_never_learned() -> None:
    tracker = ForgettingTracker(2)
    tracker.update(torch.tensor([0]), torch.tensor([False]))
    assert tracker.scores()[0] == float("inf")
    assert tracker.scores()[1].isnan()


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=30), st.integers(1, 7), st.randoms())
def test_batches_and_their_order_do_not_matter(visits: list[tuple[int, bool]], size: int, random: object) -> None:
    """Only the order of one example's own visits counts, also when they share a batch."""

    def scores(batches: list[list[tuple[int, bool]]]) -> list[float]:
        tracker = ForgettingTracker(5)
        for batch in batches:
            tracker.update(torch.tensor([index for index, _ in batch]), torch.tensor([right for _, right in batch]))
        return tracker.scores().nan_to_num(-1.0).tolist()

    one_by_one = scores([[visit] for visit in visits])
    assert scores([visits[start : start + size] for start in range(0, len(visits), size)]) == one_by_one
    by_example = sorted(visits, key=lambda visit: visit[0])
    assert scores([by_example]) == one_by_one


def test_ids_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0 … 2"):
        ForgettingTracker(3).update(torch.tensor([3]), torch.tensor([True]))


def test_map_of_a_dataset() -> None:
    confidence = np.array([[0.2, 1.0], [0.8, np.nan]])
    found = cartography(confidence, np.array([[0.0, 1.0], [1.0, np.nan]]))
    assert found["confidence"].tolist() == pytest.approx([0.5, 1.0])
    assert found["variability"].tolist() == pytest.approx([0.3, 0.0])
    assert found["correctness"].tolist() == [0.5, 1.0]
    with pytest.raises(ValueError, match="same visits"):
        cartography(confidence, confidence[:1])


def test_visits_stack_by_example() -> None:
    table = stacked_visits([np.array([1, 0]), np.array([1])], [np.array([0.1, 0.2]), np.array([0.3])], 3)
    np.testing.assert_array_equal(table, [[0.2, 0.1, np.nan], [np.nan, 0.3, np.nan]])
