"""The selective scan of Mamba in plain PyTorch, in pieces of bounded memory, and layers of it (2312.00752; 2510.00399)."""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from dynascope.nn.gated_linear_attention import Scores, log_gates
from dynascope.nn.linear_attention import causal_linear_attention

CHUNK, ATTENDING = 16, 32
"""Positions that are worked on at one time: so few that their states stay in the cache, and more where none are formed."""


def selective_scan(
    u: Float[Tensor, "batch length channels"],
    delta: Float[Tensor, "batch length channels"],
    A: Float[Tensor, "channels rates"],
    B: Float[Tensor, "batch length states"],
    C: Float[Tensor, "batch length states"],
    D: Float[Tensor, " channels"] | None = None,
    *,
    discretization: Literal["zoh", "euler"] = "zoh",
    chunk: int = CHUNK,
) -> Float[Tensor, "batch length channels"]:
    """o_t = C_t h_t (+ D u_t) with h_t = e^{Δ_t A} h_{t-1} + B̄_t u_t, one state of `states` numbers a channel, h_0 = 0.

    B̄ is (e^{ΔA} - 1)/A · B under exact zero-order hold ("zoh") and ΔB in the form that Mamba's own code uses ("euler").
    `A` < 0 has a rate for every state, or one for all states of a channel. Where Δ is 0 nothing enters and nothing is
    forgotten, which is how padding is left out.

    Time is linear in the length. Memory: what goes in and comes out, one state every `chunk` positions, and while a chunk is
    worked on chunk · batch · channels · states numbers (chunk² · batch · channels with one rate); the backward pass works it
    out again. States are kept in float32 at least. The Mamba layer of the literature is `discretization="euler"`; its peers
    are mamba-ssm (CUDA) and the slow path of Hugging Face, which holds length · channels · states numbers several times.

    Raises ValueError for a chunk below 1, another discretization, and another number of rates.

    >>> selective_scan(u, F.softplus(steps), -torch.exp(A_log), B, C, D, discretization="euler")
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    if discretization not in ("zoh", "euler"):
        raise ValueError(f"discretization is zoh or euler, not {discretization!r}")
    if A.shape[1] not in (1, B.shape[2]):
        raise ValueError(f"A has {A.shape[1]} rates a channel; give it one, or one for each of the {B.shape[2]} states")
    dtype = torch.promote_types(u.dtype, torch.float32)
    by_time = [one.to(dtype).transpose(0, 1) for one in (u, delta, B, C)]
    A = A.to(dtype)
    state = by_time[0].new_zeros(*by_time[0].shape[1:], B.shape[2])
    is_traced = torch.is_grad_enabled() and any(one.requires_grad for one in (*by_time, A))
    outputs = []
    for parts in zip(*(one.split(chunk) for one in by_time), strict=True):
        run = _checkpointed if is_traced and len(u[0]) > chunk else _scan_chunk
        output, state = run(parts, A, state, discretization)
        outputs.append(output)
    scanned = torch.cat(outputs).transpose(0, 1)
    if D is not None:
        scanned = scanned + D.to(dtype) * u.to(dtype)
    return scanned.to(u.dtype)


class MambaZOH(nn.Module):
    """Layers of o_t = h_t C_t with h_t = (1 - s_t) h_{t-1} + s_t u_t ⊗ B_t: Mamba with one decay a channel, held exactly.

    B = W_B u and C = W_C u have `d_state` entries, and channel j gates itself by Δ_j = softplus(w_jᵀ u); s = (1 - e^{AΔ}) / -A,
    which is σ(w_jᵀ u) for A = -1. A layer adds its output to its input unless `residual` is False. Its label channel (the
    last), read at the last position of one layer without residual, is `GatedLinearAttentionICL`. Without gates each layer is
    causal linear attention. Source: 2510.00399, eq. 2 to 8; how layers are joined there is not said.

    `mask` is True for tokens that count; masked ones are left out everywhere and their outputs mean nothing.

    Raises ValueError for A that is not below 0, no layers, or fewer states than features of x (d_in - 1).

    >>> MambaZOH(31, 31, layers=3)(OutlierICL().train_batch(64).prompts).shape
    torch.Size([64, 21, 31])
    """

    def __init__(
        self,
        d_in: int,
        d_state: int,
        A: float = -1.0,
        *,
        layers: int = 1,
        gated: bool = True,
        residual: bool = True,
        delta: float = 0.2,
    ) -> None:
        super().__init__()
        if A >= 0:
            raise ValueError(f"A={A} must be below 0, so that states decay")
        if layers < 1 or d_state < d_in - 1:
            raise ValueError(f"layers={layers} must be at least 1 and d_state={d_state} at least d_in - 1 = {d_in - 1}")
        self.A, self.gated, self.residual = A, gated, residual
        start = torch.zeros(layers, d_state, d_in)
        start[:, range(d_in - 1), range(d_in - 1)] = delta
        self.W_B, self.W_C = nn.Parameter(start), nn.Parameter(start.clone())
        self.w = nn.Parameter(torch.randn(layers, d_in, d_in) / math.sqrt(d_in)) if gated else None

    def forward(
        self, u: Float[Tensor, "batch length d_in"], mask: Bool[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch length d_in"]:
        *_, (_, _, last) = self._layers(u, mask, len(self.W_B))
        return last

    def predict(
        self, prompts: Float[Tensor, "batch length d_in"], mask: Bool[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, " batch"]:
        """The label channel of the last position after the last layer, of which nothing else is computed."""
        label, scores = self._heads(prompts, mask)[-1]
        predicted: Tensor = (scores.product * label).sum(1)
        return predicted + label[:, -1] if self.residual else predicted

    def scores(
        self, prompts: Float[Tensor, "batch length d_in"], mask: Bool[Tensor, "batch length"] | None = None
    ) -> Scores:
        """Attention and gate of the label channel, from the last position, in every layer."""
        each = [scores for _, scores in self._heads(prompts, mask)]
        return Scores(torch.stack([one.attention for one in each]), torch.stack([one.gate for one in each]))

    def _heads(self, prompts: Tensor, mask: Tensor | None) -> list[tuple[Tensor, Scores]]:
        """Of each layer the label channel of what goes in, and how the last position sees it."""
        heads = []
        for number, u, _ in self._layers(prompts, mask, len(self.W_B) - 1):
            attention = (u @ (u[:, -1] @ self.W_C[number].T @ self.W_B[number])[..., None])[..., 0]
            if self.w is None:
                gate = torch.ones_like(attention) if mask is None else mask.to(attention.dtype)
            else:
                gate = log_gates(u @ self.w[number, -1], mask, self.A).exp()
            heads.append((u[..., -1], Scores(attention, gate)))
        return heads

    def _layers(self, u: Tensor, mask: Tensor | None, num_run: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Number, input and output of each layer; those from `num_run` on are not run and give their input back."""
        if mask is not None:
            u = u.masked_fill(~mask[..., None], 0.0)
        for number in range(len(self.W_B)):
            output = u
            if number < num_run:
                output = self._layer(u, number, mask)
                output = u + output if self.residual else output
            yield number, u, output
            u = output

    def _layer(self, u: Tensor, number: int, mask: Tensor | None) -> Tensor:
        B, C = u @ self.W_B[number].T, u @ self.W_C[number].T
        if self.w is None:
            return causal_linear_attention(C, B, u)
        delta = F.softplus(u @ self.w[number].T)
        if mask is not None:
            delta = delta.masked_fill(~mask[..., None], 0.0)
        return selective_scan(u, delta, u.new_full((u.shape[2], 1), self.A), B, C, chunk=ATTENDING)


class _LinearRecurrence(torch.autograd.Function):
    """h_t = a_t h_{t-1} + b_t along the first axis; its gradient is the same recurrence run backwards."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, start: Tensor) -> Tensor:
        states = torch.empty_like(b)
        _recur(a, b, start, states)
        ctx.save_for_backward(a, start, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, start, states = ctx.saved_tensors
        of_b = torch.empty_like(grad)
        carried = torch.zeros_like(start)
        for t in range(len(a) - 1, -1, -1):
            torch.add(grad[t], carried, out=of_b[t])
            carried = a[t] * of_b[t]
        before = torch.cat([start[None], states[:-1]])
        return (of_b * before).sum_to_size(a.shape), of_b, carried


def _recur(a: Tensor, b: Tensor, start: Tensor, states: Tensor) -> None:
    for t in range(len(a)):
        torch.addcmul(b[t], a[t], start, out=states[t])
        start = states[t]


def _checkpointed(parts: tuple[Tensor, ...], A: Tensor, state: Tensor, discretization: str) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = checkpoint(
        _scan_chunk, parts, A, state, discretization, use_reentrant=False, preserve_rng_state=False
    )
    return result


def _scan_chunk(parts: tuple[Tensor, ...], A: Tensor, state: Tensor, discretization: str) -> tuple[Tensor, Tensor]:
    """Outputs of some positions, (time, batch, channels), from their u, Δ, B and C, and the state after them."""
    u, delta, B, C = parts
    is_euler = discretization == "euler"
    if A.shape[1] == 1:
        passes = delta * A[:, 0]
        entering = (delta if is_euler else torch.expm1(passes) / A[:, 0]) * u
        return _attend_chunk(passes, entering, B, C, state)
    passes = delta[..., None] * A
    if is_euler:
        entering = (delta * u)[..., None] * B[:, :, None]
    else:
        entering = torch.expm1(passes) / A * u[..., None] * B[:, :, None]
    states: Tensor = _LinearRecurrence.apply(passes.exp(), entering, state)
    return (states @ C[..., None])[..., 0], states[-1]


def _attend_chunk(passes: Tensor, entering: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The same where a channel's states decay alike: positions attend to each other, and no state of each is formed."""
    since = passes.cumsum(0)
    is_later = torch.ones(len(since), len(since), dtype=torch.bool, device=since.device).triu(1)
    decay = (since[:, None] - since).masked_fill(is_later[..., None, None], -math.inf).exp()
    attention = torch.einsum("tbn,kbn->tkb", C, B)
    inside = (decay * attention[..., None] * entering).sum(1)
    output = inside + since.exp() * torch.einsum("bdn,tbn->tbd", state, C)
    left = (since[-1] - since).exp() * entering
    return output, since[-1].exp()[..., None] * state + torch.einsum("kbd,kbn->bdn", left, B)
