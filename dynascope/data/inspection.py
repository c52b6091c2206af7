"""How far scores can be trusted, and what they say about the data: reliability, label noise, near-duplicates.

SciPy's statistics and scikit-learn are loaded where they are used: a training that only scores its examples need not
wait for them.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped


def reliability(scores: Float[np.ndarray, "runs examples"], *, num_splits: int = 20, seed: int = 0) -> float:
    """Split-half reliability: mean Spearman correlation between the mean scores of two halves of the runs.

    Raises ValueError for fewer than two runs.

    >>> reliability(np.tile(np.arange(5.0), (4, 1)))
    1.0
    """
    from scipy import stats

    if len(scores) < 2:
        raise ValueError("reliability compares runs with each other; score with at least two")
    random, half = np.random.default_rng(seed), len(scores) // 2
    found = []
    for _ in range(num_splits):
        order = random.permutation(len(scores))
        halves = scores[order[:half]].mean(0), scores[order[half : 2 * half]].mean(0)
        found.append(stats.spearmanr(*halves).statistic)
    return float(np.mean(found))


def runs_needed(scores: Float[np.ndarray, "runs examples"], *, target: float = 0.9) -> int | None:
    """How many runs the mean of which would reach this reliability, by Spearman and Brown's formula; None if never.

    >>> runs_needed(np.tile(np.arange(5.0), (4, 1)))
    1
    """
    half, measured = len(scores) // 2, reliability(scores)
    single = measured / (half - (half - 1) * measured)
    if single <= 0:
        return None
    return 1 if single >= target else int(np.ceil(round(target * (1 - single) / (single * (1 - target)), 9)))


@dataclass(frozen=True)
class NoiseReport:
    """What the highest scores say about wrong labels.

    `suspects` are positions, most suspicious first. The figures are None where the true noise is not known.
    """

    suspects: list[int]
    precision: float | None
    recall: float | None
    auroc: float | None


def label_noise_report(
    scores: Float[np.ndarray, " examples"], is_noisy: Bool[np.ndarray, " examples"] | None = None, *, top: float = 0.1
) -> NoiseReport:
    """The share `top` of examples with the highest scores as suspects of being mislabelled.

    With `is_noisy` (where the noise was put in, or checked by hand) also how many of them are (precision), how many of
    all noisy ones they hold (recall), and the area under the ROC curve over all thresholds.

    >>> label_noise_report(np.array([0.1, 0.9]), np.array([False, True]), top=0.5).precision
    1.0
    """
    from scipy import stats
    from sklearn.metrics import roc_auc_score

    if not 0 < top <= 1:
        raise ValueError(f"top={top} is a share of the examples, above 0 and at most 1")
    num_suspects = max(1, round(top * len(scores)))
    suspects = np.argsort(-np.asarray(scores), kind="stable")[:num_suspects]
    if is_noisy is None:
        return NoiseReport(suspects.tolist(), None, None, None)
    found = int(is_noisy[suspects].sum())
    # Never-learned examples score infinity, which the ROC curve takes by rank.
    auroc = roc_auc_score(is_noisy, stats.rankdata(scores)) if 0 < is_noisy.sum() < len(is_noisy) else np.nan
    return NoiseReport(suspects.tolist(), found / num_suspects, found / max(1, int(is_noisy.sum())), float(auroc))


def near_duplicates(
    features: Float[np.ndarray, "examples features"],
    *,
    radius: float,
    labels: Int[np.ndarray, " examples"] | None = None,
) -> list[tuple[list[int], bool]]:
    """Groups of examples closer than `radius` (Euclidean, chained), each with whether its labels contradict each other.

    Near-duplicates get equal low scores, so that pruning by score drops all of them together.

    >>> near_duplicates(np.array([[0.0], [0.01], [5.0]]), radius=0.1)
    [([0, 1], False)]
    """
    from scipy.sparse.csgraph import connected_components
    from sklearn.neighbors import radius_neighbors_graph

    graph = radius_neighbors_graph(np.asarray(features), radius, mode="connectivity", include_self=False)
    _, group_of = connected_components(graph, directed=False)
    order = np.argsort(group_of, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(group_of[order])) + 1)
    return [
        (group.tolist(), labels is not None and len(np.unique(np.asarray(labels)[group])) > 1)
        for group in groups
        if len(group) > 1
    ]


def rank_average(scores: Shaped[np.ndarray, "runs examples"]) -> Float[np.ndarray, " examples"]:
    """Mean rank over runs, from 0 to 1: for scores whose scale differs between runs.

    >>> rank_average(np.array([[1.0, 2.0], [10.0, 30.0]]))
    array([0., 1.])
    """
    from scipy import stats

    ranks = stats.rankdata(scores, axis=1) - 1
    return np.asarray(ranks.mean(0) / max(1, scores.shape[1] - 1))
