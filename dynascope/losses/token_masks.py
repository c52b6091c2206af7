"""Token weights for preference losses: shared tokens out, contrasting ones in (arXiv 2410.13828, section 5)."""

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from dynascope.losses.preference import PreferencePairs


def contrastive_token_mask(
    chosen: Int[Tensor, "pairs chosen_positions"],
    rejected: Int[Tensor, "pairs rejected_positions"],
    chosen_mask: Shaped[Tensor, "pairs chosen_positions"],
    rejected_mask: Shaped[Tensor, "pairs rejected_positions"],
) -> tuple[Bool[Tensor, "pairs chosen_positions"], Bool[Tensor, "pairs rejected_positions"]]:
    """Which tokens of two responses differ: those outside a longest common subsequence (a diff).

    The masks mark the responses' tokens (prompts and padding are 0) and nothing else is ever marked as differing.
    Identical responses give no token. Time and memory: pairs × both lengths.

    >>> contrastive_token_mask(torch.tensor([[5, 1, 2]]), torch.tensor([[6, 1, 2]]), torch.ones(1, 3), torch.ones(1, 3))
    (tensor([[ True, False, False]]), tensor([[ True, False, False]]))
    """
    own, other = chosen_mask.bool(), rejected_mask.bool()
    # Tokens outside the response equal nothing, so they are in no common subsequence.
    equal = (chosen[:, :, None] == rejected[:, None]) & own[:, :, None] & other[:, None]
    lengths = _common_lengths(equal)
    differs = own.clone(), other.clone()
    row = torch.full((len(chosen),), chosen.shape[1], device=chosen.device)
    column = torch.full_like(row, rejected.shape[1])
    pair = torch.arange(len(chosen), device=chosen.device)
    for _ in range(chosen.shape[1] + rejected.shape[1]):
        is_open = (row > 0) & (column > 0)
        before_row, before_column = (row - 1).clamp_min(0), (column - 1).clamp_min(0)
        is_match = is_open & equal[pair, before_row, before_column]
        differs[0][pair, before_row] &= ~is_match
        differs[1][pair, before_column] &= ~is_match
        goes_up = lengths[pair, before_row, column] >= lengths[pair, row, before_column]
        row = row - (is_open & (is_match | goes_up)).long()
        column = column - (is_open & (is_match | ~goes_up)).long()
    return differs


def _common_lengths(equal: Bool[Tensor, "pairs rows columns"]) -> Int[Tensor, "pairs rows+1 columns+1"]:
    """Lengths of the longest common subsequences of all prefixes, one row after the other."""
    num_pairs, num_rows, num_columns = equal.shape
    lengths = torch.zeros(num_pairs, num_rows + 1, num_columns + 1, dtype=torch.int32, device=equal.device)
    for row in range(num_rows):
        above = lengths[:, row]
        best = torch.maximum(above[:, 1:], above[:, :-1] + equal[:, row])
        lengths[:, row + 1, 1:] = best.cummax(1).values
    return lengths


def gradient_contrast_mask(
    token_map: Float[Tensor, "chosen_tokens rejected_tokens"],
) -> tuple[Bool[Tensor, " chosen_tokens"], Bool[Tensor, " rejected_tokens"]]:
    """Tokens whose gradient goes against the other response's: a negative sum of their row or column of the token map.

    >>> gradient_contrast_mask(torch.tensor([[-1.0, 0.2], [0.1, 0.5]]))
    (tensor([ True, False]), tensor([ True, False]))
    """
    return token_map.sum(1) < 0, token_map.sum(0) < 0


def masked_pairs(
    chosen: Float[Tensor, "pairs chosen_positions"],
    rejected: Float[Tensor, "pairs rejected_positions"],
    chosen_weights: Shaped[Tensor, "pairs chosen_positions"],
    rejected_weights: Shaped[Tensor, "pairs rejected_positions"],
    reference_chosen: Float[Tensor, "pairs chosen_positions"] | None = None,
    reference_rejected: Float[Tensor, "pairs rejected_positions"] | None = None,
) -> PreferencePairs:
    """Pairs for any margin loss from log-probabilities token by token, weighted; those of the reference alike.

    Weights of one give the loss itself. Lengths, for losses that average, are the sums of the weights, so that means are
    weighted means; a response whose weights are all 0 has a mean of 0 and no gradient.

    >>> loss(masked_pairs(chosen, rejected, *contrastive_token_mask(y_w, y_l, mask_w, mask_l), ref_w, ref_l))
    """

    def weighted(log_probs: Tensor | None, weights: Tensor) -> Tensor | None:
        return None if log_probs is None else (log_probs * weights).sum(1)

    return PreferencePairs(
        (chosen * chosen_weights).sum(1),
        (rejected * rejected_weights).sum(1),
        weighted(reference_chosen, chosen_weights),
        weighted(reference_rejected, rejected_weights),
        chosen_weights.sum(1),
        rejected_weights.sum(1),
    )


class SparseTokenMask(nn.Module):
    """Learnt weights of tokens from hidden states, between `floor` and 1, with an L1 penalty that makes them sparse.

    Args:
        width: Of the hidden states (of the policy or of the reference; detach them to train the mask alone).
        penalty: What one token of weight 1 costs, in `cost`.
        floor: The least weight of any token; with 0 the mask may die out, and the loss with it.

    Starts near 1 everywhere (0.88 of the way from the floor), so that training begins as without it.

    >>> mask = SparseTokenMask(model.config.hidden_size, penalty=0.01)
    >>> weights = mask(hidden, response_mask)
    >>> (loss(masked_pairs(...)).mean() + mask.cost(weights, response_mask)).backward()
    """

    def __init__(self, width: int, *, penalty: float = 0.01, floor: float = 0.05) -> None:
        super().__init__()
        if not 0 <= floor < 1 or penalty < 0:
            raise ValueError(f"floor={floor} must be at least 0 and below 1, and penalty={penalty} at least 0")
        self.head = nn.Linear(width, 1)
        self.penalty, self.floor = penalty, floor
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, 2.0)

    def forward(
        self, hidden: Float[Tensor, "sequences positions width"], mask: Shaped[Tensor, "sequences positions"]
    ) -> Float[Tensor, "sequences positions"]:
        """A weight a token; 0 where `mask` is."""
        weights = self.floor + (1 - self.floor) * torch.sigmoid(self.head(hidden)[..., 0])
        return weights * mask

    def cost(
        self, weights: Float[Tensor, "sequences positions"], mask: Shaped[Tensor, "sequences positions"]
    ) -> Float[Tensor, ""]:
        """`penalty` × the mean over sequences of the sum of their weights."""
        return self.penalty * (weights * mask).sum(1).mean()
