"""Histories of single examples: what the model thought of each one, whenever it was in a batch."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dynascope.data.scores import el2n
from dynascope.probes.probe import Need, Probe
from dynascope.probes.views import ExampleBatch
from dynascope.record import Series


class Examples(Probe):
    """Identity, correctness, confidence and EL2N of each example in a batch that `Watch.examples` was given.

    Its steps number those batches. The first batch sets how many slots there are; a smaller one leaves the rest empty
    (id −1, NaN), a larger one is refused. `dynascope.data.stacked_visits` turns what is recorded into a history of each
    example, and `cartography` into the map of the dataset (arXiv 2107.07075; 2009.10795).

    >>> with dynascope.watch(model, optimizer, probes=["default", "examples"]) as w:
    ...     w.examples(ids, logits, labels)
    """

    name = "examples"
    needs = frozenset({Need.EXAMPLES})
    default = False
    series = (
        Series("examples/id", ("slot",), description="Position in the dataset of each example of a batch; -1: none."),
        Series("examples/correct", ("slot",), description="1 where the likeliest class is the label, else 0."),
        Series("examples/confidence", ("slot",), description="Probability of the label."),
        Series("examples/el2n", ("slot",), description="Norm of the error of the probabilities (EL2N)."),
    )

    def __init__(self) -> None:
        self._num_slots: int | None = None

    def measure(self, view: ExampleBatch) -> Mapping[str, Tensor]:
        """The four series of one batch. Raises ValueError for a batch larger than the first."""
        size = len(view.ids)
        self._num_slots = self._num_slots or size
        if size > self._num_slots:
            raise ValueError(
                f"a batch of {size} examples came after one of {self._num_slots}; the largest must come first"
            )
        right = view.logits.argmax(-1) == view.labels
        confidence = view.logits.float().softmax(-1).gather(-1, view.labels[:, None])[:, 0]
        values = {"correct": right.float(), "confidence": confidence, "el2n": el2n(view.logits, view.labels)}
        padding = (0, self._num_slots - size)
        padded = {
            f"examples/{name}": torch.nn.functional.pad(one, padding, value=torch.nan) for name, one in values.items()
        }
        return {"examples/id": torch.nn.functional.pad(view.ids.long(), padding, value=-1), **padded}
