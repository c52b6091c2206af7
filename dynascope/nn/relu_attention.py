"""Attention that need not sum to one: ReLU, sigmoid, and softmax with a place to put nothing.

A head of softmax attention must attend to something, and parks on a sink when it has nothing to do; these three can give
exactly or nearly nothing. Drop-in for `scaled_dot_product_attention`, and attention implementations of Hugging Face models.
Sources: 2410.13835, section 3.3 (ReLU over the number of visible keys); 2409.04431 (sigmoid with bias −log n).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK = 512
"""Queries whose map of logits is formed at once; with more of them than this it is formed again in the backward pass."""


def relu_attention(
    query: Float[Tensor, "rows heads queries head_dim"],
    key: Float[Tensor, "rows kv_heads keys head_dim"],
    value: Float[Tensor, "rows kv_heads keys value_dim"],
    *,
    is_causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    block: int = BLOCK,
) -> Float[Tensor, "rows heads queries value_dim"]:
    """relu(logits) over the number of visible keys, times the values: a head without a positive logit gives exactly 0.

    Arguments are as in `scaled_dot_product_attention`: `is_causal` aligns the first query with the first key, a bool `mask`
    is True where a key is visible and a float one is added to the logits, and fewer key than query heads mean grouped
    queries. Scaling the logits by s > 0 scales the output by s. A query that sees no key gives 0 with finite gradients.
    Memory: rows × heads × block × keys. Source: 2410.13835, section 3.3.

    >>> relu_attention(torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2), is_causal=True, scale=1.0)[0, 0, 0]
    tensor([2., 2.])
    """
    return _attention(relu_weights, query, key, value, is_causal, mask, scale, block)


def sigmoid_attention(
    query: Float[Tensor, "rows heads queries head_dim"],
    key: Float[Tensor, "rows kv_heads keys head_dim"],
    value: Float[Tensor, "rows kv_heads keys value_dim"],
    *,
    is_causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    block: int = BLOCK,
) -> Float[Tensor, "rows heads queries value_dim"]:
    """sigmoid(logits − log of the number of visible keys), times the values; arguments as in `relu_attention`.

    Source: 2409.04431, section 3.

    >>> sigmoid_attention(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2))[0, 0, 0]
    tensor([0.5000, 0.5000])
    """
    return _attention(sigmoid_weights, query, key, value, is_causal, mask, scale, block)


def softmax1(
    query: Float[Tensor, "rows heads queries head_dim"],
    key: Float[Tensor, "rows kv_heads keys head_dim"],
    value: Float[Tensor, "rows kv_heads keys value_dim"],
    *,
    is_causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Float[Tensor, "rows heads queries value_dim"]:
    """Softmax with one added to the denominator: a key of logit 0 and value 0 beside the others, in fused attention.

    Arguments are as in `relu_attention`. A query that sees no key gives 0.

    >>> softmax1(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2))[0, 0, 0]
    tensor([0.5000, 0.5000])
    """
    shown = _mask_of(query, key, is_causal, mask)
    if shown is not None:
        shown = F.pad(shown, (0, 1), value=True if shown.dtype == torch.bool else 0.0)
    key, value = (F.pad(_per_query_head(query, one), (0, 0, 0, 1)) for one in (key, value))
    return F.scaled_dot_product_attention(query, key, value, shown, scale=scale)


def relu_weights(logits: Float[Tensor, "*batch queries keys"]) -> Float[Tensor, "*batch queries keys"]:
    """Weights of ReLU attention from logits that are -inf where a key is hidden.

    >>> relu_weights(torch.tensor([[4.0, -1.0, -torch.inf]]))
    tensor([[2., 0., 0.]])
    """
    return F.relu(logits) / _num_visible(logits)


def sigmoid_weights(logits: Float[Tensor, "*batch queries keys"]) -> Float[Tensor, "*batch queries keys"]:
    """Weights of sigmoid attention from logits that are -inf where a key is hidden.

    >>> sigmoid_weights(torch.tensor([[0.0, 0.0]]))  # 1 / (1 + 2)
    tensor([[0.3333, 0.3333]])
    """
    return torch.sigmoid(logits + -_num_visible(logits).log())


def softmax1_weights(logits: Float[Tensor, "*batch queries keys"]) -> Float[Tensor, "*batch queries keys"]:
    """Softmax weights with one added to the denominator, from logits that are -inf where a key is hidden.

    >>> softmax1_weights(torch.tensor([[0.0, 0.0]]))
    tensor([[0.3333, 0.3333]])
    """
    return F.pad(logits, (0, 1)).softmax(-1)[..., :-1]


def softmax_weights(logits: Float[Tensor, "*batch queries keys"]) -> Float[Tensor, "*batch queries keys"]:
    """Softmax weights from logits that are -inf where a key is hidden; zeros for a query that sees none.

    >>> softmax_weights(torch.tensor([[0.0, -torch.inf]]))
    tensor([[1., 0.]])
    """
    return logits.softmax(-1).nan_to_num(nan=0.0)


def masked_logits(
    query: Float[Tensor, "rows heads queries head_dim"],
    key: Float[Tensor, "rows kv_heads keys head_dim"],
    *,
    is_causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Float[Tensor, "rows heads queries keys"]:
    """Scaled logits of every query with every key, -inf where the key is hidden.

    >>> masked_logits(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), is_causal=True)[0, 0]
    tensor([[2., -inf],
            [2., 2.]])
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = query @ _per_query_head(query, key).transpose(-2, -1) * scale
    shown = _mask_of(query, key, is_causal, mask)
    if shown is None:
        return logits
    if shown.dtype == torch.bool:
        return logits.masked_fill(~shown, float("-inf"))
    # Frameworks write "hidden" as the most negative number, which plus a logit is still finite.
    hidden = shown <= torch.finfo(shown.dtype).min / 2
    return (logits + shown).masked_fill(hidden, float("-inf"))


def register_with_transformers() -> tuple[str, ...]:
    """Make "relu", "sigmoid" and "softmax1" attention implementations of Hugging Face models; returns these names.

    Raises ValueError without Transformers; a model with attention dropout raises when it is trained.

    >>> register_with_transformers()
    >>> model = AutoModelForCausalLM.from_config(config, attn_implementation="relu")
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError:
        raise ValueError("this needs Transformers: pip install 'dynascope[hf]'") from None
    functions = {"relu": relu_attention, "sigmoid": sigmoid_attention, "softmax1": softmax1}
    for name, function in functions.items():
        AttentionInterface.register(name, _for_transformers(function))
        AttentionMaskInterface.register(name, sdpa_mask)
    return tuple(functions)


def _for_transformers(attention: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, None]]:
    def forward(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        **settings: Any,
    ) -> tuple[Tensor, None]:
        if dropout > 0:
            raise ValueError("this attention knows no dropout; set attention_dropout=0 in the model's config")
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        # One query alone (a cache) sees all keys; aligned with the first key it would see only that one.
        causal = bool(causal) and attention_mask is None and query.shape[2] > 1
        attended = attention(query, key, value, is_causal=causal, mask=attention_mask, scale=scaling)
        return attended.transpose(1, 2).contiguous(), None

    return forward


def _attention(
    weights: Callable[[Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    mask: Tensor | None,
    scale: float | None,
    block: int,
) -> Tensor:
    value = _per_query_head(query, value)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        logits = masked_logits(query, key, is_causal=is_causal and mask is None, mask=mask, scale=scale)
        return weights(logits) @ value

    num_queries = query.shape[2]
    if num_queries <= block:
        return attend(query, key, value, _mask_of(query, key, True, mask) if is_causal and mask is not None else mask)
    parts = []
    for first in range(0, num_queries, block):
        last = min(first + block, num_queries)
        num_keys = min(last, key.shape[2]) if is_causal else key.shape[2]
        part = mask if mask is None or mask.shape[-2] == 1 else mask[..., first:last, :]
        part = None if part is None else part[..., :num_keys]
        shown = _mask_of(query[:, :, first:last], key[:, :, :num_keys], is_causal, part, first)
        operands = query[:, :, first:last], key[:, :, :num_keys], value[:, :, :num_keys], shown
        needs_gradient = torch.is_grad_enabled() and any(one.requires_grad for one in operands[:3])
        parts.append(checkpoint(attend, *operands, use_reentrant=False) if needs_gradient else attend(*operands))
    return torch.cat(parts, dim=2)


def _mask_of(query: Tensor, key: Tensor, is_causal: bool, mask: Tensor | None, first: int = 0) -> Tensor | None:
    """The mask with causality in it, for queries that begin at `first`."""
    if not is_causal:
        return mask
    num_queries, num_keys = query.shape[2], key.shape[2]
    causal = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(first)
    if mask is None:
        return causal
    return mask & causal if mask.dtype == torch.bool else mask.masked_fill(~causal, float("-inf"))


def _per_query_head(query: Tensor, grouped: Tensor) -> Tensor:
    groups = query.shape[1] // grouped.shape[1]
    return grouped if groups == 1 else grouped.repeat_interleave(groups, dim=1)


def _num_visible(logits: Tensor) -> Tensor:
    return torch.isfinite(logits).sum(-1, keepdim=True).clamp(min=1).to(logits.dtype)
