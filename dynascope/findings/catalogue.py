"""Every detector of the library, and all of them over one record."""

from collections.abc import Sequence

from dynascope.findings.detector import Detector, Follower
from dynascope.record import Finding, Record


def all_detectors() -> Sequence[Detector]:
    """A fresh set of every detector."""
    return ()


def detect(record: Record) -> list[Finding]:
    """What all detectors conclude from a record.

    >>> [finding.message for finding in detect(dynascope.open("runs/mine"))]
    """
    return Follower(record, all_detectors).new_findings()
