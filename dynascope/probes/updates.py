"""Updates: how far one optimizer step moves each parameter, and relative to its size."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from dynascope.probes.probe import Need, Probe
from dynascope.probes.views import StepView
from dynascope.record import Series


def update_ratio(
    update_norm: Float[Tensor, " parameter"], weight_norm: Float[Tensor, " parameter"]
) -> Float[Tensor, " parameter"]:
    """Update norm over weight norm; about 1e-3 is the usual healthy size. Infinite for a parameter that is all zero.

    >>> update_ratio(torch.tensor([1e-3]), torch.tensor([1.0]))
    tensor([0.0010])
    """
    return update_norm / weight_norm


class Updates(Probe):
    """Weight norms, update norms and their ratio, a value a parameter.

    Costs one copy of the parameters for the length of the optimizer's step when it looks.
    """

    name = "updates"
    needs = frozenset({Need.PARAMETERS, Need.UPDATES})
    series = (
        Series("weights/norm", ("parameter",), description="Norm of each parameter after the step."),
        Series("updates/norm", ("parameter",), description="Norm of what the step added to each parameter."),
        Series("updates/ratio", ("parameter",), description="Update norm over weight norm of each parameter."),
    )

    def measure(self, view: StepView) -> Mapping[str, Tensor]:
        """Norms of weights and updates, and their ratio."""
        weights = view.squared_norms(view.parameters).sqrt()
        updates = view.squared_norms(view.updates).sqrt()
        return {
            "weights/norm": weights,
            "updates/norm": updates,
            "updates/ratio": update_ratio(updates, weights),
        }
