"""Which examples to keep, and a sampler over them."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.utils.data import Sampler


def select(
    scores: Float[Tensor, " examples"] | Float[np.ndarray, " examples"],
    *,
    keep: float = 0.5,
    drop_hardest: float = 0.0,
    per_class: Shaped[Tensor, " labels"] | Shaped[np.ndarray, " labels"] | None = None,
) -> list[int]:
    """Positions of the examples to keep: those with the highest scores, in ascending order of position.

    Args:
        keep: Share of all examples.
        drop_hardest: Share of all examples with the very highest scores that is left out first; under label noise these
            are the mislabelled ones (Section 3.2: a window of the sorted scores).
        per_class: Labels; then each class keeps its share.

    Equal scores fall in the order of their positions. The list fits `torch.utils.data.Subset` and `Dataset.select` of
    Hugging Face. Raises ValueError for shares that do not fit, and for scores that are NaN.

    >>> select(np.array([0.1, 0.9, 0.5, 0.7]), keep=0.5)
    [1, 3]
    """
    values = np.asarray(scores, np.float64)
    if not 0 < keep <= 1 or not 0 <= drop_hardest < 1 or keep + drop_hardest > 1 + 1e-9:
        raise ValueError(f"keep={keep} and drop_hardest={drop_hardest} are shares whose sum is at most 1")
    if np.isnan(values).any():
        raise ValueError(f"{int(np.isnan(values).sum())} scores are NaN; score every example before selecting")
    if per_class is None:
        return _window(values, np.arange(len(values)), keep, drop_hardest)
    labels = np.asarray(per_class)
    if labels.shape != values.shape:
        raise ValueError(f"{len(labels)} labels for {len(values)} scores")
    each = [_window(values, np.flatnonzero(labels == label), keep, drop_hardest) for label in np.unique(labels)]
    return sorted(index for indices in each for index in indices)


def _window(scores: np.ndarray, among: np.ndarray, keep: float, drop_hardest: float) -> list[int]:
    ascending = among[np.argsort(scores[among], kind="stable")]
    end = len(among) - round(drop_hardest * len(among))
    size = min(round(keep * len(among)), end)
    return sorted(ascending[end - size : end].tolist())


def class_shares(indices: Sequence[int], labels: Int[np.ndarray, " examples"]) -> dict[int, tuple[float, float]]:
    """Of each class: its share of all examples, and of the kept ones; heavy pruning can make a class vanish.

    >>> class_shares([0, 1], np.array([0, 0, 1, 1]))
    {0: (0.5, 1.0), 1: (0.5, 0.0)}
    """
    kept = np.asarray(labels)[np.asarray(indices, int)]
    return {int(label): (float(np.mean(labels == label)), float(np.mean(kept == label))) for label in np.unique(labels)}


class PrunedSampler(Sampler[int]):
    """Draws the kept examples in a new order each epoch.

    `epoch_size` None makes an epoch as short as the kept set (equal *epochs*: less work). The size of the full set keeps
    the number of steps (equal *iterations*, the paper's comparison): the kept set is gone through again until it is
    reached. `seed` makes the orders repeat; it counts up by itself each epoch.

    >>> DataLoader(dataset, batch_size=128, sampler=PrunedSampler(keep, epoch_size=len(dataset), seed=0))
    """

    def __init__(self, indices: Sequence[int], *, epoch_size: int | None = None, seed: int = 0) -> None:
        if not len(indices):
            raise ValueError("no examples were kept")
        self._indices = torch.as_tensor(list(indices))
        self._size, self._seed, self._epoch = epoch_size or len(indices), seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Continue with the order of this epoch, as a resumed training does."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        self._epoch += 1
        num_rounds = -(-self._size // len(self._indices))
        rounds = [self._indices[torch.randperm(len(self._indices), generator=generator)] for _ in range(num_rounds)]
        yield from torch.cat(rounds)[: self._size].tolist()
