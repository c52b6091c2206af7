"""How far the weights have come from where they began."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dynascope.probes.probe import Need, Probe
from dynascope.probes.views import StepView
from dynascope.record import Series


class WeightDisplacement(Probe):
    """‖w − w₀‖ / ‖w₀‖ of each parameter, w₀ being its value at the first look: small for a lazy network (2310.06110).

    Keeps a copy of the parameters. NaN where a parameter began at zero.

    >>> dynascope.watch(model, optimizer, probes=["weight-displacement"])
    """

    name = "weight-displacement"
    needs = frozenset({Need.PARAMETERS})
    default = False
    series = (
        Series("weights/displacement", ("parameter",), description="Distance from the first look over the norm there."),
    )

    def __init__(self) -> None:
        self._first: dict[str, Tensor] = {}

    def measure(self, view: StepView) -> Mapping[str, Tensor]:
        """Relative displacement a parameter."""
        if not self._first:
            self._first = {name: parameter.detach().clone() for name, parameter in view.parameters.items()}
        names = [name for name in view.parameters if name in self._first]
        moved = torch._foreach_sub([view.parameters[name] for name in names], [self._first[name] for name in names])
        far = view.squared_norms(dict(zip(names, moved, strict=True)))
        start = view.squared_norms({name: self._first[name] for name in names})
        ratio = (far / start).sqrt()
        return {"weights/displacement": torch.where(start > 0, ratio, torch.nan)}
