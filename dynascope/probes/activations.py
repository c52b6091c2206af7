"""Activations: their size in every module, and units that no longer answer to anything."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from dynascope.probes.probe import Need, Probe
from dynascope.probes.views import ModuleOutput
from dynascope.record import Series


def rms(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Root mean square over all elements, in float32.

    >>> rms(torch.tensor([3.0, 4.0]))
    tensor(3.5355)
    """
    return tensor.float().square().mean().sqrt()


def dead_fraction(units: Float[Tensor, "positions units"], threshold: float = 0.0) -> Float[Tensor, ""]:
    """Share of units whose output is at most `threshold` in magnitude at every position.

    For ReLU a dead unit gives exactly 0 everywhere and gets no gradient. Smooth activations (GELU, SiLU) never reach 0;
    a unit counts as dead there when it stays in the flat tail: pass a small threshold.

    >>> dead_fraction(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    tensor(0.5000)
    """
    return (units.abs() <= threshold).all(dim=0).float().mean()


class Activations(Probe):
    """RMS of the output of every module that has parameters of its own."""

    name = "activations"
    needs = frozenset({Need.MODULES})
    series = (Series("activations/rms", ("module",), description="Root mean square of each module's output."),)

    def measure(self, view: ModuleOutput) -> Mapping[str, Tensor]:
        """RMS of one module's output."""
        return {"activations/rms": rms(view.tensor)}


class DeadUnits(Probe):
    """Share of dead units behind every activation function, whether a module or a function call."""

    # GELU and SiLU fall below this in magnitude only in their flat tails (GELU from about -4, SiLU from about -9 on).
    tail = 1e-3
    name = "dead-units"
    needs = frozenset({Need.ACTIVATIONS})
    series = (
        Series(
            "activations/dead_fraction",
            ("activation",),
            unit="share of units",
            description="Units whose activation is zero, or in its flat tail, at every position looked at.",
        ),
    )

    def measure(self, view: ModuleOutput) -> Mapping[str, Tensor]:
        """Share of dead units behind one activation function."""
        threshold = 0.0 if view.kind in ("relu", "relu6") else self.tail
        return {"activations/dead_fraction": dead_fraction(view.by_unit(), threshold)}
