"""One layer of causal linear attention over pairs of tokens, whose weights can be read as an algorithm (2405.16845)."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

BLOCK = 32
"""Positions whose attention is one matrix product; between blocks the sum of outer products is carried."""


class LinearCausalAttention(nn.Module):
    """ŷ(t) = W_PV Σ_{i≤t} e_i e_iᴴ W_KQ e_t / (t−1) over tokens e_t = (x_t; x_{t−1}), which predicts x_{t+1}.

    `kq` (2 dim, 2 dim) and `pv` (dim, 2 dim) are free matrices, complex by default; they start diagonal in the two blocks
    that matter (lower left of `kq` = a₀ I, left of `pv` = b₀ I) and zero elsewhere, as in the paper (2405.16845, section
    3), or with small random numbers everywhere (`init="random"`). Time is linear in the length.

    Raises ValueError for another init.

    >>> model = LinearCausalAttention(3, a0=0.1, b0=0.1)
    >>> model(ARProcess(3, 20).sample(8, generator)).shape  # predictions of x_3 … x_20
    torch.Size([8, 18, 3])
    """

    def __init__(
        self,
        dim: int,
        *,
        a0: float = 0.1,
        b0: float = 0.1,
        init: str = "diagonal",
        dtype: torch.dtype = torch.complex128,
    ) -> None:
        if init not in ("diagonal", "random"):
            raise ValueError(f"init is diagonal or random, not {init!r}")
        super().__init__()
        self.dim = dim
        kq, pv = torch.zeros(2 * dim, 2 * dim, dtype=dtype), torch.zeros(dim, 2 * dim, dtype=dtype)
        if init == "diagonal":
            eye = torch.eye(dim, dtype=dtype)
            kq[dim:, :dim], pv[:, :dim] = a0 * eye, b0 * eye
        else:
            kq, pv = a0 * torch.randn_like(kq), b0 * torch.randn_like(pv)
        self.kq, self.pv = nn.Parameter(kq), nn.Parameter(pv)

    def forward(self, x: Shaped[Tensor, "batch length dim"]) -> Shaped[Tensor, "batch predictions dim"]:
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        tokens = torch.cat([x, before], dim=2)
        attended = causal_linear_attention(tokens @ self.kq.T, tokens, tokens @ self.pv.T)[:, 1:-1]
        return attended / torch.arange(1, x.shape[1] - 1, device=x.device)[:, None]

    def useful_blocks(self) -> tuple[Shaped[Tensor, "dim dim"], Shaped[Tensor, "dim dim"]]:
        """The block of `kq` that turns x_t into a query for earlier x, and that of `pv` that reads what followed them."""
        return self.kq[self.dim :, : self.dim], self.pv[:, : self.dim]

    def loss(self, x: Shaped[Tensor, "batch length dim"]) -> Float[Tensor, ""]:
        """½ Σ_t ‖ŷ(t) − x(t+1)‖², summed over positions and averaged over sequences (2405.16845, eq. 4)."""
        errors = self(x) - x[:, 2:]
        total: Tensor = 0.5 * errors.abs().square().sum((1, 2)).mean()
        return total


def causal_linear_attention(
    query: Shaped[Tensor, "batch length width"],
    key: Shaped[Tensor, "batch length width"],
    value: Shaped[Tensor, "batch length out"],
    block: int = BLOCK,
) -> Shaped[Tensor, "batch length out"]:
    """Σ_{i≤t} v_i (k_iᴴ q_t) at every position, in time linear in the length; complex numbers welcome.

    Memory: batch · length · (block + width + out) numbers, and one width × out state a block.

    >>> causal_linear_attention(torch.ones(1, 3, 1), torch.ones(1, 3, 1), torch.ones(1, 3, 1))[0, :, 0]
    tensor([1., 2., 3.])
    """
    parts, before = [], None
    for q, k, v in zip(query.split(block, 1), key.split(block, 1), value.split(block, 1), strict=True):
        part = torch.tril(q @ k.mH) @ v
        if before is not None:
            part = part + q @ before.mT
        parts.append(part)
        if len(parts) * block < query.shape[1]:
            outer = v.mT @ k.conj()
            before = outer if before is None else before + outer
    return torch.cat(parts, dim=1)


class MaskedGradient(nn.Module):
    """A parametrization under which only the entries where `mask` is True are trained; the others keep their values.

    >>> torch.nn.utils.parametrize.register_parametrization(model, "kq", MaskedGradient(mask))
    """

    mask: Tensor

    def __init__(self, mask: Shaped[Tensor, "..."]) -> None:
        super().__init__()
        self.register_buffer("mask", mask.bool())

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, weight.detach())


def diagonal_masks(dim: int) -> tuple[Shaped[Tensor, "..."], Shaped[Tensor, "..."]]:
    """Masks for `kq` and `pv` that keep the diagonals of the two useful blocks (the clipped variant of 2405.16845)."""
    kq, pv = torch.zeros(2 * dim, 2 * dim, dtype=torch.bool), torch.zeros(dim, 2 * dim, dtype=torch.bool)
    kq[dim:, :dim], pv[:, :dim] = torch.eye(dim, dtype=torch.bool), torch.eye(dim, dtype=torch.bool)
    return kq, pv
