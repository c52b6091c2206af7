"""Mesa-optimization: does a sequence model predict by one step of gradient descent on its context?"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from dynascope.kernels.layerwise import called
from dynascope.nn.linear_attention import LinearCausalAttention
from dynascope.probes.probe import Need, Probe
from dynascope.probes.views import ModelView
from dynascope.record import Series
from dynascope.theory.mesa import GDStepFit, off_diagonal_share


class MesaOptimizer(Probe):
    """The step of gradient descent that a model's predictions come nearest to, and how near they come.

    Args:
        prompts: Sequences (batch, length, dim), real or complex; the model is called with them unless `inputs` says how.
        inputs: From prompts to what the model is called with (Hugging Face: `lambda x: {"inputs_embeds": embed(x)}`).
        readout: From what the model returns to predictions of tokens 3 … length, (batch, length − 2, dim).

    Of a `LinearCausalAttention` its two scalars and what lies off their diagonals are recorded too. Source:
    2405.16845, sections 4 and 5.

    >>> dynascope.watch(model, optimizer, probes=[MesaOptimizer(process.sample(256, generator))])
    """

    name = "mesa-optimizer"
    needs = frozenset({Need.MODEL})
    default = False
    series = (
        Series(
            "mesa/step", description="Step of gradient descent on the context that the predictions come nearest to."
        ),
        Series("mesa/residual", description="Share of the predictions' square that one step leaves unexplained."),
        Series("mesa/preconditioned_residual", description="The same with the best preconditioner."),
        Series("mesa/loss_by_position", ("position",), description="Mean squared error of each prediction."),
        Series("mesa/a", description="Mean diagonal of the key-query block."),
        Series("mesa/b", description="Mean diagonal of the projection-value block."),
        Series("mesa/conserved", description="a² - b² less that at the first look; gradient flow keeps it at 0."),
        Series(
            "mesa/off_diagonal",
            ("block",),
            description="Off-diagonal share of the two blocks.",
            coords={"block": ["kq", "pv"]},
        ),
    )

    def __init__(
        self,
        prompts: Shaped[Tensor, "batch length dim"],
        *,
        inputs: Callable[[Tensor], Any] = lambda prompts: prompts,
        readout: Callable[[Any], Tensor] = lambda output: output,
    ) -> None:
        self.prompts, self.inputs, self.readout = prompts, inputs, readout
        self._fit = GDStepFit(prompts)
        self._conserved: Tensor | None = None

    def measure(self, view: ModelView) -> Mapping[str, Tensor]:
        """The fit, and the scalars where there are such."""
        predictions = self.readout(called(view.model, self.inputs(self.prompts)))
        fit = self._fit(predictions)
        errors = (predictions - self.prompts[:, 2:]).abs().square().sum(2).mean(0)
        measured = {
            "mesa/step": fit.step,
            "mesa/residual": fit.residual,
            "mesa/preconditioned_residual": fit.preconditioned_residual,
            "mesa/loss_by_position": errors,
        }
        if isinstance(view.model, LinearCausalAttention):
            kq, pv = view.model.useful_blocks()
            a, b = (block.diagonal().mean().real for block in (kq, pv))
            conserved = a.square() - b.square()
            self._conserved = conserved.clone() if self._conserved is None else self._conserved
            measured |= {
                "mesa/a": a,
                "mesa/b": b,
                "mesa/conserved": conserved - self._conserved,
                "mesa/off_diagonal": torch.stack([off_diagonal_share(kq), off_diagonal_share(pv)]),
            }
        return measured
