"""What became of each example over a training: forgetting, and the map of a dataset."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class ForgettingTracker:
    """Counts how often each example goes from classified right to wrong between its consecutive visits.

    Fed from the training's own batches, in any order and with any number of visits. Source: Toneva et al. (1812.05159),
    as used in 2107.07075, Section 3; an example that was never classified right counts as infinity.

    >>> tracker = ForgettingTracker(50_000)
    >>> tracker.update(ids, logits.argmax(-1) == labels)  # every step
    >>> tracker.scores()
    """

    def __init__(self, num_examples: int) -> None:
        if num_examples < 1:
            raise ValueError("a tracker wants at least one example")
        self._forgotten = torch.zeros(num_examples, dtype=torch.long)
        self._was_right = torch.zeros(num_examples, dtype=torch.bool)
        self._was_ever_right = torch.zeros(num_examples, dtype=torch.bool)
        self._visits = torch.zeros(num_examples, dtype=torch.long)

    def update(self, ids: Int[Tensor, " batch"], correct: Bool[Tensor, " batch"]) -> None:
        """Note one visit of each example. Raises ValueError for an id that is out of range."""
        ids, correct = ids.cpu(), correct.cpu()
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(self._visits):
            raise ValueError(f"an example id is not in 0 … {len(self._visits) - 1}; ids are positions in the dataset")
        # An example may come twice in a batch; each round takes the first visits that are left.
        while ids.numel():
            order = torch.argsort(ids, stable=True)
            is_first = torch.ones(len(ids), dtype=torch.bool)
            is_first[order[1:][ids[order[1:]] == ids[order[:-1]]]] = False
            self._visit(ids[is_first], correct[is_first])
            ids, correct = ids[~is_first], correct[~is_first]

    def _visit(self, ids: Tensor, correct: Tensor) -> None:
        self._forgotten[ids] += self._was_right[ids] & ~correct
        self._was_right[ids] = correct
        self._was_ever_right[ids] |= correct
        self._visits[ids] += 1

    def scores(self) -> Float[Tensor, " examples"]:
        """Forgetting events of each example; infinity where it was never right, NaN where it was never seen."""
        scores = self._forgotten.float()
        scores[~self._was_ever_right] = torch.inf
        scores[self._visits == 0] = torch.nan
        return scores


def cartography(
    confidence: Float[np.ndarray, "visits examples"], correct: Float[np.ndarray, "_ _"]
) -> dict[str, Float[np.ndarray, " examples"]]:
    """Where each example stands on the map of its dataset, from its visits over training.

    `confidence` is the probability of its label at each visit, `correct` 1 or 0; NaN where it was not visited. Gives
    "confidence" (mean), "variability" (standard deviation) and "correctness" (share of visits). Source: Swayamdipta
    et al. (2009.10795), Section 2.

    >>> cartography(np.array([[0.2], [0.8]]), np.array([[0.0], [1.0]]))["variability"]
    array([0.3])
    """
    if confidence.shape != correct.shape:
        raise ValueError(f"confidence is {confidence.shape}, correct is {correct.shape}; they are of the same visits")
    return {
        "confidence": np.nanmean(confidence, axis=0),
        "variability": np.nanstd(confidence, axis=0),
        "correctness": np.nanmean(correct, axis=0),
    }


def stacked_visits(
    ids: Sequence[Int[np.ndarray, " _"]], values: Sequence[Float[np.ndarray, " _"]], num_examples: int
) -> Float[np.ndarray, "visits examples"]:
    """Values of batches, one visit of every example a row; NaN where an example was visited less often.

    >>> stacked_visits([np.array([1, 0]), np.array([1])], [np.array([0.1, 0.2]), np.array([0.3])], 2)
    array([[0.2, 0.1],
           [nan, 0.3]])
    """
    every, told = np.concatenate(ids), np.concatenate(values)
    order = np.argsort(every, kind="stable")
    counts = np.bincount(every, minlength=num_examples)
    visit = np.arange(len(every)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.full((int(counts.max(initial=0)), num_examples), np.nan)
    table[visit, every[order]] = told[order]
    return table
