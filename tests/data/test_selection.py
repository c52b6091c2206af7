"""Which examples are kept."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Subset, TensorDataset

from dynascope.data import PrunedSampler, class_shares, select

SCORES = np.array([0.1, 0.9, 0.5, 0.7, 0.3])


def test_highest_scores_are_kept_in_the_order_of_positions() -> None:
    assert select(SCORES, keep=0.6) == [1, 2, 3]
    assert select(torch.tensor(SCORES), keep=0.6) == [1, 2, 3]


def test_all_are_kept_at_one() -> None:
    assert select(SCORES, keep=1.0) == [0, 1, 2, 3, 4]


def test_hardest_can_be_left_out_first() -> None:
    assert select(SCORES, keep=0.4, drop_hardest=0.2) == [2, 3]


def test_never_learned_examples_are_the_hardest() -> None:
    assert select(np.array([np.inf, 0.0, 1.0]), keep=1 / 3) == [0]


def test_equal_scores_fall_in_the_order_of_positions() -> None:
    assert select(np.zeros(4), keep=0.5) == [2, 3]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.integers(1, 9))
def test_windows_add_up(scores: list[float], tenths: int) -> None:
    values = np.array(scores)
    size = round(tenths / 10 * len(scores))
    upper = select(values, keep=tenths / 10)
    assert len(upper) == size
    whole = select(values, keep=1.0)
    rest = sorted(set(whole) - set(upper))
    assert max([values[index] for index in rest], default=0) <= min([values[index] for index in upper], default=1)


@given(st.lists(st.integers(0, 3), min_size=4, max_size=60), st.sampled_from([0.2, 0.5, 0.8]))
def test_each_class_keeps_its_share_within_one_example(labels: list[int], keep: float) -> None:
    values = np.random.default_rng(0).random(len(labels))
    kept = np.array(labels)[select(values, keep=keep, per_class=np.array(labels))]
    for label in set(labels):
        assert abs(np.sum(kept == label) - keep * labels.count(label)) <= 1


def test_class_shares_tell_what_pruning_did() -> None:
    assert class_shares([0, 1], np.array([0, 0, 1, 1])) == {0: (0.5, 1.0), 1: (0.5, 0.0)}


def test_impossible_shares_and_missing_scores_are_refused() -> None:
    for settings in ({"keep": 0.0}, {"keep": 1.5}, {"keep": 0.8, "drop_hardest": 0.4}):
        with pytest.raises(ValueError, match="shares"):
            select(SCORES, **settings)
    with pytest.raises(ValueError, match="1 scores are NaN"):
        select(np.array([0.0, np.nan]))
    with pytest.raises(ValueError, match="2 labels for 5"):
        select(SCORES, per_class=np.array([0, 1]))


def test_selection_fits_a_subset() -> None:
    data = TensorDataset(torch.arange(5))
    assert [int(value) for (value,) in Subset(data, select(SCORES, keep=0.4))] == [1, 3]


def test_sampler_goes_through_the_kept_ones_once_an_epoch() -> None:
    sampler = PrunedSampler([4, 7, 9], seed=1)
    assert [sorted(sampler), sorted(sampler)] == [[4, 7, 9]] * 2
    assert len(sampler) == 3


def test_sampler_can_keep_the_number_of_steps() -> None:
    data = TensorDataset(torch.arange(10))
    loader = DataLoader(data, batch_size=5, sampler=PrunedSampler([4, 7, 9], epoch_size=10))
    drawn = [int(value) for (batch,) in loader for value in batch]
    assert len(loader) == 2
    assert {value: drawn.count(value) for value in set(drawn)}.keys() == {4, 7, 9}
    assert max(map(drawn.count, (4, 7, 9))) - min(map(drawn.count, (4, 7, 9))) <= 1


def test_orders_repeat_by_seed_and_epoch() -> None:
    first, second = PrunedSampler(range(20), seed=3), PrunedSampler(range(20), seed=3)
    orders = [list(first), list(first)]
    assert orders[0] != orders[1]
    second.set_epoch(1)
    assert list(second) == orders[1]
    with pytest.raises(ValueError, match="no examples"):
        PrunedSampler([])
