"""Quantiles of a stream of scores, followed without keeping the scores."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dynascope.rl.risk.ranks import gathered


class QuantileTracker:
    """Follows the quantiles of whatever scalar comes in batches: bundle scores, rewards, losses, lengths.

    The first batch starts it at its own quantiles (linear interpolation); every later one moves each by
    `lr` · (level − share of scores strictly below it), a stochastic approximation whose fixed point is the quantile of the
    stream (2510.00911, section 3). A constant `lr` follows a drifting distribution, with a noise of its own order, but moves
    by less than `lr` a batch: scores that fall faster leave it behind. Scores that are not finite are left out. Without
    waiting for the device after the first batch.

    Args:
        levels: Between 0 and 1, both excluded; kept in order.
        lr: In units of the scores.
        across_ranks: The scores given are this process's alone, and those of all processes of torch.distributed count;
            False where every process is given all of them.

    Raises ValueError for levels or a rate out of range.

    >>> tracker = QuantileTracker([0.2, 0.8])
    >>> tracker.update(torch.tensor([0.0, 1, 2, 3, 4]))
    >>> tracker.value(0.2)
    tensor(0.8000)
    """

    def __init__(self, levels: Sequence[float], lr: float = 0.1, *, across_ranks: bool = False) -> None:
        if not levels or not all(0 < level < 1 for level in levels):
            raise ValueError(f"levels={list(levels)} must lie between 0 and 1, at least one")
        if lr <= 0:
            raise ValueError(f"lr={lr} must be above 0")
        self.levels = tuple(sorted(set(levels)))
        self.lr = lr
        self.across_ranks = across_ranks
        self.values: Float[Tensor, " levels"] | None = None
        """By level; None before the first batch."""

    @torch.no_grad()
    def update(self, scores: Float[Tensor, "..."]) -> None:
        """Take in a batch of any shape. Raises ValueError for an empty one, or a first one without a finite score."""
        scores = scores.detach().flatten()
        if self.across_ranks:
            scores = gathered(scores)
        if not len(scores):
            raise ValueError("there are no scores to follow: give at least one")
        levels = torch.tensor(self.levels, dtype=scores.dtype, device=scores.device)
        finite = scores.isfinite()
        if self.values is None:
            if not bool(finite.any()):
                raise ValueError("none of the first scores is finite, so no quantile can start there; mend the scores")
            self.values = scores[finite].quantile(levels)
            return
        values = self.values.to(scores)
        below = ((scores < values[:, None]) & finite).sum(1) / finite.sum().clamp(min=1)
        self.values = torch.where(finite.any(), values + self.lr * (levels - below), values)

    def value(self, level: float) -> Float[Tensor, ""]:
        """The quantile of the tracked level that is nearest. Raises ValueError before the first batch.

        >>> tracker.value(0.5)
        """
        if self.values is None:
            raise ValueError("no scores yet: call update first")
        return self.values[min(range(len(self.levels)), key=lambda place: abs(self.levels[place] - level))]

    def state_dict(self) -> dict[str, Any]:
        """Levels and quantiles, for a checkpoint."""
        return {"levels": self.levels, "values": None if self.values is None else self.values.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave. Raises ValueError when it is of other levels."""
        if tuple(state["levels"]) != self.levels:
            raise ValueError(f"the state is of levels {list(state['levels'])}, but these are {list(self.levels)}")
        self.values = None if state["values"] is None else state["values"].clone()
