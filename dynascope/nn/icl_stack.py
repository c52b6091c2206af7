"""Several layers of multi-head attention that regress in context, every token reading those before it (2503.12734)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dynascope.nn.circuits import AttentionWeights, Circuits, kq_ov_circuits
from dynascope.nn.icl_attention import drawn_heads


class CausalICLLayer(nn.Module):
    """Heads as wide as the token, without biases or a residual path: what they add up to is the next layer's token."""

    def __init__(
        self, width: int, num_heads: int, generator: torch.Generator | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = drawn_heads(
            (num_heads,), width, width, generator=generator, dtype=dtype
        )

    def forward(self, tokens: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch length width"]:
        query, key, value = (tokens[:, None] @ part.mT for part in (self.query, self.key, self.value))
        # The mask comes before the one softmax; the authors' code has a softmax on either side of it.
        read = scaled_dot_product_attention(query, key, value, is_causal=True)
        passed_on: Tensor = (read @ self.out.mT).sum(1)
        return passed_on

    def attention_weights(self) -> AttentionWeights:
        """The matrices of every head."""
        return AttentionWeights(self.query, self.key, self.value, self.out, 1 / math.sqrt(self.query.shape[-1]))


class StackedSoftmaxICL(nn.Module):
    """From a prompt of labelled examples and a query to its label, through layers in which each token sees the earlier ones.

    Tokens are an example's inputs followed by its labels; the query comes last, with labels 0, and is read by a linear map
    after the last layer. It is a key too, as every token is to itself. Attention runs through
    `scaled_dot_product_attention`, so that probes see each layer.

    Args:
        is_tied: One layer's weights for all layers.

    Raises ValueError for sizes below 1. Source: 2503.12734, the authors' code for several layers.

    >>> model = StackedSoftmaxICL(5, num_heads=2, num_layers=2)
    >>> model(prompts.context, prompts.query)  # (prompts, outputs)
    >>> [one.kq.shape for one in model.circuits()]
    [torch.Size([2, 6, 6]), torch.Size([2, 6, 6])]
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_layers: int,
        num_outputs: int = 1,
        *,
        is_tied: bool = False,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(dim, num_heads, num_layers, num_outputs) < 1:
            raise ValueError(
                f"dim={dim}, num_heads={num_heads}, num_layers={num_layers} and num_outputs={num_outputs} "
                "must be at least 1"
            )
        width = dim + num_outputs
        different = [CausalICLLayer(width, num_heads, generator, dtype) for _ in range(1 if is_tied else num_layers)]
        self.layers = nn.ModuleList(different * num_layers if is_tied else different)
        drawn = 2 * torch.rand(num_outputs, width, generator=generator, dtype=dtype) - 1
        self.readout = nn.Parameter(drawn / math.sqrt(width))

    def forward(
        self, context: Float[Tensor, "batch length width"], query: Float[Tensor, "batch width"]
    ) -> Float[Tensor, "batch outputs"]:
        tokens = torch.cat([context, query[:, None]], 1)
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens[:, -1] @ self.readout.T

    def circuits(self) -> list[Circuits]:
        """KQ (heads, width, width) and OV (heads, width, width) of every layer, differentiable."""
        return [kq_ov_circuits(layer) for layer in self.layers]
