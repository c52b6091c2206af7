"""The tangent kernel during training: how far it moves, how it stands to the labels, and what it predicts."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dynascope.kernels import (
    KernelTraining,
    effective_rank,
    examples_at_once,
    kernel_alignment,
    kernel_distance,
    kernel_velocity,
    ntk,
)
from dynascope.kernels.layerwise import called
from dynascope.probes.probe import Need, Probe
from dynascope.probes.views import ModelView
from dynascope.record import Series

NUM_MODES = 8


def last_logit(output: Any) -> Tensor:
    """What a kernel is taken of unless a readout says otherwise: outputs (rows,) or (rows, outputs) as they are.

    Of (rows, positions, vocabulary) logits, also inside a Hugging Face output, it is the largest logit at the last
    position. Raises ValueError for anything else.

    >>> last_logit(torch.zeros(4, 16, 100)).shape
    torch.Size([4, 1])
    """
    logits = getattr(output, "logits", output)
    logits = logits[0] if isinstance(logits, tuple) else logits
    if isinstance(logits, Tensor) and logits.ndim == 3:
        return logits[:, -1].amax(-1, keepdim=True)
    if isinstance(logits, Tensor) and logits.ndim in (1, 2):
        return logits
    raise ValueError(f"no outputs to take a kernel of in {type(output).__name__}; give the probe a readout")


class _OnFixedExamples(Probe):
    """A probe of the model's outputs on examples that are the same at every look."""

    needs = frozenset({Need.MODEL})
    default = False

    def __init__(
        self,
        inputs: Any = None,
        targets: Tensor | None = None,
        *,
        readout: Callable[[Any], Tensor] = last_logit,
        num_examples: int = 64,
    ) -> None:
        self.inputs, self.targets, self.readout, self.num_examples = inputs, targets, readout, num_examples

    def examples(self, view: ModelView) -> Any:
        """The inputs given, or else the first rows of the first batch that was seen.

        Keyword arguments that have no row an example (a Trainer's `num_items_in_batch`, switches) are left out.
        """
        if self.inputs is None:
            rows: Any = view.args
            if view.kwargs and not view.args:
                rows = {name: value for name, value in view.kwargs.items() if isinstance(value, Tensor) and value.ndim}
            if not all(isinstance(leaf, Tensor) and leaf.ndim for leaf in tree_leaves(rows)):
                raise ValueError("the model is called with more than tensors of examples; give the probe its inputs")
            self.inputs = tree_map(lambda leaf: leaf[: self.num_examples].clone(), rows)
        return self.inputs

    def outputs(self, view: ModelView) -> Tensor:
        """(examples, outputs)."""
        out = self.readout(called(view.model, self.examples(view)))
        return out.reshape(len(out), -1)


class TangentKernel(_OnFixedExamples):
    """The empirical tangent kernel on fixed examples: its size, spectrum, movement, and alignment with the labels.

    Args:
        inputs: What the model is called with (default: the first rows of the first batch seen).
        targets: (examples,) or (examples, outputs), for the alignment; without them it is left out.
        readout: From what the model returns to (examples, outputs).
        num_examples: At most so many rows of that first batch.

    The kernel is that of the mean over outputs. Cost: a forward pass, and a backward pass an output, on the examples;
    memory as `dynascope.kernels.ntk`. Source: 1806.07572; 2310.06110, section 3.

    >>> dynascope.watch(model, optimizer, probes=[TangentKernel(images[:128], labels[:128])])
    """

    name = "tangent-kernel"
    series = (
        Series("kernel/trace", description="Mean of the tangent kernel's diagonal."),
        Series("kernel/eigenvalues", ("mode",), description="Its top eigenvalues over the number of examples."),
        Series("kernel/effective_rank", description="exp of the entropy of its spectrum."),
        Series("kernel/condition", description="Largest over smallest eigenvalue; infinite where that is 0."),
        Series("kernel/distance", description="Relative distance from the kernel at the first look."),
        Series("kernel/velocity", description="1 - cosine with the kernel at the look before."),
        Series("kernel/alignment", description="Centred alignment with the labels' kernel; 1 is aligned."),
        Series("kernel/label_power", ("mode",), description="Share of the labels in the top k eigenvectors."),
    )

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._first: Tensor | None = None
        self._before: Tensor | None = None
        self._at_once: int | None = None

    def measure(self, view: ModelView) -> Mapping[str, Tensor]:
        """One kernel, and what it says."""
        examples = self.examples(view)
        if self._at_once is None:
            self._at_once = examples_at_once(view.model, examples, readout=self.readout)
        kernel = ntk(view.model, examples, output="trace", readout=self.readout, chunk=self._at_once)
        self._first = kernel if self._first is None else self._first
        values, vectors = torch.linalg.eigh(kernel.double())
        values, vectors = values.flip(0), vectors.flip(1)
        measured = {
            "kernel/trace": kernel.diagonal().mean(),
            "kernel/eigenvalues": values[:NUM_MODES] / len(kernel),
            "kernel/effective_rank": effective_rank(values),
            "kernel/condition": values[0] / values[-1].clamp_min(0),
            "kernel/distance": kernel_distance(kernel, self._first),
        }
        if self._before is not None:
            measured["kernel/velocity"] = kernel_velocity(self._before, kernel)
        self._before = kernel
        if self.targets is not None:
            targets = self.targets.reshape(len(kernel), -1).double()
            power = (vectors.T @ targets).square().sum(1).cumsum(0) / targets.square().sum()
            measured["kernel/alignment"] = kernel_alignment(kernel.double(), targets)
            measured["kernel/label_power"] = power[:NUM_MODES]
        return measured


class ModeProgress(_OnFixedExamples):
    """How far each part of the labels is learnt, beside what the kernel at the start predicts for gradient descent.

    Errors f − y are read along the eigenvectors of the tangent kernel at the first look, top first, as a share of what
    they were there. The prediction (1 − lr · scale · λ)^steps is for full-batch gradient descent on (scale / 2) Σ (f − y)²
    over these examples, at the learning rate of the first look.

    Args:
        inputs, targets: The whole training set, for the prediction to apply; targets (examples,) or (examples, outputs).
        scale: 1/n for half the mean square over examples, which is the default; 2/(n · outputs) for `F.mse_loss`.

    >>> dynascope.watch(model, optimizer, every=10, probes=[ModeProgress(x, y, scale=2 / len(y))])
    """

    name = "mode-progress"
    series = (
        Series("modes/error", ("mode",), description="Error along the first kernel's eigenvectors over that at first."),
        Series("modes/predicted", ("mode",), description="The same as the constant kernel predicts it."),
        Series("modes/loss", description="Half the mean square of the error."),
        Series("modes/loss_predicted", description="The same as the constant kernel predicts it."),
    )

    def __init__(self, inputs: Any, targets: Tensor, *, scale: float | None = None, **settings: Any) -> None:
        super().__init__(inputs, targets, **settings)
        self.scale = scale if scale is not None else 1 / len(targets)
        self._training: KernelTraining | None = None
        self._first_step = 0

    def measure(self, view: ModelView) -> Mapping[str, Tensor]:
        """The error's projections now, and as predicted."""
        outputs = self.outputs(view).double()
        assert self.targets is not None
        targets = self.targets.reshape(outputs.shape).double()
        if self._training is None:
            kernel = ntk(view.model, self.examples(view), output="trace", readout=self.readout, dtype=torch.float64)
            self._training = KernelTraining(kernel, targets, outputs, rate=view.lr * self.scale, is_discrete=True)
            self._first_step = view.step
        training, num_steps = self._training, view.step - self._first_step
        start, predicted = training.mode_errors(0), training.mode_errors(num_steps)
        now = training.eigenvectors.T @ (outputs - targets)
        sizes = [one.norm(dim=1).flip(0)[:NUM_MODES] for one in (now, predicted, start)]
        return {
            "modes/error": sizes[0] / sizes[2],
            "modes/predicted": sizes[1] / sizes[2],
            "modes/loss": now.square().sum() / (2 * len(targets)),
            "modes/loss_predicted": predicted.square().sum() / (2 * len(targets)),
        }
