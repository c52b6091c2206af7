"""How important an example is, from one look at a model early in training.

Source: arXiv 2107.07075, Section 2 (GraNd and EL2N).
"""

from functools import partial
from typing import Any, Literal

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dynascope.data.per_example import LossFunction, Method, per_example_gradient_norms


def el2n(logits: Float[Tensor, "examples classes"], labels: Int[Tensor, " examples"]) -> Float[Tensor, " examples"]:
    """‖softmax(logits) − one-hot label‖₂, from 0 (right and sure) to √2 (wrong and sure).

    >>> el2n(torch.zeros(1, 2), torch.tensor([0]))
    tensor([0.7071])
    """
    score: Tensor = _error(logits, labels).norm(dim=-1)
    return score


def l1_error(logits: Float[Tensor, "examples classes"], labels: Int[Tensor, " examples"]) -> Float[Tensor, " examples"]:
    """‖softmax(logits) − one-hot label‖₁, from 0 to 2.

    >>> l1_error(torch.zeros(1, 2), torch.tensor([0]))
    tensor([1.])
    """
    return _error(logits, labels).abs().sum(-1)


def margin(
    logits: Float[Tensor, "examples classes"], labels: Int[Tensor, " examples"], *, kind: Literal["max", "sum"] = "max"
) -> Float[Tensor, " examples"]:
    """Probability of the wrong classes less that of the right one, from −1 (right and sure) to 1.

    "max" takes the likeliest wrong class, "sum" all of them.

    >>> margin(torch.zeros(1, 2), torch.tensor([0]))
    tensor([0.])
    """
    probabilities = logits.float().softmax(-1)
    is_right = F.one_hot(labels, logits.shape[-1]).bool()
    right, wrong = probabilities[is_right], probabilities.masked_fill(is_right, 0.0)
    return (wrong.amax(-1) if kind == "max" else wrong.sum(-1)) - right


def grand(
    model: nn.Module, loss_fn: LossFunction, batch: tuple[Any, Any], *, method: Method = "ghost"
) -> Float[Tensor, " examples"]:
    """‖∇ loss‖₂ of each example over all parameters; the model is looked at in evaluation mode and left as it was.

    At initialisation it mostly tells the norm of the input (arXiv 2303.14753): use it some epochs later, averaged over
    several runs. `batch` is (inputs, targets); see `per_example_gradient_norms` for `loss_fn` and `method`.

    >>> grand(model, partial(F.cross_entropy, reduction="none"), (images, labels))
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return per_example_gradient_norms(model, loss_fn, *batch, method=method)
    finally:
        for module, mode in modes.items():
            module.training = mode


cross_entropy: LossFunction = partial(F.cross_entropy, reduction="none")
"""The usual loss, one an example."""


def _error(logits: Float[Tensor, "examples classes"], labels: Int[Tensor, " examples"]) -> Tensor:
    return logits.float().softmax(-1) - F.one_hot(labels, logits.shape[-1])
