"""Several layers of attention and linear decoder, each in the matrices that training moves: real text's model (2305.16380)."""

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot, scaled_dot_product_attention

NONLINEARITIES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: x.softmax(-1),
}


class YZBlock(nn.Module):
    """One layer over bags of tokens x (…, vocab): Y f with f = u / ‖u‖₂ and u = Σ_s softmax_s(x_tᵀ Z x_s) x_s, s ≤ t.

    Z = `Z_query` `Z_key`ᵀ and Y = `Y_next` `Y_context`ᵀ, all four (vocab, rank), drawn as `nn.Linear` draws them. With
    `residual` x_t is added to u, and f to Y f.
    """

    Z_query: Tensor
    Z_key: Tensor
    Y_next: Tensor
    Y_context: Tensor

    def __init__(self, vocab: int, rank: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        # Maps into the rank come from `vocab` numbers, and maps back from `rank`.
        for name, fan_in in {"Z_query": rank, "Z_key": vocab, "Y_next": rank, "Y_context": vocab}.items():
            drawn = nn.init.uniform_(torch.empty(vocab, rank), -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
            self.register_parameter(name, nn.Parameter(drawn))

    def forward(self, x: Float[Tensor, "batch length vocab"]) -> Float[Tensor, "batch length vocab"]:
        query, key, value = ((x @ self.Z_query)[:, None], (x @ self.Z_key)[:, None], x[:, None])
        mixture = scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)[:, 0]
        features = normalize(mixture + x if self.residual else mixture, dim=-1)
        told: Tensor = (features @ self.Y_context) @ self.Y_next.T
        return told + features if self.residual else told


class YZStack(nn.Module):
    """Logits of every next token from blocks that each read what the one before it would have said.

    Tokens enter one-hot; between blocks a nonlinearity is followed by division by the length. Every token attends to those
    before it and to itself; there are no positions, biases or scales. Attention runs through
    `scaled_dot_product_attention`, so that every probe of attention sees it, layer by layer. One block says of the last
    token what `YZTransformer(rank=…, include_query=True)` does. Time and memory are batch × length × vocab a layer.

    Args:
        vocab: Number of tokens.
        rank: Rank of the factors of Z and Y.
        num_layers: Number of blocks.
        nonlinearity: "relu", "sigmoid" or "softmax", between blocks.
        residual: Whether each block adds what it read.

    Source: 2305.16380, experiments on real text.

    Raises ValueError for sizes below 1 or another nonlinearity.

    >>> YZStack(2000, 64, num_layers=2)(torch.randint(2000, (8, 35))).shape
    torch.Size([8, 35, 2000])
    """

    def __init__(
        self, vocab: int, rank: int, num_layers: int, *, nonlinearity: str = "relu", residual: bool = False
    ) -> None:
        super().__init__()
        if min(vocab, rank, num_layers) < 1:
            raise ValueError(f"vocab={vocab}, rank={rank} and num_layers={num_layers} must be at least 1")
        if nonlinearity not in NONLINEARITIES:
            raise ValueError(f"nonlinearity is one of {', '.join(NONLINEARITIES)}, not {nonlinearity!r}")
        self.vocab, self.nonlinearity = vocab, nonlinearity
        self.blocks = nn.ModuleList(YZBlock(vocab, rank, residual) for _ in range(num_layers))

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length vocab"]:
        first, *others = self.blocks
        x: Tensor = first(one_hot(tokens, self.vocab).to(next(self.parameters()).dtype))
        for block in others:
            x = block(normalize(NONLINEARITIES[self.nonlinearity](x), dim=-1))
        return x
