"""The residual stream: how it grows with depth, how many directions it uses, and where it peaks."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from dynascope.probes.activations import rms
from dynascope.probes.probe import Need, Probe
from dynascope.probes.spectra import eigenvalues
from dynascope.probes.views import ModuleOutput
from dynascope.record import Series

# Positions taken for the effective rank: its cost grows with their cube, its value changes little beyond them.
MOST_POSITIONS = 256


def effective_rank(matrix: Float[Tensor, "positions features"]) -> Float[Tensor, ""]:
    """exp of the entropy of the normalised singular values: from 1 (one direction) to min(positions, features).

    Computed from the smaller Gram matrix. Source: Roy and Vetterli, "The effective rank" (EUSIPCO 2007).

    >>> effective_rank(torch.eye(4))
    tensor(4.)
    """
    matrix = matrix.float()
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    singular = eigenvalues(gram).clamp(min=0).sqrt()
    share = singular / singular.sum()
    rank: Tensor = torch.special.entr(share).sum().exp()
    return rank


def residual_peak(states: Float[Tensor, "rows positions features"]) -> Float[Tensor, ""]:
    """Largest norm of a position's state over the median norm, averaged over rows (2410.13835: residual-state peaks).

    >>> residual_peak(torch.ones(1, 3, 2))
    tensor(1.)
    """
    norms = states.float().norm(dim=-1)
    peak: Tensor = (norms.amax(dim=1) / norms.median(dim=1).values).mean()
    return peak


class Residual(Probe):
    """The output of each residual block: RMS, effective rank and peak."""

    name = "residual"
    needs = frozenset({Need.BLOCKS})
    series = (
        Series("residual/rms", ("block",), description="Root mean square of each block's output."),
        Series(
            "residual/effective_rank",
            ("block",),
            unit="directions",
            description="Number of directions that the states after each block effectively use.",
        ),
        Series(
            "residual/peak",
            ("block",),
            description="Largest norm among a sequence's positions over the median norm, after each block.",
        ),
    )

    def measure(self, view: ModuleOutput) -> Mapping[str, Tensor]:
        """The three quantities of one block's output."""
        units = view.by_unit()
        spread = units[:: max(1, units.shape[0] // MOST_POSITIONS)][:MOST_POSITIONS]
        measured = {"residual/rms": rms(view.tensor), "residual/effective_rank": effective_rank(spread)}
        if view.tensor.ndim == 3 and not view.is_channels_first:
            measured["residual/peak"] = residual_peak(view.tensor)
        return measured
