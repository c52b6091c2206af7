"""From the device to the record without waiting: measurements leave when their copies have arrived."""

from collections import deque
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dynascope.record import RecordWriter

Measured = Tensor | np.ndarray | np.generic | float | list[float]


class Outbox:
    """Takes measurements as tensors and hands them to the record as arrays, in order, never stopping the device.

    Tensors on the CPU are written at once. Tensors on an accelerator are copied to pinned memory behind the running
    work; each later call writes those copies that have arrived, and `close` waits for the rest.
    """

    def __init__(self, writer: RecordWriter) -> None:
        self._writer = writer
        self._on_the_way: deque[tuple[int, dict[str, Measured], torch.cuda.Event | None]] = deque()

    def put(self, step: int, values: Mapping[str, Measured]) -> None:
        """Record `values` at `step` as soon as they are here."""
        if not values:
            return
        arrived: torch.cuda.Event | None = None
        here: dict[str, Measured] = {}
        for name, value in values.items():
            if isinstance(value, Tensor) and value.is_cuda:
                here[name] = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
                arrived = arrived or torch.cuda.Event()
            else:
                here[name] = value
        if arrived is not None:
            arrived.record()
        self._on_the_way.append((step, here, arrived))
        self._write_arrived()

    def _write_arrived(self) -> None:
        while self._on_the_way:
            step, values, arrived = self._on_the_way[0]
            if arrived is not None and not arrived.query():
                return
            self._on_the_way.popleft()
            self._writer.add(step, {name: _as_array(value) for name, value in values.items()})

    def close(self) -> None:
        """Wait for what is still on its way and write it."""
        for _, _, arrived in self._on_the_way:
            if arrived is not None:
                arrived.synchronize()
        self._write_arrived()


def _as_array(value: Measured) -> np.ndarray | np.generic | float | list[float]:
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    return (value.float() if value.is_floating_point() and value.dtype != torch.float64 else value).cpu().numpy()
