"""One layer of Mamba for in-context learning, which is linear attention times a gate (2510.00399)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Scores:
    """How much each token counts for the prediction at the query, split in two."""

    attention: Float[Tensor, "*layers batch tokens"]
    """p_iᵀ W_Bᵀ W_C p_query."""
    gate: Float[Tensor, "*layers batch tokens"]
    """G_i; 1 without a gate, 0 at masked tokens."""

    @property
    def product(self) -> Float[Tensor, "*layers batch tokens"]:
        """What the label of each token is multiplied with."""
        return self.attention * self.gate


class GatedLinearAttentionICL(nn.Module):
    """F(P) = Σ_i G_i y_i p_iᵀ W_Bᵀ W_C p_query, whose sign is the label that is predicted for the query.

    It is the label channel of a selective state space layer with A = -1 and exact discretization: with s = σ(wᵀp), a token
    enters with s_i and every later one, the query among them, lets 1 - s_j of it pass, so G_i = s_i Π_{j>i} (1 - s_j).
    Without the gate it is a linear transformer: G = 1.

    Args:
        d: Features of an example's x; tokens are (x; y) of width d + 1.
        gated: False for the linear transformer.
        state: Rows of W_B and W_C (default d + 1, at least d).
        delta: The first d diagonal entries of W_B and W_C at the start; all others are 0, and w ~ N(0, I / (d + 1)).

    A prompt's last token is the query. `mask` is True for tokens that count; masked ones have no part in the prediction
    and let everything pass, so that prompts of different lengths can share a batch (pad on the left). The cost is
    O(batch · tokens · d). Source: 2510.00399, eq. 5 to 8 and section 3.

    Raises ValueError for a state that is too small.

    >>> GatedLinearAttentionICL(30)(OutlierICL().train_batch(256).prompts).shape
    torch.Size([256])
    """

    def __init__(self, d: int, *, gated: bool = True, state: int | None = None, delta: float = 0.2) -> None:
        super().__init__()
        state = d + 1 if state is None else state
        if state < d:
            raise ValueError(f"state={state} must be at least d={d}, the number of diagonal entries that are set")
        start = torch.zeros(state, d + 1)
        start[range(d), range(d)] = delta
        self.d, self.gated = d, gated
        self.W_B, self.W_C = nn.Parameter(start), nn.Parameter(start.clone())
        self.w = nn.Parameter(torch.randn(d + 1) / math.sqrt(d + 1)) if gated else None

    def forward(
        self, prompts: Float[Tensor, "batch tokens width"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, " batch"]:
        weights = self.scores(prompts, mask).product
        return (weights * _kept(prompts, mask)[..., -1].to(weights.dtype)).sum(1).to(prompts.dtype)

    def scores(
        self, prompts: Float[Tensor, "batch tokens width"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Scores:
        """Attention and gate at every token."""
        prompts = _kept(prompts, mask)
        # From the query's side, two small products a prompt: nothing of size tokens × state × width is formed.
        attention = (prompts @ (prompts[:, -1] @ self.W_C.T @ self.W_B)[..., None])[..., 0]
        if self.w is None:
            return Scores(attention, torch.ones_like(attention) if mask is None else mask.to(attention.dtype))
        return Scores(attention, log_gates(prompts @ self.w, mask).exp())

    def recurrent(
        self, prompts: Float[Tensor, "batch tokens width"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, " batch"]:
        """The same number token by token with a state of `state` numbers, as a Mamba layer generates."""
        kept = _kept(prompts, mask)
        state = kept.new_zeros(len(kept), len(self.W_B))
        for i in range(kept.shape[1]):
            token = kept[:, i]
            enters = torch.ones_like(token[:, 0]) if self.w is None else torch.sigmoid(token @ self.w)
            passes = torch.ones_like(enters) if self.w is None else 1 - enters
            if mask is not None:
                enters, passes = enters * mask[:, i], torch.where(mask[:, i], passes, 1.0)
            state = passes[:, None] * state + (enters * token[:, -1])[:, None] * (token @ self.W_B.T)
        return (state * (kept[:, -1] @ self.W_C.T)).sum(1)


def log_gates(
    logits: Float[Tensor, "*batch tokens"], mask: Bool[Tensor, "*batch tokens"] | None = None, A: float = -1.0
) -> Float[Tensor, "*batch tokens"]:
    """log G_i = log of what token i enters with + Σ_{j>i} log of what token j lets pass, seen from the last token.

    With step Δ = softplus(logits) and state matrix `A` < 0, a token enters with (1 - e^{AΔ}) / -A and lets e^{AΔ} pass; for
    A = -1 these are σ(z) and 1 - σ(z). Sums of logarithms, in float32 at least, so that long prompts do not underflow.
    Masked tokens get -inf and let everything pass.

    >>> log_gates(torch.zeros(3)).exp()  # 1/2 that enters, and a half that each later one lets pass
    tensor([0.1250, 0.2500, 0.5000])
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    passes = A * F.softplus(logits)
    enters = F.logsigmoid(logits) if A == -1.0 else torch.log(torch.expm1(passes) / A)
    if mask is not None:
        passes = passes.masked_fill(~mask, 0.0)
        enters = enters.masked_fill(~mask, -math.inf)
    through = passes.flip(-1).cumsum(-1).flip(-1)
    return enters + F.pad(through[..., 1:], (0, 1))


def _kept(prompts: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros in place of whatever stands at masked tokens."""
    return prompts if mask is None else prompts.masked_fill(~mask[..., None], 0.0)
