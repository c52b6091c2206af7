"""Memory of the process and of its accelerator."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dynascope.probes.probe import Need, Probe
from dynascope.probes.views import StepView
from dynascope.record import Series


def resident_bytes() -> int:
    """Memory of this process that is in RAM now, in bytes; its peak where the system tells only that (macOS)."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        import os

        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Memory(Probe):
    """Resident memory, and on an accelerator the peak of allocated memory since the run began."""

    name = "memory"
    needs = frozenset({Need.PARAMETERS})
    series = (
        Series("memory/resident", unit="bytes", description="Memory of the process in RAM."),
        Series("memory/device", unit="bytes", description="Peak of memory allocated on the accelerator."),
    )

    def measure(self, view: StepView) -> Mapping[str, Tensor]:
        """Both figures; the second only where the parameters live on an accelerator."""
        measured = {"memory/resident": torch.tensor(resident_bytes(), dtype=torch.float64)}
        device = next((parameter.device for parameter in view.parameters.values()), None)
        if device is not None and device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
            measured["memory/device"] = torch.tensor(peak, dtype=torch.float64)
        return measured
