"""Where an objective works along the entropy of tokens, and whom it weighs: reports on a rollout or minibatch."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dynascope.rl.advantages import Groups
from dynascope.rl.batch import per_token


def entropy_bins(entropy: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"], num_bins: int = 10) -> Int[Tensor, "N T"]:
    """The number of the bin of equal counts that each token's entropy falls in, from 0; −1 at padding.

    Tokens of equal entropy keep their order. Raises ValueError for no bins.

    >>> entropy_bins(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), torch.ones(1, 4).bool(), 2)
    tensor([[1, 0, 0, 1]])
    """
    if num_bins < 1:
        raise ValueError(f"{num_bins} bins: at least 1 is needed")
    count = mask.sum().clamp(min=1)
    flat = entropy.masked_fill(~mask, torch.inf).flatten()
    ranks = torch.empty_like(flat, dtype=torch.long)
    ranks[flat.argsort(stable=True)] = torch.arange(len(flat), device=flat.device)
    bins = (ranks * num_bins // count).view(mask.shape)
    return bins.masked_fill(~mask, -1)


def by_entropy(
    values: Float[Tensor, "N T"] | Bool[Tensor, "N T"],
    entropy: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    num_bins: int = 10,
) -> Float[Tensor, " bins"]:
    """The mean of `values` in each bin of equal counts, from certain tokens to uncertain ones; NaN for an empty bin.

    Clipping by decile: `by_entropy(surrogate.is_clipped_low, batch.entropy, batch.mask)`; the spread of ratios by
    decile: `by_entropy(log_ratio.square(), …).sqrt()`.

    >>> by_entropy(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.1]]), torch.ones(1, 2).bool(), 2)
    tensor([2., 1.])
    """
    bins = entropy_bins(entropy, mask, num_bins)[mask]
    kept = values[mask].float()
    zeros = kept.new_zeros(num_bins)
    return zeros.index_add(0, bins, kept) / zeros.index_add(0, bins, torch.ones_like(kept))


def weight_shares(
    advantage: Float[Tensor, " N"] | Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    correct: Bool[Tensor, " N"],
    group_ids: Int[Tensor, " N"] | None = None,
) -> Mapping[str, Float[Tensor, ""]]:
    """Whom a token-mean loss weighs at ratio 1, over a rollout.

    - `weight/wrong_over_right`: Σ |A| over tokens of wrong completions, by that over right ones.
    - `weight/token_mean`: Σ A over tokens, by the number of tokens.
    - `weight/length_wrong_over_right`: mean length of wrong completions by that of right ones, among those with A ≠ 0. With
      `group_ids` both are means over the prompts that have either, so that hard prompts, whose answers may be longer, count
      no more on the one side than on the other: that is the ratio which a group z-score gives the weights.

    >>> weight_shares(torch.tensor([1.0, -1.0]), torch.tensor([[True, False], [True, True]]), torch.tensor([True, False]))
    {'weight/wrong_over_right': tensor(2.), 'weight/token_mean': tensor(-0.3333), 'weight/length_wrong_over_right': tensor(2.)}
    """
    by_token = per_token(advantage) * mask
    size, lengths = by_token.abs().sum(1), mask.sum(1).float()
    groups = Groups.by(torch.zeros_like(mask[:, 0], dtype=torch.long) if group_ids is None else group_ids)

    def mean_length(kept: Tensor) -> Tensor:
        counts = (kept & (size > 0)).float()
        return groups.sum(lengths * counts) / groups.sum(counts)

    wrong, right = mean_length(~correct), mean_length(correct)
    has_both = (wrong + right).isfinite() / groups.sizes  # every prompt once
    return {
        "weight/wrong_over_right": size[~correct].sum() / size[correct].sum(),
        "weight/token_mean": by_token.sum() / mask.sum().clamp(min=1),
        "weight/length_wrong_over_right": (wrong.nan_to_num() * has_both).sum() / (right.nan_to_num() * has_both).sum(),
    }


def two_regimes(
    tokens: Int[Tensor, "N T"], signal: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"], top: int = 10
) -> list[tuple[int, int, int]]:
    """The same token where the model is certain and where it is not: (token, times certain, times uncertain).

    Those first whose rarer regime is the most frequent. It is why entropy is a token's in its place, not a word's.

    >>> two_regimes(torch.tensor([[7, 7, 8]]), torch.tensor([[-0.5, 0.5, 1.0]]), torch.ones(1, 3).bool())
    [(7, 1, 1)]
    """
    kinds, index = tokens[mask].unique(return_inverse=True)
    is_high = (signal[mask] > 0).long()
    counts = torch.zeros(len(kinds), 2, dtype=torch.long, device=tokens.device)
    counts.index_put_((index, is_high), torch.ones_like(index), accumulate=True)
    rarer = counts.amin(1)
    order = rarer.argsort(descending=True, stable=True)[:top]
    order = order[rarer[order] > 0]
    return [
        (token, low, high) for token, (low, high) in zip(kinds[order].tolist(), counts[order].tolist(), strict=True)
    ]
