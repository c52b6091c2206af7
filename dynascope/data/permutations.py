"""Learning a permutation of bits from its action on the unit vectors (2502.16763)."""

import itertools

import torch
from jaxtyping import Float
from torch import Tensor

MOST_BITS = 20


class PermutationTask:
    """The map x → P x on binary vectors of `k` bits: k unit vectors to train on, all other nonzero inputs to test on.

    Inputs are normalized to length 1; targets are bits. The zero vector, which has no direction, is left out. Everything
    is float64, as predictions of zero bits are only a little below 0.

    Raises ValueError for fewer than two bits, or a `perm` that is no permutation of 0 … k−1.

    >>> task = PermutationTask(5, seed=0)
    >>> x, y = task.train()
    """

    def __init__(self, k: int, perm: Tensor | None = None, seed: int = 0) -> None:
        if k < 2:
            raise ValueError(f"k={k}: a permutation needs at least 2 bits")
        if perm is not None and sorted(perm.tolist()) != list(range(k)):
            raise ValueError(f"perm is no permutation of 0 to {k - 1}: {perm.tolist()}")
        self.k, self.seed = k, seed
        self.perm = torch.randperm(k, generator=torch.Generator().manual_seed(seed)) if perm is None else perm

    def train(self) -> tuple[Float[Tensor, "k k"], Float[Tensor, "k k"]]:
        """The k unit vectors and their images."""
        x = torch.eye(self.k, dtype=torch.float64)
        return x, self.image(x)

    def test(self, num_ones: int, count: int) -> tuple[Float[Tensor, "count k"], Float[Tensor, "count k"]]:
        """Random inputs with so many ones, drawn with repetition, and their images."""
        if not 1 <= num_ones <= self.k:
            raise ValueError(f"num_ones={num_ones} must lie between 1 and k={self.k}")
        generator = torch.Generator().manual_seed(self.seed + 1)
        places = torch.rand(count, self.k, generator=generator).topk(num_ones, dim=1).indices
        bits = torch.zeros(count, self.k, dtype=torch.float64).scatter_(1, places, 1.0)
        return _unit(bits), self.image(bits)

    def with_ones(self, num_ones: int) -> tuple[Float[Tensor, "count k"], Float[Tensor, "count k"]]:
        """Every input with so many ones, and its image."""
        places = torch.tensor(list(itertools.combinations(range(self.k), num_ones)))
        bits = torch.zeros(len(places), self.k, dtype=torch.float64).scatter_(1, places, 1.0)
        return _unit(bits), self.image(bits)

    def all_inputs(self) -> tuple[Float[Tensor, "count k"], Float[Tensor, "count k"]]:
        """All 2^k − 1 nonzero inputs and their images. Raises ValueError above 20 bits."""
        if self.k > MOST_BITS:
            raise ValueError(f"k={self.k}: all inputs are listed up to {MOST_BITS} bits only; draw some with test()")
        numbers = torch.arange(1, 2**self.k)
        bits = ((numbers[:, None] >> torch.arange(self.k)) & 1).double()
        return _unit(bits), self.image(bits)

    def image(self, bits: Float[Tensor, "count k"]) -> Float[Tensor, "count k"]:
        """P x: bit i goes to the place that the permutation gives it."""
        return bits[:, self.perm]


def _unit(bits: Tensor) -> Tensor:
    normalized: Tensor = bits / bits.norm(dim=1, keepdim=True)
    return normalized
