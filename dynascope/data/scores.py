"""How important an example is, from one look at a model early in training.

Source: arXiv 2107.07075, Section 2 (GraNd and EL2N).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import grad, jvp

from dynascope.data.evaluation import evaluating
from dynascope.data.per_example import LossFunction, Method, per_example_gradient_norms
from dynascope.kernels.layerwise import functional, logits_of


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
    with evaluating(model):
        return per_example_gradient_norms(model, loss_fn, *batch, method=method)


def unclog(model: nn.Module, inputs: Any, reference: Any, *, method: Method = "ghost") -> Float[Tensor, " examples"]:
    """‖∇ Σ_k f_k(x) − its mean over reference examples‖₂: how unlike the others an example pulls at the logits.

    `inputs` and `reference` are what the model is called with, examples along the first axis; take as many reference
    examples of each class. No labels are needed. The model is looked at in evaluation mode and left as it was.

    No gradient of a single example is formed: ‖g − ḡ‖² = ‖g‖² − 2⟨g, ḡ⟩ + ‖ḡ‖² takes the norms of `per_example.py`,
    one backward pass for ḡ and one forward-mode pass along it. Source: the authors' code beside 2107.07075.

    >>> unclog(model, images, images[balanced])
    """

    def summed(output: Any, _: Any) -> Tensor:
        return logits_of(output).sum(-1)

    parameters = {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}
    function = functional(model, dict(model.named_parameters()))

    def pull(values: Mapping[str, Tensor], of: Any) -> Tensor:
        return summed(function(values, of), None)

    with evaluating(model):
        norms = per_example_gradient_norms(model, summed, inputs, inputs, method=method)
        mean = grad(lambda values: pull(values, reference).mean())(parameters)
        along = jvp(lambda values: pull(values, inputs), (parameters,), (mean,))[1]
    square = norms.square() - 2 * along + torch.stack([one.square().sum() for one in mean.values()]).sum()
    distance: Tensor = square.clamp_min(0).sqrt()
    return distance


def over_tokens(
    score: Callable[[Tensor, Tensor], Tensor],
    logits: Float[Tensor, "examples tokens classes"],
    labels: Int[Tensor, "examples tokens"],
    *,
    ignore_index: int = -100,
) -> Float[Tensor, " examples"]:
    """The mean over each sequence's tokens of a score such as `el2n`: how important a text is to a language model.

    Each label stands where it is predicted, and is `ignore_index` where nothing is to be; a sequence of only such scores
    NaN.

    >>> over_tokens(el2n, torch.zeros(1, 3, 2), torch.tensor([[0, 1, -100]]))
    tensor([0.7071])
    """
    is_told = labels != ignore_index
    values = score(logits.flatten(0, 1), labels.where(is_told, 0).flatten()).view_as(is_told)
    return (values * is_told).sum(1) / is_told.sum(1)


def cross_entropy(output: Any, labels: Tensor) -> Float[Tensor, " examples"]:
    """The usual loss, one an example; of sequences, the mean over their tokens.

    >>> cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
    tensor([0.6931])
    """
    return by_example(partial(F.cross_entropy, reduction="none"), logits_of(output), labels)


def by_example(score: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor) -> Float[Tensor, " examples"]:
    """A score of each example; where the logits are of sequences, the mean over their tokens.

    >>> by_example(el2n, torch.zeros(1, 2), torch.tensor([0]))
    tensor([0.7071])
    """
    return over_tokens(score, logits, labels) if logits.ndim == 3 else score(logits, labels)


def _error(logits: Float[Tensor, "examples classes"], labels: Int[Tensor, " examples"]) -> Tensor:
    return logits.float().softmax(-1) - F.one_hot(labels, logits.shape[-1])
