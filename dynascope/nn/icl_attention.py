"""One layer of multi-head attention that regresses in context, and says what its heads compute (2503.12734)."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dynascope.nn.circuits import AttentionWeights, Circuits

# How large the identities are that training starts from.
SIZES = {
    "random": 0.0,
    "small_identity": 1e-6,
    "small_identity_qk": 1e-4,
    "opposite_small_identity": 1e-6,
}


def icl_attention(
    circuits: Circuits,
    context: Float[Tensor, "batch length width"],
    query: Float[Tensor, "batch width"],
    *,
    attention: str = "softmax",
    linear_scale: float = 1.0,
) -> Float[Tensor, "*stack batch outputs"]:
    """Σ_h OV_h Σ_l p_hl z_l for the tokens z of a context, p_h = softmax_l(z_lᵀ KQ_h q); the query q is no key.

    Circuits of several networks (leading axes) answer the same prompts at once, all heads in one product. "linear" weighs
    each token by its logit times `linear_scale`. Memory: networks × heads × batch × length. Source: 2503.12734, section 2.

    >>> icl_attention(model.circuits(), prompts.context, prompts.query)  # (batch, outputs)
    """
    kq, ov, width = circuits.kq, circuits.ov, context.shape[-1]
    sought = (query @ kq.reshape(-1, width).T).unflatten(-1, (-1, width))
    if attention == "softmax":
        pooled = torch.softmax(sought @ context.mT, dim=-1) @ context
    else:
        pooled = sought @ (context.mT @ context) * linear_scale
    by_network = pooled.unflatten(1, (-1, ov.shape[-3])).movedim(0, 1).flatten(2)
    outputs: Tensor = by_network @ ov.mT.flatten(-3, -2).reshape(len(by_network), -1, ov.shape[-2])
    return outputs.unflatten(0, ov.shape[:-3]) if ov.ndim > 3 else outputs[0]


def drawn_heads(
    heads: Sequence[int],
    width: int,
    num_outputs: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
) -> list[nn.Parameter]:
    """Query, key and value matrices (*heads, width, width) and output matrices (*heads, outputs, width).

    Drawn as `nn.Linear` draws one matrix over all heads, which is what the authors have.

    >>> [len(part) for part in drawn_heads((2,), 6, 1)]
    [2, 2, 2, 2]
    """
    parts = []
    for rows, fan_in in (*[(width, width)] * 3, (num_outputs, heads[-1] * width)):
        values = torch.rand(*heads, rows, width, generator=generator, dtype=dtype)
        parts.append(nn.Parameter((2 * values - 1) / math.sqrt(fan_in)))
    return parts


class MultiHeadSoftmaxICL(nn.Module):
    """From a prompt of labelled examples and a query to its label: Σ_h OV_h Σ_l p_hl z_l with p = softmax(zᵀ KQ_h q).

    Tokens are an example's inputs followed by its labels, the query's labels are zero, and the query is no key. Each head
    is as wide as the token (`dim` + `num_outputs`), not a fraction of it, and there are no biases; logits are divided by
    the root of that width. Both products are formed once a forward pass, so that a head costs two small matrix products.

    Args:
        num_networks: So many networks side by side, each with weights of its own, on the same prompts: their outputs are
            (networks, batch, outputs), and the sum of their losses trains each as if it were alone.
        init: "random" as `nn.Linear`; "small_identity" 1e-6 I for query, key and value; "small_identity_qk" 1e-4 I for
            query and key only; "opposite_small_identity" 1e-6 I, with the opposite sign in the queries of half of the
            heads.
        attention: "linear" weighs each example by its logit, without softmax.
        linear_scale: What linear attention's weights are multiplied by, whatever the length: 1, or 1/L of the training
            prompts. Softmax divides by the length of the prompt at hand by itself.

    Raises ValueError for impossible sizes, an unknown init or attention, or an odd number of heads where half are to be
    opposite.
    Source: 2503.12734, section 2.

    >>> model = MultiHeadSoftmaxICL(5, num_heads=2)
    >>> model(prompts.context, prompts.query)  # (prompts, outputs)
    >>> model.circuits().kq.shape
    torch.Size([2, 6, 6])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_outputs: int = 1,
        *,
        num_networks: int | None = None,
        init: str = "random",
        attention: str = "softmax",
        linear_scale: float = 1.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(dim, num_heads, num_outputs, 1 if num_networks is None else num_networks) < 1:
            raise ValueError(
                f"dim={dim}, num_heads={num_heads}, num_outputs={num_outputs} and num_networks={num_networks} "
                "must be at least 1"
            )
        if init not in SIZES or attention not in ("softmax", "linear"):
            raise ValueError(
                f"init is one of {', '.join(SIZES)}, not {init!r}; attention softmax or linear, not {attention!r}"
            )
        if init == "opposite_small_identity" and num_heads % 2:
            raise ValueError(f"num_heads={num_heads} must be even for half of the heads to be opposite")
        self.dim, self.num_heads, self.attention, self.linear_scale = dim, num_heads, attention, linear_scale
        width = dim + num_outputs
        stack = () if num_networks is None else (num_networks,)

        self.query, self.key, self.value, self.out = drawn_heads(
            (*stack, num_heads), width, num_outputs, generator=generator, dtype=dtype
        )
        with torch.no_grad():
            identity = SIZES[init] * torch.eye(width, dtype=dtype)
            for part in (self.query, self.key) if init != "random" else ():
                part.copy_(identity)
            if init == "small_identity":
                self.value.copy_(identity)
            if init == "opposite_small_identity":
                self.query[..., num_heads // 2 :, :, :].neg_()

    def forward(
        self, context: Float[Tensor, "batch length width"], query: Float[Tensor, "batch width"]
    ) -> Float[Tensor, "*stack batch outputs"]:
        return icl_attention(self.circuits(), context, query, attention=self.attention, linear_scale=self.linear_scale)

    def circuits(self) -> Circuits:
        """KQ (…, heads, width, width) and OV (…, heads, outputs, width), differentiable."""
        return self.attention_weights().circuits()

    def attention_weights(self) -> AttentionWeights:
        """The matrices of every head."""
        return AttentionWeights(self.query, self.key, self.value, self.out, self.query.shape[-1] ** -0.5)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, num_outputs={self.out.shape[-2]}, attention={self.attention}"
        )
