"""Statistics that have to be those of all processes of a training run."""

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


def gathered(values: Shaped[Tensor, " local"]) -> Shaped[Tensor, " all"]:
    """The values of all processes of torch.distributed, which may hold unequal numbers of them, in the order of ranks.

    Where torch.distributed is not running, the values themselves.

    >>> scores = gathered(local_scores)
    """
    if not (dist.is_available() and dist.is_initialized()):
        return values
    count = torch.tensor([len(values)], device=values.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    sizes = torch.cat(counts).tolist()
    # Collectives want equal shapes: shorter ones are filled up, and cut again.
    filled = values.new_zeros(max(sizes))
    filled[: len(values)] = values
    parts = [torch.empty_like(filled) for _ in sizes]
    dist.all_gather(parts, filled)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
