"""Shapes and values that cannot be right are told in one line; everything else passes through."""

from typing import Any

import pytest
import torch

from dynascope.rl.batch import PolicyBatch


def batch(**changes: Any) -> PolicyBatch:
    mask = torch.tensor([[True, True, False], [True, True, True], [False, False, False], [True, False, False]])
    basics = {"mask": mask, "rewards": torch.tensor([1.0, 0, 0, 1]), "group_ids": torch.tensor([0, 0, 1, 1])}
    return PolicyBatch(**{**basics, **changes})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mask": torch.ones(4, 3)}, "mask must be bool"),
        ({"rewards": torch.zeros(3)}, "rewards has shape"),
        ({"group_ids": torch.zeros(5, dtype=torch.long)}, "group_ids has shape"),
        ({"rewards": torch.zeros(4, 1)}, "rewards has shape"),
        ({"log_probs": torch.zeros(4, 4)}, "log_probs has shape"),
        ({"entropy": torch.zeros(4, 3, 1)}, "entropy has shape"),
        ({"hidden": torch.zeros(4, 2, 8)}, "hidden has shape"),
        ({"advantage": torch.zeros(4, 2)}, "advantage must be"),
    ],
)
def test_shapes_that_do_not_go_together(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        batch(**changes)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rewards_that_are_not_finite_name_the_completion(bad: float) -> None:
    with pytest.raises(ValueError, match=r"completions \[2\] are not finite"):
        batch(rewards=torch.tensor([1.0, 0, bad, 1])).check()


def test_log_probs_must_be_finite_where_they_count_only() -> None:
    log_probs = torch.zeros(4, 3)
    log_probs[2] = torch.nan
    assert batch(behaviour_log_probs=log_probs).check().rewards.sum() == 2
    log_probs[1, 2] = -torch.inf
    with pytest.raises(ValueError, match=r"behaviour_log_probs of completions \[1\]"):
        batch(behaviour_log_probs=log_probs).check()


def test_hidden_states_must_be_finite_where_they_count_only() -> None:
    hidden = torch.zeros(4, 3, 2)
    hidden[2] = torch.nan
    batch(hidden=hidden).check()
    hidden[3, 0, 1] = torch.nan
    with pytest.raises(ValueError, match=r"hidden of completions \[3\]"):
        batch(hidden=hidden).check()


def test_a_mask_of_zeros_is_an_error() -> None:
    with pytest.raises(ValueError, match="no completion has a token"):
        batch(mask=torch.zeros(4, 3).bool()).check()


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="a slot needs entropy, hidden"):
        batch().require({"hidden", "entropy", "rewards"}, "a slot")


def test_rows_are_selected_in_every_field_but_the_shared_ones() -> None:
    whole = batch(hidden=torch.randn(4, 3, 2), unembedding=torch.randn(4, 2), num_tokens=torch.tensor(6), step=3)
    some = whole.select(torch.tensor([3, 0]))
    assert some.rewards.tolist() == [1, 1]
    assert some.group_ids.tolist() == [1, 0]
    torch.testing.assert_close(some.hidden, whole.hidden[[3, 0]])
    assert some.unembedding is whole.unembedding
    assert (some.num_tokens, some.step, len(some)) == (6, 3, 2)


def test_minibatches_hold_every_row_once() -> None:
    parts = list(batch().split(3, torch.Generator().manual_seed(0)))
    assert [len(part) for part in parts] == [3, 1]
    assert torch.cat(parts).sort().values.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="at least 1"):
        list(batch().split(0))
