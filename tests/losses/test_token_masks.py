"""Token masks: the diff of two responses against difflib and by hand, ones as no mask, and the learnt mask."""

import random

import pytest
import torch

from dynascope.losses import (
    PreferencePairs,
    SparseTokenMask,
    coefficients_by_autograd,
    contrastive_token_mask,
    gradient_contrast_mask,
    margin_loss,
    masked_pairs,
)


def mask_of(chosen: list[int], rejected: list[int]) -> tuple[list[bool], list[bool]]:
    sides = [torch.tensor([one], dtype=torch.long) for one in (chosen, rejected)]
    found = contrastive_token_mask(*sides, *[torch.ones_like(one) for one in sides])
    return found[0][0].tolist(), found[1][0].tolist()


def longest_common(one: list[int], two: list[int]) -> int:
    if not one or not two:
        return 0
    if one[-1] == two[-1]:
        return 1 + longest_common(one[:-1], two[:-1])
    return max(longest_common(one[:-1], two), longest_common(one, two[:-1]))


def test_a_replaced_token_is_the_only_difference() -> None:
    assert mask_of([7, 1, 2, 3], [8, 1, 2, 3]) == ([True, False, False, False], [True, False, False, False])


def test_an_inserted_token_is_the_only_difference() -> None:
    assert mask_of([1, 2, 3], [1, 9, 2, 3]) == ([False, False, False], [False, True, False, False])


def test_what_is_left_is_a_longest_common_subsequence() -> None:
    drawn = random.Random(0)
    for _ in range(40):
        one, two = ([drawn.randrange(3) for _ in range(drawn.randrange(1, 8))] for _ in range(2))
        first, second = mask_of(one, two)
        kept = [token for token, differs in zip(one, first, strict=True) if not differs]
        assert kept == [token for token, differs in zip(two, second, strict=True) if not differs]
        assert len(kept) == longest_common(one, two)


def test_prompts_and_padding_never_differ() -> None:
    chosen, rejected = torch.tensor([[4, 4, 1, 0]]), torch.tensor([[5, 5, 2, 3]])
    found = contrastive_token_mask(chosen, rejected, torch.tensor([[0, 0, 1, 0]]), torch.tensor([[0, 0, 1, 1]]))
    assert found[0].tolist() == [[False, False, True, False]]
    assert found[1].tolist() == [[False, False, True, True]]


def test_pairs_of_a_batch_are_apart() -> None:
    chosen, rejected = torch.randint(3, (20, 9)), torch.randint(3, (20, 7))
    masks = torch.ones_like(chosen), torch.ones_like(rejected)
    whole = contrastive_token_mask(chosen, rejected, *masks)
    single = [
        contrastive_token_mask(chosen[i : i + 1], rejected[i : i + 1], masks[0][:1], masks[1][:1]) for i in range(20)
    ]
    assert torch.equal(whole[0], torch.cat([one[0] for one in single]))
    assert torch.equal(whole[1], torch.cat([one[1] for one in single]))


@pytest.mark.parametrize("name", ["dpo", "simpo", "orpo", "rdpo"])
def test_identical_responses_have_no_gradient_under_the_diff_mask(name: str) -> None:
    tokens, log_probs = torch.randint(9, (2, 5)), -torch.rand(2, 5)
    sides = log_probs.clone().requires_grad_(), log_probs.clone().requires_grad_()
    masks = contrastive_token_mask(tokens, tokens, torch.ones(2, 5), torch.ones(2, 5))
    margin_loss(name)(masked_pairs(*sides, *masks, log_probs, log_probs)).sum().backward()
    assert all(bool((side.grad == 0).all()) for side in sides)


@pytest.mark.parametrize("name", ["dpo", "simpo", "cpo"])
def test_a_mask_of_ones_is_no_mask(name: str) -> None:
    chosen, rejected, ref_chosen, ref_rejected = (-torch.rand(3, size) for size in (5, 4, 5, 4))
    lengths = torch.full((3,), 5.0), torch.full((3,), 4.0)
    sums = [one.sum(1) for one in (chosen, rejected, ref_chosen, ref_rejected)]
    found = masked_pairs(chosen, rejected, torch.ones(3, 5), torch.ones(3, 4), ref_chosen, ref_rejected)
    torch.testing.assert_close(margin_loss(name)(found), margin_loss(name)(PreferencePairs(*sums, *lengths)))


AVERAGING = {"simpo": {}, "orpo": {}, "rrhf": {}, "ipo": {"is_averaged": True}, "cpo": {"is_averaged": True}}


@pytest.mark.parametrize("name", ["simpo", "orpo", "rrhf", "ipo"])
@pytest.mark.parametrize(("weight", "size"), [(0.886, 1), (0.05, 10)])
def test_equal_weights_below_one_leave_means_as_they_are(name: str, weight: float, size: int) -> None:
    sides = [-torch.rand(3, size) for _ in range(4)]
    loss, full = margin_loss(name, **AVERAGING[name]), [torch.full((3, size), value) for value in (weight, 1.0)]
    found, expected = (loss(masked_pairs(*sides[:2], one, one, *sides[2:])) for one in full)
    if name == "rrhf":  # its likelihood is a sum
        found, expected = found + weight * sides[0].sum(1), expected + sides[0].sum(1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", AVERAGING)
def test_of_a_pure_insertion_only_the_longer_response_is_learnt_from(name: str) -> None:
    chosen, rejected = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 9, 2, 3]])
    masks = contrastive_token_mask(chosen, rejected, torch.ones(1, 3), torch.ones(1, 4))
    sides = [(-torch.rand(1, size) - 0.1).requires_grad_() for size in (3, 4)]
    pairs = masked_pairs(*sides, *masks, -torch.ones(1, 3), -torch.ones(1, 4))
    loss = margin_loss(name, **AVERAGING[name])
    loss(pairs).sum().backward()
    assert sides[0].grad.tolist() == [[0, 0, 0]]
    assert (sides[1].grad != 0).tolist() == [[False, name != "rrhf" or sides[1][0, 1] > 0, False, False]]
    for found, expected in zip(loss.coefficients(pairs), coefficients_by_autograd(loss, pairs), strict=True):
        torch.testing.assert_close(found, expected)


def test_odds_of_an_insertion_by_hand() -> None:
    # p = ½ for the rejected response, even odds for the other: −λ log σ(0 − 0), and push λ σ(0) / (1 − ½)
    half = torch.log(torch.tensor([0.5]))
    pairs = PreferencePairs(torch.zeros(1), half, None, None, torch.zeros(1), torch.ones(1))
    loss = margin_loss("orpo", weight=0.1)
    torch.testing.assert_close(loss(pairs), 0.1 * torch.log(torch.tensor([2.0])))
    torch.testing.assert_close(loss.coefficients(pairs), (torch.zeros(1), torch.tensor([0.1])))


def test_negative_lengths_are_refused() -> None:
    ones = torch.ones(1)
    with pytest.raises(ValueError, match="a length is negative"):
        _ = PreferencePairs(-ones, -ones, None, None, -ones, ones).averages


def test_contrasting_gradients_are_those_against_the_other_response() -> None:
    chosen, rejected = gradient_contrast_mask(torch.tensor([[-1.0, 0.2], [0.1, 0.5]]))
    assert chosen.tolist() == [True, False]
    assert rejected.tolist() == [True, False]


def test_learnt_mask_starts_near_one_and_ends_at_the_tokens_that_matter() -> None:
    mask, is_response = SparseTokenMask(4, penalty=0.05, floor=0.1), torch.ones(16, 6)
    hidden = torch.randn(16, 6, 4)
    start = mask(hidden, is_response)
    torch.testing.assert_close(start, torch.full_like(start, 0.1 + 0.9 * torch.sigmoid(torch.tensor(2.0)).item()))
    helps = hidden[..., 0] > 0  # tokens that separate the responses, the others do not
    optimizer = torch.optim.Adam(mask.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        weights = mask(hidden, is_response)
        (-torch.nn.functional.logsigmoid((weights * helps).sum(1)).mean() + mask.cost(weights, is_response)).backward()
        optimizer.step()
    assert weights[helps].mean() > 0.7
    assert weights[~helps].mean() < 0.3
    assert weights.min() >= 0.1


@pytest.mark.parametrize("settings", [{"floor": 1.0}, {"penalty": -1.0}])
def test_impossible_masks_are_told(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be at least 0"):
        SparseTokenMask(4, **settings)
