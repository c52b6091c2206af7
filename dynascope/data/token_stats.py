"""Which context tokens predict one next token and which are shared by many, counted in one pass (2305.16380)."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PAIRS_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class TokenStats:
    """How often each context token was seen with each next token, and how much it says about which.

    `commonness` is the entropy of P(next | token in context) over that of P(next): 1 for a token that says nothing about
    what follows, 0 for one that goes with a single next token; NaN for tokens seen too seldom to tell. Common tokens are
    those above `threshold`, distinct ones those at or below it.
    """

    vocab: int
    pairs: Int[Tensor, " kinds"]
    """context · vocab + next of every pair that was seen, ascending."""
    counts: Int[Tensor, " kinds"]
    commonness: Float[Tensor, " vocab"]
    threshold: float

    @property
    def is_common(self) -> Bool[Tensor, " vocab"]:
        """Tokens shared by many next tokens."""
        return self.commonness > self.threshold

    @property
    def is_distinct(self) -> Bool[Tensor, " vocab"]:
        """Tokens that go with few next tokens."""
        return self.commonness <= self.threshold

    def co_occurrence(self, context: Int[Tensor, "*shape"], following: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """How often each of these context tokens was seen with that next token.

        >>> stats.co_occurrence(torch.tensor([3]), torch.tensor([7]))
        """
        wanted = context * self.vocab + following
        place = torch.searchsorted(self.pairs, wanted).clamp(max=len(self.pairs) - 1)
        found = self.pairs[place] == wanted
        return torch.where(found, self.counts[place], 0)

    def to(self, device: torch.device | str) -> "TokenStats":
        """The same on another device."""
        return dataclasses.replace(
            self,
            pairs=self.pairs.to(device),
            counts=self.counts.to(device),
            commonness=self.commonness.to(device),
        )


def token_stats(
    source: Int[Tensor, " positions"] | Iterable[tuple[Tensor, Tensor]],
    vocab: int,
    *,
    query: Literal["last", "none"] = "last",
    window: int = 32,
    threshold: float = 0.5,
    fewest: int = 10,
) -> TokenStats:
    """Count in one pass which context tokens go with which next tokens.

    Args:
        source: A text as one row of token ids, whose every `window` tokens are a sequence; or sequences as an iterable
            of (tokens (batch, length), next tokens (batch,)) that ends.
        vocab: Number of token ids.
        query: "last" leaves each sequence's last token out of the context, as the theory has it; "none" counts it too.
        window: Length of a sequence of text, with its last token.
        threshold: Commonness above which a token counts as common. In text every word is shared by many next ones, so
            take a place within it there, such as the median: `dataclasses.replace(stats, threshold=…)`.
        fewest: Occurrences below which nothing is said of a token: entropies of small counts are too small.

    Memory: one number a kind of pair, and two million pairs at once; nothing is vocab × vocab. Source: 2305.16380,
    section 3 (common and distinct tokens); that the split goes by entropy is ours.

    Raises ValueError for no pairs, token ids outside the vocabulary, or a window too short for a context.

    >>> stats = token_stats(torch.tensor([0, 1, 2] * 100), vocab=3, window=2)
    >>> stats.commonness  # each word is always followed by the same one
    tensor([0., 0., 0.])
    """
    if query not in ("last", "none"):
        raise ValueError(f"query is last or none, not {query!r}")
    shortest = 2 if query == "last" else 1
    if isinstance(source, Tensor) and window < shortest:
        raise ValueError(f"window={window} leaves no context; take at least {shortest}")
    batches = _windows(source, window) if isinstance(source, Tensor) else iter(source)
    pairs, counts = torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)
    for tokens, following in batches:
        for part, targets in _portions(tokens, following):
            context = part[:, :-1] if query == "last" else part
            lowest, highest = torch.aminmax(torch.cat([context.flatten(), targets])) if targets.numel() else (0, 0)
            if lowest < 0 or highest >= vocab:
                raise ValueError(f"token ids from {int(lowest)} to {int(highest)} do not fit a vocabulary of {vocab}")
            fresh, seen = (context * vocab + targets[:, None]).flatten().unique(return_counts=True)
            pairs, place = torch.cat([pairs, fresh]).unique(return_inverse=True)
            counts = torch.zeros_like(pairs).index_add_(0, place, torch.cat([counts, seen]))
    if not len(pairs):
        raise ValueError("there is no context to count: give sequences of at least two tokens")
    return TokenStats(vocab, pairs, counts, _commonness(pairs, counts, vocab, fewest), threshold)


def _commonness(pairs: Tensor, counts: Tensor, vocab: int, fewest: int) -> Float[Tensor, " vocab"]:
    context, following, seen = pairs // vocab, pairs % vocab, counts.double()
    totals = torch.zeros(vocab, dtype=torch.float64).index_add_(0, context, seen)
    shares = seen / totals[context]
    entropy = torch.zeros(vocab, dtype=torch.float64).index_add_(0, context, torch.special.entr(shares))
    overall = torch.zeros(vocab, dtype=torch.float64).index_add_(0, following, seen / seen.sum())
    most = float(torch.special.entr(overall).sum())
    # Where everything is followed by the same token there is nothing to tell.
    relative = entropy / most if most > 0 else torch.zeros_like(entropy)
    return torch.where(totals >= fewest, relative, math.nan).float()


def _windows(text: Tensor, window: int) -> Iterator[tuple[Tensor, Tensor]]:
    if len(text) > window:
        yield text[:-1].unfold(0, window, 1), text[window:]


def _portions(tokens: Tensor, following: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(1, PAIRS_AT_ONCE // tokens.shape[1])
    yield from zip(tokens.split(rows), following.split(rows), strict=True)
