"""Taking normalization layers out of a model, to see whether it trains without them."""

import math
import re

from torch import nn


class NoNorm(nn.Identity):
    """Stands where a normalization layer was and passes everything through."""

    # nn.TransformerEncoderLayer compares its two norms' eps before it takes its fused path, which wants real norms.
    # NaN equals nothing, so it goes the plain way.
    eps = math.nan


def remove_norms(model: nn.Module, *, exclude: str | None = None) -> nn.Module:
    """Replace every layer norm and RMS norm of `model` (PyTorch's own or a library's), in place, and return it.

    `exclude` is a regular expression searched in the module's name; what it matches stays. Raises ValueError when
    there is nothing to replace. Source: arXiv 2303.06296, Section 4 (training without LayerNorm).

    >>> model = sigma_reparam(remove_norms(model))
    """
    found = [
        (path, name, module)
        for path, parent in model.named_modules()
        for name, module in parent.named_children()
        if type(module).__name__.lower().endswith(("layernorm", "rmsnorm"))
    ]
    kept = [entry for entry in found if exclude is None or not re.search(exclude, f"{entry[0]}.{entry[1]}".lstrip("."))]
    if not kept:
        raise ValueError("the model has no layer norm or RMS norm to remove")
    for path, name, _ in kept:
        setattr(model.get_submodule(path), name, NoNorm())
    return model
