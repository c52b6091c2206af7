"""Adam's second moment: whether it still knows the size of today's gradients."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from dynascope.probes.probe import Need, Probe
from dynascope.probes.views import StepView, stacked
from dynascope.record import Series


def adam_update_rms(
    gradient: Float[Tensor, "*shape"], second_moment: Float[Tensor, "*shape"], eps: float
) -> Float[Tensor, ""]:
    """RMS of `gradient / sqrt(second_moment)`, the step that Adam would take without momentum, in units of lr.

    About 1 while the second moment describes the gradients. Values above 2.3 come 1 to 8 steps before loss spikes, as
    the second moment has gone stale (2304.13013, section 3.4). `second_moment` is Adam's bias-corrected `exp_avg_sq`.

    >>> adam_update_rms(torch.tensor([2.0]), torch.tensor([4.0]), eps=1e-8)
    tensor(1.)
    """
    scaled = gradient.float().square() / second_moment.float().clamp(min=eps**2)
    return scaled.mean().sqrt()


def epsilon_fraction(second_moment: Float[Tensor, "*shape"], eps: float) -> Float[Tensor, ""]:
    """Share of elements whose second-moment root is below `eps`; there Adam takes steps of the gradient's size, not lr's.

    `second_moment` is Adam's bias-corrected `exp_avg_sq`.
    """
    return (second_moment < eps**2).float().mean()


class AdamHealth(Probe):
    """The health of the second moment, for optimizers that keep `exp_avg_sq` (Adam, AdamW, RAdam, NAdam and kin)."""

    name = "adam"
    needs = frozenset({Need.GRADIENTS, Need.OPTIMIZER_STATE})
    series = (
        Series(
            "adam/update_rms",
            ("parameter",),
            unit="lr",
            description="RMS of gradient over the root of Adam's second moment; above 2.3 the moment is stale.",
        ),
        Series(
            "adam/epsilon_fraction",
            ("parameter",),
            description="Share of elements whose second-moment root is below Adam's eps.",
        ),
    )

    def measure(self, view: StepView) -> Mapping[str, Tensor]:
        """Both quantities a parameter; nothing for an optimizer without a second moment."""
        names = [name for name in view.gradients if "exp_avg_sq" in view.states[name]]
        if not names:
            return {}
        squares, below, sizes = [], [], []
        for name in names:
            group, state = view.groups[name], view.states[name]
            corrected = _local(state["exp_avg_sq"]) / (1 - group["betas"][1] ** state["step"])
            gradient = view.gradients[name]
            sizes.append(gradient.numel())
            squares.append(adam_update_rms(gradient, corrected, group["eps"]).square() * gradient.numel())
            below.append(epsilon_fraction(corrected, group["eps"]) * gradient.numel())
        device = squares[0].device
        # An empty shard has no mean; it adds nothing.
        totals = [view.sum_over_shards(names, stacked(values).nan_to_num(nan=0.0)) for values in (squares, below)]
        count = view.sum_over_shards(names, torch.tensor(sizes, dtype=torch.float32, device=device))
        unsharded = view.per_parameter
        return {
            "adam/update_rms": unsharded(names, (totals[0] / count).sqrt()),
            "adam/epsilon_fraction": unsharded(names, totals[1] / count),
        }


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local
