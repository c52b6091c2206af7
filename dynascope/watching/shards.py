"""Reading parameters that FSDP2 or tensor parallelism has split over processes."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor. Without the distributed package there are none, and it is not imported to ask."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, detached."""
    tensor = tensor.detach()
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on every process: a collective if it is sharded."""
    tensor = tensor.detach()
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def summing_over_shards(parameters: Mapping[str, Tensor]) -> Callable[[Sequence[str], Tensor], Tensor]:
    """A function that adds up what each process contributes for each named parameter.

    A parameter that several processes hold alike is counted once: its contributions are divided by their number.
    """
    sharded = {name: tensor for name, tensor in parameters.items() if is_sharded(tensor)}
    if not sharded:
        return lambda names, contributions: contributions
    mesh: Any = next(iter(sharded.values())).device_mesh  # type: ignore[attr-defined]
    processes = int(mesh.size())
    copies = {name: processes // _parts(tensor) for name, tensor in parameters.items()}

    def total(names: Sequence[str], contributions: Tensor) -> Tensor:
        weights = torch.tensor([1.0 / copies.get(name, 1) for name in names], device=contributions.device)
        summed = contributions * weights
        for dimension in range(mesh.ndim):
            torch.distributed.all_reduce(summed, group=mesh.get_group(dimension))
        return summed

    return total


def _parts(tensor: Tensor) -> int:
    """Over how many processes a tensor is split."""
    if not is_sharded(tensor):
        return 1
    parts = 1
    placements, mesh = tensor.placements, tensor.device_mesh  # type: ignore[attr-defined]
    for dimension, placement in enumerate(placements):
        parts *= mesh.size(dimension) if placement.is_shard() else 1
    return parts
