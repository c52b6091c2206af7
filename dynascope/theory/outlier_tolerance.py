"""How many outliers a prompt may hold: the theory's conditions, the ideal vote, and curves of trained models (2510.00399)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dynascope.data.in_context.outliers import Cover, OutlierICL, OutlierPrompts, Placement, Rule

Predictor = Callable[[Tensor], Tensor]
"""From prompts (batch, tokens, width) to numbers (batch,) whose sign is the predicted label."""


def theory_conditions(
    *,
    num_relevant: int = 6,
    num_triggers: int = 3,
    beta: float = 3.0,
    kappa_a: float = 2.0,
    p_a: float = 0.6,
    alpha: float = 0.6,
    length_train: int = 20,
    length_test: int = 20,
    batch: int = 256,
    lr: float = 0.1,
    eps: float = 0.1,
) -> dict[str, bool | float]:
    """What the paper's theorems ask for and promise, up to constants: booleans for conditions, numbers for scales.

    Constants and polynomial factors are set to 1, so a scale says how things grow, and no more. "gated/…" is of Mamba,
    "linear/…" of the linear transformer: the batch that suffices, whether the trigger's size and the length of training
    prompts are in range, steps until the error is eps, the largest share of outliers in tests, and the shortest test
    prompt. Source: 2510.00399, Theorems 1 to 3 and their remarks.

    Raises ValueError for shares of outliers outside [0, 1) in training or [0, 1] in tests.

    >>> theory_conditions(p_a=0.6, length_train=20, length_test=30)["gated/largest_alpha"]
    0.4
    """
    if not 0 <= p_a < 1 or not 0 <= alpha <= 1:
        raise ValueError(f"p_a={p_a} must lie in [0, 1) and alpha={alpha} in [0, 1]")
    clean, sure, many = 1 - p_a, math.log(1 / eps), math.log(num_relevant)
    linear_batch = max(eps**-2, num_relevant / clean) * sure
    gated_batch = max(linear_batch, num_triggers**2 * kappa_a**-2 * beta**-4 * clean**-2 * sure)
    most_kappa = num_triggers * beta * clean / (p_a * eps) if p_a else math.inf
    most_length = num_relevant**kappa_a / p_a if p_a else math.inf
    steps = num_relevant / (lr * clean * beta**2)
    gated_alpha = min(1.0, p_a * length_train / length_test)
    shortest = many / (1 - alpha) if alpha < 1 else math.inf
    linear_shortest = many * max(1 / (1 - alpha), alpha / (0.5 - alpha) ** 2) if alpha < 0.5 else math.inf
    return {
        "gated/batch": gated_batch,
        "gated/is_batch_enough": batch >= gated_batch,
        "gated/is_kappa_a_in_range": num_triggers * beta**-4 <= kappa_a <= most_kappa,
        "gated/is_length_in_range": many / clean <= length_train <= most_length,
        "gated/steps": steps,
        "gated/largest_alpha": gated_alpha,
        "gated/shortest_test": shortest,
        "gated/generalizes": alpha < gated_alpha and length_test >= shortest,
        "linear/batch": linear_batch,
        "linear/is_batch_enough": batch >= linear_batch,
        "linear/is_kappa_a_in_range": kappa_a <= most_kappa,
        "linear/is_length_in_range": length_train >= many / clean,
        "linear/steps": steps / length_train,
        "linear/largest_alpha": 0.5,
        "linear/shortest_test": linear_shortest,
        "linear/generalizes": alpha < 0.5 and length_test >= linear_shortest,
    }


@dataclass(frozen=True)
class Vote:
    """How often a majority vote is wrong, and how often it is a tie, which is counted as right."""

    error: float
    ties: float


def majority_vote(
    length: int,
    alpha: float,
    rule: str = "flip",
    *,
    attends: Literal["pattern", "task"] = "pattern",
    is_exact: bool = True,
) -> Vote:
    """Linear attention that is ideal: each example that it attends to has one vote, whether outlier or not.

    "pattern": it attends to examples with the query's pattern, a half of all, as in the paper's proofs. "task": also, with the
    opposite sign, to those with the task's other pattern, which trained models do. round(alpha · length) examples are outliers,
    or each with probability alpha (`is_exact=False`). Under flip the vote of the pattern is lost when Binomial(length, 1/2) is
    below the number of outliers: half of the time from alpha = 1/2 on, and almost surely beyond it. Under target that is so
    for one of the two labels; under random an outlier votes ±1. Source: 2510.00399, Theorem 2 (alpha < 1/2).

    Raises ValueError for another rule, and for impossible shares and lengths.

    >>> majority_vote(20, 0.4).error  # P(Binomial(20, 1/2) < 8)
    0.1316
    """
    if rule not in ("flip", "target", "random"):
        raise ValueError(f"rule is flip, target or random, not {rule!r}")
    if not 0 <= alpha <= 1 or length < 0:
        raise ValueError(f"alpha={alpha} must lie between 0 and 1 and length={length} not below 0")
    heard = 0.5 if attends == "pattern" else 1.0
    # Chances of the votes -1, 0 and 1; an outlier's by the query's label where that makes a difference.
    clean, lost, coin = (
        np.array(one) for one in ([0, 1 - heard, heard], [heard, 1 - heard, 0], [heard / 2, 1 - heard, heard / 2])
    )
    outlier = {"flip": [lost], "random": [coin], "target": [clean, lost] if attends == "pattern" else [coin]}[rule]
    outcomes = []
    for votes in outlier:
        if is_exact:
            num = round(alpha * length)
            each = [clean] * (length - num) + [votes] * num
        else:
            each = [(1 - alpha) * clean + alpha * votes] * length
        chances = reduce(np.convolve, each, np.ones(1))
        outcomes.append((chances[:length].sum(), chances[length]))
    error, ties = np.mean(outcomes, axis=0)
    return Vote(float(error), float(ties))


def prompt_errors(predicted: Float[Tensor, " batch"], labels: Float[Tensor, " batch"]) -> Float[Tensor, "2"]:
    """Shares of wrong signs and of ties: 0 counts as right, as in the paper; NaN, of a model that diverged, as wrong.

    >>> prompt_errors(torch.tensor([2.0, -1.0, 0.0, float("nan")]), torch.ones(4))
    tensor([0.5000, 0.2500])
    """
    margins = predicted * labels
    return torch.stack([(~(margins >= 0)).float().mean(), (margins == 0).float().mean()])


@dataclass(frozen=True)
class ToleranceCurve:
    """Test errors by label rule and share of outliers."""

    alphas: tuple[float, ...]
    errors: Mapping[str, Float[Tensor, " alphas"]]
    ties: Mapping[str, Float[Tensor, " alphas"]]


@torch.no_grad()
def outlier_tolerance_curve(
    model: Predictor,
    alphas: Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8),
    rules: Mapping[str, Rule] | Sequence[str] = ("flip", "target", "random"),
    *,
    task: OutlierICL,
    cover: Cover = "all",
    count: int = 4000,
    generator: torch.Generator | None = None,
) -> ToleranceCurve:
    """Test errors of anything that predicts from prompts, with outliers at random places.

    Raises ValueError for an unknown rule.

    >>> outlier_tolerance_curve(model, (0.2, 0.6), task=OutlierICL()).errors["flip"]
    """
    named: Mapping[str, Rule] = rules if isinstance(rules, Mapping) else {rule: rule for rule in rules}  # type: ignore[misc]
    errors, ties = {}, {}
    for name, rule in named.items():
        measured = [
            _error(model, task.test_batch(alpha, rule, cover=cover, count=count, generator=generator))
            for alpha in alphas
        ]
        errors[name], ties[name] = torch.stack(measured, dim=1)
    return ToleranceCurve(tuple(alphas), errors, ties)


def max_outlier_fraction(curve: ToleranceCurve, err: float = 0.1) -> dict[str, float]:
    """Of each rule the largest share of outliers up to which every error of the curve is at most `err`; NaN if none is.

    >>> max_outlier_fraction(ToleranceCurve((0.2, 0.4), {"flip": torch.tensor([0.0, 0.3])}, {}))
    {'flip': 0.2}
    """
    order = np.argsort(curve.alphas)
    found = {}
    for rule, errors in curve.errors.items():
        is_fine = np.asarray(errors.cpu() <= err)[order]
        num_fine = len(is_fine) if is_fine.all() else int(is_fine.argmin())
        found[rule] = float(curve.alphas[order[num_fine - 1]]) if num_fine else math.nan
    return found


@torch.no_grad()
def placement_accuracy(
    model: Predictor,
    alpha: float = 0.5,
    rule: Rule = "flip",
    *,
    task: OutlierICL,
    count: int = 4000,
    generator: torch.Generator | None = None,
) -> dict[Placement, Float[Tensor, ""]]:
    """Accuracy with outliers farthest from the query, at random, and closest to it. Source: 2510.00399, Table 1.

    >>> placement_accuracy(model, task=OutlierICL())["CQ"]
    """
    placements: tuple[Placement, ...] = ("FQ", "R", "CQ")
    batches = {place: task.test_batch(alpha, rule, place, count=count, generator=generator) for place in placements}
    return {place: 1 - _error(model, batch)[0] for place, batch in batches.items()}


def _error(model: Predictor, batch: OutlierPrompts) -> Tensor:
    return prompt_errors(model(batch.prompts), batch.labels)
