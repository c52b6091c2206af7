"""Mamba's gate and in-context learning from poisoned prompts (arXiv 2510.00399)."""

from dynascope.studies.mamba_icl_outliers.experiment import study

__all__ = ["study"]
