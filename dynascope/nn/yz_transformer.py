"""One attention layer and a linear decoder in the two matrices that training moves (2305.16380)."""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot


class YZTransformer(nn.Module):
    """Next-token logits Y f, where f = u / ‖u‖₂ and u = Σ_t softmax_t(Z[m, x_t]) e_{x_t} is the attended bag of tokens.

    The last token m asks; the tokens before it answer; there are no positions, biases or scales. `Z` (vocab, vocab) has
    attention logits by query and key, `Y` (vocab, vocab) decoder logits by next and context token. With `rank` they are
    products: Z = `Z_query` `Z_key`ᵀ and Y = `Y_next` `Y_context`ᵀ, all four (vocab, rank). Time and memory are
    batch × (length + vocab), never batch × length × vocab.

    Args:
        vocab: Number of tokens.
        include_query: Whether the query attends to itself too.
        normalize: "l2" divides u by its length, "none" leaves it.
        residual: Adds e_m before the division.
        init: "zeros", or "uniform" within ±1/√vocab; factors of a low rank are always drawn, since zero ones stay zero.
        rank: Rank of the factors; None for whole matrices.

    Source: 2305.16380, section 3, where logits are Yᵀ f.

    Raises ValueError for an unknown choice, a rank below 1, or low rank with zeros.

    >>> YZTransformer(50)(torch.randint(50, (8, 16))).shape
    torch.Size([8, 50])
    """

    Z: Tensor
    Y: Tensor
    Z_query: Tensor
    Z_key: Tensor
    Y_next: Tensor
    Y_context: Tensor

    def __init__(
        self,
        vocab: int,
        *,
        include_query: bool = False,
        normalize: Literal["l2", "none"] = "l2",
        residual: bool = False,
        init: Literal["zeros", "uniform"] = "zeros",
        rank: int | None = None,
    ) -> None:
        if normalize not in ("l2", "none") or init not in ("zeros", "uniform"):
            raise ValueError(f"normalize is l2 or none and init zeros or uniform, not {normalize!r} and {init!r}")
        if rank is not None and (rank < 1 or init == "zeros"):
            raise ValueError(f"rank={rank} with init={init!r}: a low rank is at least 1 and starts uniform")
        super().__init__()
        self.vocab, self.rank = vocab, rank
        self.include_query, self.normalize, self.residual = include_query, normalize, residual
        reach = 0.0 if init == "zeros" else 1 / math.sqrt(vocab)
        names = ("Z", "Y") if rank is None else ("Z_query", "Z_key", "Y_next", "Y_context")
        for name in names:
            drawn = nn.init.uniform_(torch.empty(vocab, vocab if rank is None else rank), -reach, reach)
            self.register_parameter(name, nn.Parameter(drawn))

    def forward(
        self, tokens: Int[Tensor, "batch length"], visible: Bool[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch vocab"]:
        """Logits of the token after the last one; `visible` is False for padding, which nothing attends to."""
        return self._decode(self.token_mixture(tokens, visible), tokens[:, -1])

    def attention(
        self, tokens: Int[Tensor, "batch length"], visible: Bool[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch keys"]:
        """What the last token gives to each one before it (and to itself with `include_query`); 0 for padding.

        Raises ValueError for a sequence with no token to attend to.
        """
        keys = tokens if self.include_query else tokens[:, :-1]
        if not keys.shape[1]:
            raise ValueError("a sequence has no context: give at least one token before the query")
        logits = self._logits(tokens[:, -1], keys)
        if visible is not None:
            shown = visible[:, : keys.shape[1]]
            if not bool(shown.any(1).all()):
                raise ValueError("a sequence is padding only: give every one at least one visible context token")
            logits = logits.masked_fill(~shown, -math.inf)
        return logits.softmax(1)

    def token_mixture(
        self, tokens: Int[Tensor, "batch length"], visible: Bool[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch vocab"]:
        """u: the attention that each token of the vocabulary gets, all its occurrences together; sums to 1."""
        attention = self.attention(tokens, visible)
        mixture = attention.new_zeros(len(tokens), self.vocab)
        return mixture.scatter_add(1, tokens[:, : attention.shape[1]], attention)

    def forward_counts(
        self, counts: Float[Tensor, "batch vocab"], query: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch vocab"]:
        """The same from how often each token is in the context; with `include_query` the query is counted there too.

        Raises ValueError for a context without any token.

        >>> model.forward_counts(*data.sample_counts(8, generator)[:2]).shape
        """
        if not bool((counts > 0).any(1).all()):
            raise ValueError("a sequence has no context: give at least one token before the query")
        return self._decode(mixture_of_counts(counts, self.attention_rows(query)), query)

    def attention_rows(self, query: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        """Attention logits of these queries for every token."""
        if self.rank is None:
            return self.Z[query]
        return self.Z_query[query] @ self.Z_key.T

    def _logits(self, query: Tensor, keys: Tensor) -> Tensor:
        if self.rank is None:
            return self.Z[query[:, None], keys]
        return (self.Z_key[keys] @ self.Z_query[query, :, None])[..., 0]

    def _decode(self, mixture: Tensor, query: Tensor) -> Tensor:
        if self.residual:
            mixture = mixture + one_hot(query, self.vocab)
        features = mixture / mixture.norm(dim=1, keepdim=True) if self.normalize == "l2" else mixture
        return features @ self.Y.T if self.rank is None else (features @ self.Y_context) @ self.Y_next.T


def mixture_of_counts(
    counts: Float[Tensor, "*#batch vocab"], logits: Float[Tensor, "*#batch vocab"]
) -> Float[Tensor, "*batch vocab"]:
    """Attention over tokens that occur `counts` times: count · exp(logit), over its sum; 0 for absent tokens.

    With probabilities P(l|n) for counts it is the mixture c_n of infinitely long sequences. Rows without any token are NaN.
    Source: 2305.16380, section 3.

    >>> mixture_of_counts(torch.tensor([1.0, 3.0, 0.0]), torch.zeros(3))
    tensor([0.2500, 0.7500, 0.0000])
    """
    return (counts.log() + logits).softmax(-1)
