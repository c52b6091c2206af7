"""The dial between lazy and rich training: a factor on a model's output, with the learning rate that compensates for it."""

import copy
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


class OutputScale(nn.Module):
    """α · f(x), or α · (f(x) − f₀(x)) with `center=True`: large α trains lazily, small α learns features (2310.06110).

    The function class does not change, only how far the weights must travel. Give the optimizer the parameters through
    `lazy_param_groups`, so that function space is crossed at one speed for every α. With `center` a frozen copy of the
    model at its start is kept (in the state dict too) and subtracted, so that training begins at zero.

    Raises ValueError for an α that is not above 0.

    >>> model = OutputScale(model, alpha=0.1)
    """

    def __init__(self, module: nn.Module, alpha: float, *, center: bool = False) -> None:
        if alpha <= 0:
            raise ValueError(f"alpha={alpha} must be above 0")
        super().__init__()
        self.module, self.alpha = module, alpha
        self.start = copy.deepcopy(module).requires_grad_(False) if center else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.module(*args, **kwargs)
        if self.start is None:
            return tree_map(self._scaled, output)
        with torch.no_grad():
            start = self.start.eval()(*args, **kwargs)
        return tree_map(lambda now, first: self._scaled(now, first), output, start)

    def _scaled(self, now: Any, first: Any = None) -> Any:
        if not isinstance(now, Tensor) or not now.is_floating_point():
            return now
        return self.alpha * (now if first is None else now - first)


def lazy_param_groups(
    model: nn.Module | Iterable[nn.Parameter], lr: float, alpha: float, optimizer: Literal["sgd", "adam"] = "sgd"
) -> list[dict[str, Any]]:
    """Parameters with the learning rate that keeps a scaled model's speed in function space.

    The tangent kernel grows as α², so plain gradient descent wants lr/α²; Adam's steps know no scale of the gradient, so
    it wants lr/α. Raises ValueError for an α that is not above 0.

    >>> torch.optim.SGD(lazy_param_groups(model, lr=1.0, alpha=4.0))
    """
    if alpha <= 0:
        raise ValueError(f"alpha={alpha} must be above 0")
    if optimizer not in ("sgd", "adam"):
        raise ValueError(f"optimizer is sgd or adam, not {optimizer!r}")
    parameters = model.parameters() if isinstance(model, nn.Module) else model
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return [{"params": trained, "lr": lr / alpha ** (2 if optimizer == "sgd" else 1)}]
