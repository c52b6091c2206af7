"""Detectors: from a record to findings."""

from dynascope.findings.catalogue import all_detectors, detect
from dynascope.findings.detector import Detector, Follower

__all__ = ["Detector", "Follower", "all_detectors", "detect"]
