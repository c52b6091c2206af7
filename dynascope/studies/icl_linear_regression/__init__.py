"""One layer of multi-head softmax attention learns to regress in context (arXiv 2503.12734)."""

from dynascope.studies.icl_linear_regression.study import study

__all__ = ["study"]
