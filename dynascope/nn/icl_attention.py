"""One layer of multi-head attention that regresses in context, and says what its heads compute (2503.12734)."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dynascope.nn.circuits import AttentionWeights, Circuits

Init = Literal["random", "small_identity", "small_identity_qk", "opposite_small_identity"]


class MultiHeadSoftmaxICL(nn.Module):
    """From a prompt of labelled examples and a query to its label: Σ_h OV_h Σ_l p_hl z_l with p = softmax(zᵀ KQ_h q).

    Tokens are an example's inputs followed by its labels, the query's labels are zero, and the query is no key. Each head
    is as wide as the token (`dim` + `num_outputs`), not a fraction of it, and there are no biases; logits are divided by
    the root of that width. Both products are formed once a forward pass, so that a head costs two small matrix products.

    Args:
        init: "random" as `nn.Linear`; "small_identity" 1e-6 I for query, key and value; "small_identity_qk" 1e-4 I for
            query and key only; "opposite_small_identity" 1e-6 I, with the opposite sign in the queries of half of the
            heads.
        attention: "linear" weighs each example by its logit, without softmax.
        linear_scale: What linear attention's weights are multiplied by: a number (1/L of the training prompts, as in the
            literature, or 1), or "length" for 1/L of the prompt at hand. Softmax does that by itself.

    Raises ValueError for impossible sizes, or an odd number of heads where half are to be opposite.
    Source: 2503.12734, section 2.

    >>> model = MultiHeadSoftmaxICL(5, num_heads=2)
    >>> model(prompts.context, prompts.query)  # (prompts, outputs)
    >>> pattern_scores(model.circuits().kq, model.circuits().ov).zero_sum
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_outputs: int = 1,
        *,
        init: Init = "random",
        attention: Literal["softmax", "linear"] = "softmax",
        linear_scale: float | Literal["length"] = 1.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(dim, num_heads, num_outputs) < 1:
            raise ValueError(f"dim={dim}, num_heads={num_heads} and num_outputs={num_outputs} must be at least 1")
        sizes = {"random": 0.0, "small_identity": 1e-6, "small_identity_qk": 1e-4, "opposite_small_identity": 1e-6}
        if init not in sizes or attention not in ("softmax", "linear"):
            raise ValueError(f"init is one of {', '.join(sizes)}, not {init!r}; attention softmax or linear, not {attention!r}")
        if init == "opposite_small_identity" and num_heads % 2:
            raise ValueError(f"num_heads={num_heads} must be even for half of the heads to be opposite")
        self.dim, self.num_heads, self.attention, self.linear_scale = dim, num_heads, attention, linear_scale
        width = dim + num_outputs

        def uniform(rows: int, fan_in: int) -> nn.Parameter:
            # `nn.Linear`'s default, drawn for one matrix over all heads as the authors do.
            values = torch.rand(num_heads, rows, width, generator=generator, dtype=dtype)
            return nn.Parameter((2 * values - 1) / math.sqrt(fan_in))

        self.query, self.key, self.value = (uniform(width, width) for _ in range(3))
        self.out = uniform(num_outputs, num_heads * width)
        with torch.no_grad():
            identity = torch.eye(width, dtype=dtype)
            for part in (self.query, self.key) if sizes[init] else ():
                part.copy_(sizes[init] * identity)
            if init == "small_identity":
                self.value.copy_(sizes[init] * identity)
            if init == "opposite_small_identity":
                self.query[num_heads // 2 :].neg_()

    def forward(
        self, context: Float[Tensor, "batch length width"], query: Float[Tensor, "batch width"]
    ) -> Float[Tensor, "batch outputs"]:
        circuits = self.circuits()
        heads, width = self.num_heads, context.shape[-1]
        sought = (query @ circuits.kq.reshape(heads * width, width).T).unflatten(-1, (heads, width))
        if self.attention == "softmax":
            pooled = torch.softmax(sought @ context.mT, dim=-1) @ context
        else:
            scale = 1 / context.shape[1] if self.linear_scale == "length" else self.linear_scale
            pooled = sought @ (context.mT @ context) * scale
        outputs: Tensor = pooled.flatten(1) @ circuits.ov.transpose(1, 2).flatten(0, 1)
        return outputs

    def circuits(self) -> Circuits:
        """KQ (heads, width, width) and OV (heads, outputs, width), differentiable."""
        return self.attention_weights().circuits()

    def attention_weights(self) -> AttentionWeights:
        """The matrices of every head."""
        return AttentionWeights(self.query, self.key, self.value, self.out, self.query.shape[-1] ** -0.5)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, num_outputs={self.out.shape[1]}, attention={self.attention}"
