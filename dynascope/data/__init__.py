"""Parts: scoring, selecting and sampling examples; real data that every machine has."""

from dynascope.data.bigram_backcopy import BigramBackcopy, bigram_from_text, dirichlet_bigram
from dynascope.data.histories import ForgettingTracker, cartography, stacked_visits
from dynascope.data.inspection import (
    NoiseReport,
    label_noise_report,
    near_duplicates,
    rank_average,
    reliability,
    runs_needed,
)
from dynascope.data.landscape import error_barrier, instability, linear_path
from dynascope.data.per_example import per_example_gradient_norms
from dynascope.data.permutations import PermutationTask
from dynascope.data.scores import el2n, grand, l1_error, margin, over_tokens, unclog
from dynascope.data.scoring import score_examples, with_ids
from dynascope.data.selection import PrunedSampler, class_shares, select
from dynascope.data.sequence_classes import SequenceClassData
from dynascope.data.teachers import quadratic_teacher
from dynascope.data.text import python_sources, read_text, word_ids
from dynascope.data.token_stats import TokenStats, token_stats

__all__ = [
    "BigramBackcopy",
    "ForgettingTracker",
    "NoiseReport",
    "PermutationTask",
    "PrunedSampler",
    "SequenceClassData",
    "TokenStats",
    "bigram_from_text",
    "cartography",
    "class_shares",
    "dirichlet_bigram",
    "el2n",
    "error_barrier",
    "grand",
    "instability",
    "l1_error",
    "label_noise_report",
    "linear_path",
    "margin",
    "near_duplicates",
    "over_tokens",
    "per_example_gradient_norms",
    "python_sources",
    "quadratic_teacher",
    "rank_average",
    "read_text",
    "reliability",
    "runs_needed",
    "score_examples",
    "select",
    "stacked_visits",
    "token_stats",
    "unclog",
    "with_ids",
    "word_ids",
]
