"""A prompt and all its completions in one pass (arXiv 2506.05433)."""

from dynascope.nn.shared_prefix.attention import Backend, grouped_attention
from dynascope.nn.shared_prefix.grouping import automatic_prefix_groups
from dynascope.nn.shared_prefix.layout import SharedPrefix
from dynascope.nn.shared_prefix.models import SharedPrefixMode, prefix_sharing, shared_prefix_forward
from dynascope.nn.shared_prefix.savings import Savings, estimate_savings
from dynascope.nn.shared_prefix.tree import PrefixTree

__all__ = [
    "Backend",
    "PrefixTree",
    "Savings",
    "SharedPrefix",
    "SharedPrefixMode",
    "automatic_prefix_groups",
    "estimate_savings",
    "grouped_attention",
    "prefix_sharing",
    "shared_prefix_forward",
]
