"""What sharing prompts saves, counted exactly (arXiv 2506.05433, lemma 2.2)."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Shaped
from torch import Tensor

from dynascope.nn.shared_prefix.layout import SharedPrefix


@dataclass(frozen=True)
class Savings:
    """Work of one forward pass: with prompts repeated, and with each worked out once."""

    repeated_tokens: int
    shared_tokens: int
    repeated_pairs: int
    """Pairs of a query and a key that it sees."""
    shared_pairs: int
    flops_ratio: float | None = None
    """Of a whole model's forward pass, shared over repeated, where the model's sizes are known."""
    repeated_bytes: int | None = None
    """Of activations that layers and output head keep for the backward pass, in bfloat16, where the sizes are known."""
    shared_bytes: int | None = None

    @property
    def token_ratio(self) -> float:
        """Shared over repeated, for everything that works token by token."""
        return self.shared_tokens / self.repeated_tokens

    @property
    def pair_ratio(self) -> float:
        """Shared over repeated, for attention."""
        return self.shared_pairs / self.repeated_pairs


def estimate_savings(layout: SharedPrefix, config: Any = None) -> Savings:
    """Count tokens and causal pairs of a batch; with a Hugging Face configuration, its FLOPs too.

    FLOPs are two a weight and token in layers, four a pair and channel in attention, and two a weight and completion token
    in the output head, which sharing does not change. Activations are the inputs of every product of a layer (of its
    projections, of attention, of the MLP and its gate), those of its two norms, and logits of completion tokens, two bytes each;
    kernels of attention keep no scores. What a model really keeps, `rl.shared_prefix.kept_bytes` measures.

    >>> estimate_savings(SharedPrefix.of(torch.ones(1, 6), torch.ones(4, 3), 4)).shared_pairs
    117
    """
    prompts, completions = layout.prompt_lengths, layout.completion_lengths
    behind = prompts[layout.group_of]
    whole = behind + completions
    repeated = int(whole.sum()), _pairs(whole)
    inside = _pairs(completions) + int((behind * completions).sum())
    shared = int(prompts.sum() + completions.sum()), _pairs(prompts) + inside
    if config is None:
        return Savings(repeated[0], shared[0], repeated[1], shared[1])
    text = config.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    channels = text.num_attention_heads * head_size
    shared_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
    is_gated = hasattr(text, "intermediate_size")
    mlp = (3 if is_gated else 2) * inner
    weights = text.hidden_size * (2 * channels + 2 * shared_heads * head_size + mlp)
    head = 2 * text.hidden_size * text.vocab_size * int(completions.sum())
    flops = [
        text.num_hidden_layers * (2 * weights * tokens + 4 * channels * pairs) + head
        for tokens, pairs in (repeated, shared)
    ]
    # Inputs of two norms, of queries, keys and values together, and of the MLP; queries, keys, values and what attention
    # gives; and inside the MLP.
    kept = 4 * text.hidden_size + 2 * channels + 2 * shared_heads * head_size + mlp
    logits = text.vocab_size * int(completions.sum())
    sizes = [2 * (text.num_hidden_layers * kept * tokens + logits) for tokens, _ in (repeated, shared)]
    return Savings(repeated[0], shared[0], repeated[1], shared[1], flops[1] / flops[0], *sizes)


def _pairs(lengths: Shaped[Tensor, " n"]) -> int:
    return int((lengths * (lengths + 1) // 2).sum())
