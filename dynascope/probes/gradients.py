"""Gradients: how large they are in each parameter, how they turn from step to step, and how noisy they are."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from dynascope.probes.probe import Need, Probe
from dynascope.probes.views import StepView, foreach_norm, stacked
from dynascope.record import Series


def gradient_cosine(
    inner: Float[Tensor, ""], norm: Float[Tensor, ""], previous_norm: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Cosine of the angle between two gradients, from their inner product and norms; NaN if one of them is zero.

    >>> gradient_cosine(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(2.0))
    tensor(0.5000)
    """
    return inner / (norm * previous_norm)


def gradient_noise_scale(
    inner: Float[Tensor, ""], squared_norm: Float[Tensor, ""], batch_size: int | Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """The batch size at which noise and signal of the gradient are equal (simple noise scale), in examples.

    The quantity is tr(Σ)/|G|² of 1812.06162, section 2.2. Its estimate from successive steps is ours: their noise is
    independent and their mean G nearly the same, so the inner product estimates |G|², and |g|² = |G|² + tr(Σ)/batch_size
    gives tr(Σ). One pair is a rough estimate: smooth over steps. NaN where the inner product is not positive: the
    signal is then below what one pair can show.

    >>> gradient_noise_scale(torch.tensor(1.0), torch.tensor(3.0), batch_size=8)
    tensor(16.)
    """
    signal = torch.where(inner > 0, inner, torch.nan)
    return batch_size * (squared_norm - signal).clamp(min=0) / signal


class Gradients(Probe):
    """Gradient norms as the optimizer sees them, after accumulation and clipping."""

    name = "gradients"
    needs = frozenset({Need.GRADIENTS})
    series = (
        Series("gradients/norm", ("parameter",), description="Norm of each parameter's gradient."),
        Series("gradients/total_norm", description="Norm of the whole gradient, after clipping."),
    )

    def measure(self, view: StepView) -> Mapping[str, Tensor]:
        """Norm of each gradient and of all of them together."""
        squared = view.squared_norms(view.gradients)
        return {"gradients/norm": squared.sqrt(), "gradients/total_norm": squared.nansum().sqrt()}


class GradientNoise(Probe):
    """How the gradient turns between two successive steps, and the noise scale that follows from it.

    Costs one copy of the gradients, kept from one step to the next when it looks.
    """

    name = "gradient-noise"
    needs = frozenset({Need.GRADIENTS, Need.PREVIOUS_GRADIENTS})
    series = (
        Series("gradients/cosine", description="Cosine between the gradients of two successive steps."),
        Series(
            "gradients/noise_scale",
            unit="examples",
            description="Batch size at which noise and signal are equal (in batches where its size is unknown).",
        ),
    )

    def measure(self, view: StepView) -> Mapping[str, Tensor]:
        """Cosine and noise scale over the parameters that have both gradients."""
        names = [name for name in view.gradients if name in view.previous_gradients]
        now = [view.gradients[name].float() for name in names]
        before = [view.previous_gradients[name].float() for name in names]
        squared = view.sum_over_shards(names, stacked(foreach_norm(now)).square()).sum()
        squared_before = view.sum_over_shards(names, stacked(foreach_norm(before)).square()).sum()
        products = stacked([torch.dot(a.flatten(), b.flatten()) for a, b in zip(now, before, strict=True)])
        inner = view.sum_over_shards(names, products).sum()
        return {
            "gradients/cosine": gradient_cosine(inner, squared.sqrt(), squared_before.sqrt()),
            "gradients/noise_scale": gradient_noise_scale(inner, squared, view.num_examples or 1),
        }
