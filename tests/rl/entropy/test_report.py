"""Reports along the entropy of tokens."""

import pytest
import torch

from dynascope.rl.entropy.report import by_entropy, entropy_bins, two_regimes, weight_shares


def test_bins_have_equal_counts_and_leave_padding_out() -> None:
    generator = torch.Generator().manual_seed(0)
    entropy = torch.rand(5, 8, generator=generator)
    mask = torch.arange(8) < torch.tensor([[8], [8], [4], [0], [0]])
    bins = entropy_bins(entropy, mask, 10)
    assert (bins[~mask] == -1).all()
    assert bins[mask].bincount().tolist() == [2] * 10
    assert (bins[mask][entropy[mask].argsort()].diff() >= 0).all()
    with pytest.raises(ValueError, match="at least 1"):
        entropy_bins(entropy, mask, 0)


def test_means_by_bin() -> None:
    entropy = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    mask = torch.ones(1, 4).bool()
    assert by_entropy(torch.tensor([[True, False, True, True]]), entropy, mask, 2).tolist() == [0.5, 1.0]
    assert by_entropy(torch.ones(1, 4), entropy, mask, 8).isnan().sum() == 4


def test_weights_by_hand() -> None:
    mask = torch.arange(6) < torch.tensor([[2], [6], [3]])
    correct = torch.tensor([True, False, False])
    told = weight_shares(torch.tensor([3.0, -0.5, 0.0]), mask, correct)
    assert told["weight/wrong_over_right"].item() == pytest.approx(0.5)
    assert told["weight/token_mean"].item() == pytest.approx(3 / 11)
    assert told["weight/length_wrong_over_right"].item() == pytest.approx(3)  # the third has no weight


def test_lengths_by_prompt_are_not_confused_by_hard_prompts() -> None:
    mask = torch.arange(9) < torch.tensor([[2], [4], [8], [8], [8], [9]])
    correct = torch.tensor([True, False, True, True, False, False])
    group_ids = torch.tensor([5, 5, 1, 1, 1, 7])
    advantage = torch.tensor([1.0, -1.0, 0.5, 0.5, -1.0, -1.0])
    plain, by_prompt = weight_shares(advantage, mask, correct), weight_shares(advantage, mask, correct, group_ids)
    assert plain["weight/length_wrong_over_right"].item() == pytest.approx(7 / 6)
    # The last prompt has nothing to compare with.
    assert by_prompt["weight/length_wrong_over_right"].item() == pytest.approx((4 + 8) / (2 + 8))
    assert plain["weight/wrong_over_right"] == by_prompt["weight/wrong_over_right"]


def test_tokens_of_two_regimes() -> None:
    tokens = torch.tensor([[5, 5, 5, 5, 7, 7, 8]])
    signal = torch.tensor([[-0.1, -0.2, 0.3, 0.4, -0.1, 0.1, 0.9]])
    mask = torch.ones(1, 7).bool()
    assert two_regimes(tokens, signal, mask) == [(5, 2, 2), (7, 1, 1)]
    assert two_regimes(tokens, signal, mask, top=1) == [(5, 2, 2)]
