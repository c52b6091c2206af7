"""The tangent kernel over several processes: each computes its rows, and parameters that FSDP2 splits are gathered."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dynascope.kernels.empirical import ntk


def ntk_rows(model: nn.Module, x: Any, *, gather: bool = False, **settings: Any) -> Tensor:
    """This process's rows of Θ(x, x), by `torch.distributed`: examples are dealt out in consecutive, nearly equal parts.

    Every process is given the same model and all of `x`. With `gather` each returns the whole kernel, rows in the order
    of `x`; without it the kernel never has to fit one process. `settings` are those of `ntk`. The parameters of a model
    under `fully_shard` are whole during the call, and sharded again after it, with FSDP2's usual resharding.

    Raises ValueError where torch.distributed is not running, or there are fewer examples than processes.

    >>> rows = ntk_rows(model, images, output="trace")  # under torchrun: (len(images) / world size, len(images))
    """
    if not dist.is_initialized():
        raise ValueError(
            "torch.distributed is not running: start the script with torchrun and init_process_group, or use ntk"
        )
    rank, num_processes, count = dist.get_rank(), dist.get_world_size(), len(tree_leaves(x)[0])
    if count < num_processes:
        raise ValueError(f"{count} examples cannot be dealt out to {num_processes} processes")
    bounds = [count * process // num_processes for process in range(num_processes + 1)]
    with _whole(model):
        rows: Tensor = ntk(model, tree_map(lambda leaf: leaf[bounds[rank] : bounds[rank + 1]], x), x, **settings)
    if not gather:
        return rows
    # Collectives want equal shapes: the shorter parts are filled up, and cut again.
    longest = -(-count // num_processes)
    filled = rows.new_zeros(longest, *rows.shape[1:])
    filled[: len(rows)] = rows
    parts = [torch.empty_like(filled) for _ in range(num_processes)]
    dist.all_gather(parts, filled)
    whole: Tensor = torch.cat([part[: bounds[at + 1] - bounds[at]] for at, part in enumerate(parts)])
    return whole


@contextmanager
def _whole(model: nn.Module) -> Iterator[None]:
    """Parameters that FSDP2 has split are whole inside the block, also between the passes."""
    module = sys.modules.get("torch.distributed.fsdp")
    parts = [part for part in model.modules() if module is not None and isinstance(part, module.FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.set_reshard_after_backward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.set_reshard_after_backward(True, recurse=False)
            part.reshard()
