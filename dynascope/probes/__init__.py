"""What can be measured: one family a file, each a pure function with a small probe around it."""

from dynascope.probes.catalogue import available, choose_probes
from dynascope.probes.probe import Need, Probe

__all__ = ["Need", "Probe", "available", "choose_probes"]
