"""Each denominator by hand, and parts that add up to the whole."""

import pytest
import torch

from dynascope.rl.aggregation import aggregate

VALUES = torch.cat([torch.full((1, 6), -1.0), torch.full((1, 6), 1.0)])
MASK = torch.tensor([[True, True, False, False, False, False], [True] * 6])
"""Loss −1 at the two tokens of one completion, +1 at the six of another."""


@pytest.mark.parametrize(
    ("denominator", "expected"),
    [
        ("token-mean", 0.5),
        ("seq-mean-token-mean", 0.0),
        ("seq-mean-token-sum", 2.0),
        ("max-length", 0.25),
        ("microbatch", 0.5),
        ("group-token-mean", 0.5),
    ],
)
def test_two_completions_by_hand(denominator: str, expected: float) -> None:
    found = aggregate(VALUES, MASK, denominator, max_length=8, group_ids=torch.zeros(2, dtype=torch.long))
    assert found.item() == pytest.approx(expected)


def test_prompts_weigh_the_same_in_the_group_mean() -> None:
    # Tokens of the first prompt: 2 of -1 and 6 of 1; of the second: 1 of 5.
    values, mask = torch.cat([VALUES, torch.full((1, 6), 5.0)]), torch.cat([MASK, torch.eye(6)[:1].bool()])
    found = aggregate(values, mask, "group-token-mean", group_ids=torch.tensor([3, 3, 9]))
    assert found.item() == pytest.approx((0.5 + 5) / 2)


@pytest.mark.parametrize("denominator", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "max-length"])
def test_micro_batches_add_up_to_the_whole(denominator: str) -> None:
    values, mask = torch.randn(8, 5), torch.rand(8, 5) > 0.4
    whole = aggregate(values, mask, denominator, max_length=5)
    parts = [
        aggregate(values[rows], mask[rows], denominator, num_tokens=mask.sum(), num_completions=8, max_length=5)
        for rows in (slice(0, 3), slice(3, 8))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_the_microbatch_mean_weighs_long_and_short_ones_the_same() -> None:
    parts = [aggregate(VALUES[[row]], MASK[[row]], "microbatch", num_completions=2) for row in (0, 1)]
    assert sum(parts).item() == 0


@pytest.mark.parametrize("denominator", ["token-mean", "seq-mean-token-mean", "microbatch", "group-token-mean"])
def test_no_token_gives_zero(denominator: str) -> None:
    found = aggregate(VALUES, torch.zeros(2, 6).bool(), denominator, group_ids=torch.zeros(2, dtype=torch.long))
    assert found.item() == 0


def test_padding_changes_nothing() -> None:
    wider = torch.nn.functional.pad(VALUES, (0, 3), value=9.0), torch.nn.functional.pad(MASK, (0, 3))
    for denominator in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "max-length"):
        assert aggregate(*wider, denominator, max_length=8) == aggregate(VALUES, MASK, denominator, max_length=8)


def test_one_value_a_completion_stands_for_each_of_its_tokens() -> None:
    for denominator in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "max-length", "group-token-mean"):
        found, expected = (
            aggregate(values, MASK, denominator, max_length=8, group_ids=torch.zeros(2, dtype=torch.long))
            for values in (VALUES[:, :1], VALUES)
        )
        torch.testing.assert_close(found, expected)


def test_what_is_missing_is_told() -> None:
    with pytest.raises(ValueError, match="needs max_length"):
        aggregate(VALUES, MASK, "max-length")
    with pytest.raises(ValueError, match="needs group_ids"):
        aggregate(VALUES, MASK, "group-token-mean")
    with pytest.raises(ValueError, match="there is no denominator"):
        aggregate(VALUES, MASK, "mean")
