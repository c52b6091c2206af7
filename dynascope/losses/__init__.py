"""Parts: losses on preferences and demonstrations, what they pull on, and their remedies."""

from dynascope.losses.demonstrations import (
    DemonstrationLoss,
    interleaved_sft_loss,
    sft_loss_from_hidden,
    token_nll_and_entropy,
)
from dynascope.losses.disentangled import (
    DisentangledWeights,
    PairwiseNormalizedPreference,
    disentangled_weights,
    normalized_weights,
)
from dynascope.losses.log_probs import token_log_probs
from dynascope.losses.mismatched import mismatched_responses
from dynascope.losses.preference import (
    MARGIN_LOSSES,
    MarginLoss,
    PreferencePairs,
    coefficients_by_autograd,
    margin_loss,
)
from dynascope.losses.token_masks import (
    SparseTokenMask,
    contrastive_token_mask,
    gradient_contrast_mask,
    masked_pairs,
)

__all__ = [
    "MARGIN_LOSSES",
    "DemonstrationLoss",
    "DisentangledWeights",
    "MarginLoss",
    "PairwiseNormalizedPreference",
    "PreferencePairs",
    "SparseTokenMask",
    "coefficients_by_autograd",
    "contrastive_token_mask",
    "disentangled_weights",
    "gradient_contrast_mask",
    "interleaved_sft_loss",
    "margin_loss",
    "masked_pairs",
    "mismatched_responses",
    "normalized_weights",
    "sft_loss_from_hidden",
    "token_log_probs",
    "token_nll_and_entropy",
]
