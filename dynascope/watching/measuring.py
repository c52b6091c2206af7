"""A probe on a model that is not being trained: a checkpoint, or somebody else's model."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import xarray as xr
from torch import Tensor, nn

from dynascope.probes.probe import Need, Probe
from dynascope.probes.views import AttentionCall, ModuleOutput
from dynascope.watching.shadow import tap

PLACES = frozenset({Need.MODULES, Need.ACTIVATIONS, Need.BLOCKS, Need.ATTENTION})


def measure(model: nn.Module, probe: Probe, batches: Iterable[Tensor | Mapping[str, Any]]) -> dict[str, xr.DataArray]:
    """The series of a probe of places, averaged over batches by their rows; nothing is kept from batch to batch but sums.

    A batch is what the model is called with: a tensor, or a mapping of keyword arguments. The model is in evaluation mode
    meanwhile and left as it was. Values that are NaN take no part.

    Raises ValueError for a probe that needs more than a forward pass, or no batches.

    >>> measure(model, ExtremeTokens(model), loader)["extreme/sink_score"]  # (layer, head), layers by name
    """
    if not probe.needs <= PLACES:
        raise ValueError(f"probe {probe.name!r} needs {', '.join(sorted(probe.needs - PLACES))}; use it under a watch")
    sums: dict[str, dict[str, tuple[Tensor, Tensor]]] = {series.name: {} for series in probe.series}
    number = 0
    for batch in batches:
        kwargs = dict(batch) if isinstance(batch, Mapping) else {}
        args = () if isinstance(batch, Mapping) else (batch,)
        rows = next(one.shape[0] for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
        number += 1

        def observe(need: Need, view: ModuleOutput | AttentionCall, rows: int = rows) -> None:
            for name, value in probe.measure(view).items():
                known = torch.isfinite(value)
                total, weight = sums[name].get(view.name, (torch.zeros_like(value), torch.zeros_like(value)))
                sums[name][view.name] = total + rows * value.nan_to_num(0.0) * known, weight + rows * known

        tap(model, args, kwargs, probe.needs, observe)
    if not number:
        raise ValueError("there are no batches to measure")
    return {
        series.name: xr.DataArray(
            torch.stack([total / weight for total, weight in places.values()]).cpu().numpy(),
            dims=series.dims,
            coords={series.dims[0]: list(places), **series.coords},
            name=series.name,
            attrs={"unit": series.unit, "description": series.description},
        )
        for series in probe.series
        if (places := sums[series.name])
    }
