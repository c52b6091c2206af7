"""An ensemble during training: what its networks say on average, how they scatter, and how often their mean is wrong."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dynascope.kernels.layerwise import called
from dynascope.probes.probe import Need, Probe
from dynascope.probes.views import ModelView
from dynascope.record import Series


def ensemble_summary(
    outputs: Float[Tensor, "networks examples bits"], targets: Float[Tensor, "examples bits"], threshold: float = 0.0
) -> dict[str, Tensor]:
    """Mean, variance, margins and failures of an ensemble whose mean is rounded to bits at `threshold`.

    A margin is how far the mean is on the right side of the threshold. The predicted failure takes the mean of the
    networks as normal with their variance over their number, bits independently: what theory sizes ensembles by.
    Raises ValueError for fewer than two networks, which have no variance. Source: 2502.16763, section 4.

    >>> ensemble_summary(torch.tensor([[[1.0, -1.0]], [[3.0, -1.0]]]), torch.tensor([[1.0, 0.0]]))["ensemble/margin"]
    tensor([1.])
    """
    if outputs.ndim != 3 or len(outputs) < 2:
        raise ValueError(f"outputs of two networks or more (networks, examples, bits) are needed, not {outputs.shape}")
    mean, variance = outputs.mean(0), outputs.var(0)
    side = torch.where(targets > 0, 1.0, -1.0)
    margins = side * (mean - threshold)
    is_wrong = (outputs > threshold) != (targets > 0)
    # A sum of logs keeps the digits of chances that are tiny in every bit.
    # A mean on the threshold without variance, 0/0, is wrong for sure.
    deviations = (margins / (variance / len(outputs)).sqrt()).nan_to_num(float("-inf"), float("inf"), float("-inf"))
    log_right = torch.special.log_ndtr(deviations).sum(1)
    return {
        "ensemble/mean": mean,
        "ensemble/variance": variance,
        "ensemble/margin": margins.amin(1),
        "ensemble/failure": (margins <= 0).any(1).float().mean(),
        "ensemble/failure_predicted": -torch.expm1(log_right).mean(),
        "ensemble/failure_single": is_wrong.any(2).float().mean(),
    }


class Ensemble(Probe):
    """Moments of an ensemble's outputs on fixed examples, and its failures as measured and as predicted.

    Args:
        inputs: What the model, which holds all networks, is called with.
        targets: (examples, bits), above 0 for a one.
        readout: From what the model returns to (networks, examples, bits).
        threshold: Where means are rounded; 0 for networks whose zeros come out slightly negative.

    >>> dynascope.watch(networks, optimizer, probes=[Ensemble(inputs, images)])
    """

    name = "ensemble"
    needs = frozenset({Need.MODEL})
    default = False
    series = (
        Series("ensemble/mean", ("example", "bit"), description="Mean output over networks."),
        Series("ensemble/variance", ("example", "bit"), description="Variance of the outputs over networks."),
        Series("ensemble/margin", ("example",), description="Smallest distance of the mean's bits from being wrong."),
        Series("ensemble/failure", description="Share of examples that the rounded mean gets wrong."),
        Series("ensemble/failure_predicted", description="The same, expected from mean and variance."),
        Series("ensemble/failure_single", description="Share of examples that a single network gets wrong."),
    )

    def __init__(
        self,
        inputs: Any,
        targets: Float[Tensor, "examples bits"],
        *,
        readout: Callable[[Any], Tensor] = lambda output: output,
        threshold: float = 0.0,
    ) -> None:
        self.inputs, self.targets, self.readout, self.threshold = inputs, targets, readout, threshold

    def measure(self, view: ModelView) -> Mapping[str, Tensor]:
        """The summary now."""
        return ensemble_summary(self.readout(called(view.model, self.inputs)), self.targets, self.threshold)
