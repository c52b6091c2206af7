"""Gradients of single examples as a few numbers each, by random projections that never see a gradient.

Each number is Σ_ij a_i G_ij b_j with signs a and b of the weight's two axes, drawn at random. Products of two such numbers are
⟨G, G'⟩ on average, as E[a_i b_j a_k b_l] = δ_ik δ_jl; and of a layer's factors Σ_t left_t ⊗ right_t they take no more than
Σ_t ⟨a, left_t⟩ ⟨b, right_t⟩.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dynascope.kernels.layerwise import Outer, Use
from dynascope.kernels.products import sides

MAX_NUMBERS = 2**24
"""Signs and projected positions that are held at once."""


def sketch(uses: Sequence[Use], shape: torch.Size, size: int, seed: int = 0) -> Float[Tensor, "examples size"]:
    """`size` random projections of each example's gradient, over √size: dot products estimate inner products without bias.

    An estimate of ⟨G, G'⟩ is off by some ‖G‖ ‖G'‖ / √size. Sketches of one weight can be compared when they have the same size
    and seed, whenever they were taken. Memory is bounded by `MAX_NUMBERS`.

    Raises ValueError for a size below 1.

    >>> one, two = (sketch([use], module.weight.shape, 4096) for use in (chosen_use, rejected_use))
    >>> (one * two).sum(1)
    """
    if size < 1:
        raise ValueError(f"size={size}: a sketch has at least one number")
    like, generator = uses[0].gradients, torch.Generator().manual_seed(seed)
    rows = shape[0] if shape else 1
    columns = shape.numel() // rows
    widest = max(rows + columns, *(_positions(use, rows) for use in uses))
    parts = []
    step = max(1, MAX_NUMBERS // widest)
    for first in range(0, size, step):
        left, right = (_signs(min(step, size - first), width, generator).to(like) for width in (rows, columns))
        parts.append(torch.stack([_projected(use, left, right, rows) for use in uses]).sum(0))
    return torch.cat(parts, 1) / math.sqrt(size)


def _positions(use: Use, rows: int) -> int:
    """Numbers that a projection of all examples goes through."""
    return len(use.gradients) * (use.gradients.shape[1] if isinstance(use, Outer) else rows)


def _signs(count: int, width: int, generator: torch.Generator) -> Tensor:
    """From the CPU, so that a seed means the same on every device."""
    signs: Tensor = 2 * torch.randint(2, (count, width), generator=generator, dtype=torch.int8) - 1
    return signs


def _projected(use: Use, left: Tensor, right: Tensor, rows: int) -> Float[Tensor, "examples numbers"]:
    if not isinstance(use, Outer):
        matrices = use.gradients.reshape(len(use.gradients), rows, -1)
        return ((matrices @ right.T) * left.T).sum(1)
    one, two = sides(use)
    rowwise = left.T[one] if use.is_lookup else one @ left.T
    return (rowwise * (two @ right.T)).sum(1)
