"""A small pre-norm decoder whose every part can be left out, frozen or made linear: what breeds extreme tokens?

Source: 2410.13835, section 3 and its ablations.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dynascope.nn.relu_attention import (
    relu_attention,
    relu_weights,
    sigmoid_attention,
    sigmoid_weights,
    softmax1,
    softmax1_weights,
    softmax_weights,
)

ATTENTION: Mapping[str, Callable[..., Tensor]] = {
    "softmax": F.scaled_dot_product_attention,
    "relu": relu_attention,
    "softmax1": softmax1,
    "sigmoid": sigmoid_attention,
}
WEIGHTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "softmax": softmax_weights,
    "relu": relu_weights,
    "softmax1": softmax1_weights,
    "sigmoid": sigmoid_weights,
}

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "attention in the middle": {"without_attention": (0, 2), "without_mlp": (1,)},
    "attention only": {"without_mlp": (0, 1, 2)},
    "mlp only": {"without_attention": (0, 1, 2)},
    "last mlp only": {"without_mlp": (0, 1)},
    "linear mlps": {"linear_mlp": (0, 1, 2)},
}
"""Settings of three-layer models with and without residual peaks, by name (2410.13835, section 3.2 and appendix)."""


class CausalAttention(nn.Module):
    """Heads without biases; `attend(query, key, value)` is what an intervention replaces."""

    def __init__(self, width: int, num_heads: int, kind: str) -> None:
        super().__init__()
        self.num_heads, self.kind = num_heads, kind
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The attention of this model's kind, of queries, keys and values by head."""
        return ATTENTION[self.kind](query, key, value, is_causal=True)

    def forward(self, x: Float[Tensor, "rows positions width"]) -> Float[Tensor, "rows positions width"]:
        rows, positions, width = x.shape
        query, key, value = (
            one(x).view(rows, positions, self.num_heads, -1).transpose(1, 2)
            for one in (self.query, self.key, self.value)
        )
        projected: Tensor = self.out(self.attend(query, key, value).transpose(1, 2).reshape(rows, positions, width))
        return projected


class ToyBlock(nn.Module):
    """Attention and MLP, each on the normalised residual stream and added to it, each left out where it is None."""

    def __init__(self, width: int, attention: nn.Module | None, mlp: nn.Module | None, has_norms: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width) if has_norms else nn.Identity() for _ in range(2))
        self.attention, self.mlp = attention, mlp

    def forward(self, x: Float[Tensor, "rows positions width"]) -> Float[Tensor, "rows positions width"]:
        if self.attention is not None:
            x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x)) if self.mlp is not None else x


class ToyTransformer(nn.Module):
    """A decoder of tokens with learned positions, without biases, whose parts can be taken out one by one.

    Args:
        vocab_size, context: Number of tokens and the most positions.
        width, depth, num_heads: Sizes; the MLP is four times as wide, with ReLU.
        attention: "softmax", "relu", "softmax1" or "sigmoid".
        without_attention, without_mlp: Layers that have none.
        linear_mlp: Layers whose MLP has no nonlinearity.
        has_norms: Whether blocks and the end are normalised.
        is_tied: Whether the head is the embedding.

    Calls give logits (rows, positions, vocab_size). Raises ValueError for another attention, a width that the heads do not
    divide, layers that do not exist, or too many positions. Source: 2410.13835, section 3.

    >>> model = ToyTransformer(33, 48, width=64, depth=1, attention="relu")
    >>> model(torch.zeros(2, 48, dtype=torch.long)).shape
    torch.Size([2, 48, 33])
    """

    def __init__(
        self,
        vocab_size: int,
        context: int,
        *,
        width: int = 256,
        depth: int = 3,
        num_heads: int = 1,
        attention: str = "softmax",
        without_attention: Collection[int] = (),
        without_mlp: Collection[int] = (),
        linear_mlp: Collection[int] = (),
        has_norms: bool = True,
        is_tied: bool = False,
    ) -> None:
        super().__init__()
        if attention not in ATTENTION:
            raise ValueError(f"attention is one of {', '.join(ATTENTION)}, not {attention!r}")
        if width % num_heads:
            raise ValueError(f"width={width} is no multiple of num_heads={num_heads}")
        missing = {*without_attention, *without_mlp, *linear_mlp} - set(range(depth))
        if missing:
            raise ValueError(f"layers {sorted(missing)} do not exist; with depth={depth} they are 0 to {depth - 1}")
        self.context = context
        self.token, self.position = nn.Embedding(vocab_size, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList()
        for layer in range(depth):
            heads = None if layer in without_attention else CausalAttention(width, num_heads, attention)
            between = nn.Identity() if layer in linear_mlp else nn.ReLU()
            up, down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
            mlp = None if layer in without_mlp else nn.Sequential(up, between, down)
            self.blocks.append(ToyBlock(width, heads, mlp, has_norms))
        self.norm = nn.LayerNorm(width) if has_norms else nn.Identity()
        self.head = nn.Linear(width, vocab_size, bias=False)
        if is_tied:
            self.head.weight = self.token.weight

    def forward(self, tokens: Int[Tensor, "rows positions"]) -> Float[Tensor, "rows positions tokens"]:
        positions = tokens.shape[1]
        if positions > self.context:
            raise ValueError(f"{positions} tokens are more than the context of {self.context}; cut them or widen it")
        x = self.token(tokens) + self.position.weight[:positions]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def freeze(self, *parts: str) -> "ToyTransformer":
        """Stop training "embedding" (tokens and positions), "output", every "value" map, or every "out" map.

        Raises ValueError for another part.

        >>> model.freeze("embedding", "value")
        """
        attentions = [module for module in self.modules() if isinstance(module, CausalAttention)]
        frozen: dict[str, list[nn.Module]] = {
            "embedding": [self.token, self.position],
            "output": [self.head],
            "value": [attention.value for attention in attentions],
            "out": [attention.out for attention in attentions],
        }
        for part in parts:
            if part not in frozen:
                raise ValueError(f"a part is one of {', '.join(frozen)}, not {part!r}")
            for module in frozen[part]:
                module.requires_grad_(False)
        return self
