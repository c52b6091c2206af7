"""From what probes measured to labelled series: stacking places, learning coordinates, declaring once."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dynascope.probes.probe import Probe
from dynascope.record import RecordWriter, Series


class Collector:
    """Declares each series at its first measurement and keeps every later one in the same shape.

    A probe of places gives one tensor a place; they are stacked along the series' first dim in the order in which the
    model visited them the first time. A place that is missing later is NaN; one that was not there the first time is
    left out, since the shape of a series does not change.
    """

    def __init__(self, writer: RecordWriter, prefix: str = "") -> None:
        self._writer = writer
        self._prefix = prefix
        self._labels: dict[str, dict[str, list[str]]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def named(self, series: Series) -> str:
        """The series' name in this record."""
        return self._prefix + series.name

    def whole(
        self, probe: Probe, measured: Mapping[str, Tensor], coords: Mapping[str, Sequence[str]]
    ) -> dict[str, Tensor]:
        """Measurements that are complete as they are, with labels for the dims that have some."""
        collected = {}
        for series in probe.series:
            if series.name in measured:
                labels = {dim: list(coords[dim]) for dim in series.dims if dim in coords}
                self._declare(series, labels)
                collected[self.named(series)] = measured[series.name]
        return collected

    def places(self, probe: Probe, measured: Sequence[tuple[str, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
        """Measurements of single places, stacked along each series' first dim."""
        collected = {}
        for series in probe.series:
            by_place = {place: values[series.name] for place, values in measured if series.name in values}
            if not by_place:
                continue
            known = self._labels.get(series.name)
            labels = known[series.dims[0]] if known else list(by_place)
            if known is None:
                self._declare(series, {series.dims[0]: labels})
            collected[self.named(series)] = self._stack(series, [by_place.get(label) for label in labels])
        return collected

    def _stack(self, series: Series, values: Sequence[Tensor | None]) -> Tensor:
        given = [value for value in values if value is not None]
        if series.name not in self._shapes:
            shape = [max(sizes) for sizes in zip(*(value.shape for value in given), strict=True)]
            self._shapes[series.name] = tuple(shape)
        shape = list(self._shapes[series.name])
        like = given[0] if given else torch.zeros(())
        stacked = like.new_full((len(values), *shape), float("nan"), dtype=torch.float32)
        for row, value in zip(stacked, values, strict=True):
            if value is not None:
                inside: Any = tuple(slice(min(n, limit)) for n, limit in zip(value.shape, shape, strict=True))
                row[inside] = value[inside]
        return stacked

    def _declare(self, series: Series, labels: dict[str, list[str]]) -> None:
        if series.name in self._labels:
            return
        self._labels[series.name] = labels
        self._writer.declare(replace(series, name=self.named(series), coords={**series.coords, **labels}))
