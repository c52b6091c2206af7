"""Attention scans, then snaps: one layer trained by SGD, its two learning rates, and real text (arXiv 2305.16380)."""

from dynascope.studies.scan_and_snap.claims import study

__all__ = ["study"]
