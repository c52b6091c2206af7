"""A stretch of one series in plain arrays, for readers that follow a record and need no more."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64, Shaped

if TYPE_CHECKING:  # as in the reader: a training under watch need not wait for it
    import xarray


@dataclass(frozen=True, eq=False)
class Piece:
    """Measurements in the order of their steps.

    >>> piece = Piece.of(dynascope.open("runs/mine")["attention/entropy"])
    >>> dict(zip(piece.steps, piece.values))
    """

    steps: Int64[np.ndarray, " count"]
    values: Shaped[np.ndarray, "count ..."]
    coords: Mapping[str, Sequence[Any]]
    """The labels along each axis of one measurement, in the order of the axes."""

    @classmethod
    def of(cls, series: "xarray.DataArray") -> "Piece":
        """The same from a labelled array of dims (step, …)."""
        return cls(
            series["step"].values, series.values, {str(dim): series[dim].values.tolist() for dim in series.dims[1:]}
        )

    def __len__(self) -> int:
        return len(self.steps)
