"""Adam's second moment: whether it still knows the size of today's gradients."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dynascope.probes.probe import Need, Probe
from dynascope.probes.views import StepView, foreach_norm, stacked
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
        # Left uncorrected, the moment needs no copy: with c = 1 - beta^t its corrected value is moment / c.
        corrections = [1 - view.groups[name]["betas"][1] ** _count(view.states[name]["step"]) for name in names]
        floors = [view.groups[name]["eps"] ** 2 * c for name, c in zip(names, corrections, strict=True)]
        moments = [_local(view.states[name]["exp_avg_sq"]).float() for name in names]
        gradients = [view.gradients[name].float() for name in names]
        floored = _at_least(moments, floors)
        ratios = foreach_norm(list(torch._foreach_div(gradients, torch._foreach_sqrt(floored))))
        squares = [ratio.square() * c for ratio, c in zip(ratios, corrections, strict=True)]
        # Raising to the floor changes exactly the elements below it.
        raised = torch._foreach_sign(torch._foreach_sub(floored, moments))
        below = list(torch._foreach_norm(raised, 1, dtype=torch.float32))
        sizes = [gradient.numel() for gradient in gradients]
        device = squares[0].device
        # An empty shard has no mean; it adds nothing.
        totals = [view.sum_over_shards(names, stacked(values).nan_to_num(nan=0.0)) for values in (squares, below)]
        count = view.sum_over_shards(names, torch.tensor(sizes, dtype=torch.float32, device=device))
        unsharded = view.per_parameter
        return {
            "adam/update_rms": unsharded(names, (totals[0] / count).sqrt()),
            "adam/epsilon_fraction": unsharded(names, totals[1] / count),
        }


def _count(step: Tensor | float) -> Tensor | float:
    """Adam's step count as a number, unless it lives on an accelerator, where asking for it would wait."""
    return float(step) if not isinstance(step, Tensor) or step.device.type == "cpu" else step


def _at_least(tensors: list[Tensor], floors: Sequence[Tensor | float]) -> list[Tensor]:
    numbers = [floor for floor in floors if isinstance(floor, float)]
    if len(numbers) == len(floors):
        return list(torch._foreach_clamp_min(tensors, numbers))
    return [torch.clamp(tensor, min=floor) for tensor, floor in zip(tensors, floors, strict=True)]


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local
