"""How many outliers are too many: closed forms, and curves of models that are known."""

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from dynascope.data.in_context.outliers import OutlierICL
from dynascope.nn.gated_linear_attention import GatedLinearAttentionICL
from dynascope.theory.outlier_tolerance import (
    ToleranceCurve,
    majority_vote,
    max_outlier_fraction,
    outlier_tolerance_curve,
    placement_accuracy,
    prompt_errors,
    theory_conditions,
)


def test_the_vote_by_hand() -> None:
    # Four examples, two of them flipped outliers: lost if more outliers than clean ones have the query's pattern.
    wrong = sum(clean < bad for clean, bad in ((a + b, c + d) for a, b, c, d in product((0, 1), repeat=4))) / 16
    tied = sum(clean == bad for clean, bad in ((a + b, c + d) for a, b, c, d in product((0, 1), repeat=4))) / 16
    vote = majority_vote(4, 0.5)
    assert vote.error == pytest.approx(wrong)
    assert vote.ties == pytest.approx(tied)
    assert majority_vote(20, 0.4).error == pytest.approx(0.1315880, abs=1e-6)  # P(Binomial(20, 1/2) < 8)
    assert majority_vote(4, 0.5, "target").error == pytest.approx(wrong / 2)
    assert majority_vote(0, 0.3).ties == pytest.approx(1.0)


def test_with_both_patterns_the_vote_is_lost_exactly_beyond_a_half() -> None:
    assert majority_vote(20, 0.45, attends="task").error == 0.0
    assert majority_vote(20, 0.55, attends="task").error == 1.0
    assert majority_vote(20, 0.5, attends="task").ties == 1.0
    # Binomial numbers of outliers: P(more than 10 of 20), each with probability 0.4.
    assert majority_vote(20, 0.4, attends="task", is_exact=False).error == pytest.approx(0.1275212, abs=1e-6)


@pytest.mark.parametrize("rule", ["flip", "target", "random"])
@pytest.mark.parametrize("is_exact", [True, False])
def test_the_vote_is_what_ideal_attention_does(rule: str, is_exact: bool) -> None:
    task = OutlierICL(K=0.0)
    generator = torch.Generator().manual_seed(0)
    batch = task.test_batch(0.6, rule, count=40_000, is_exact=is_exact, generator=generator)  # type: ignore[arg-type]
    is_same = batch.patterns[:, :-1] == batch.patterns[:, -1:]
    own = (is_same * batch.prompts[:, :-1, -1]).sum(1)
    both = own - (~is_same * batch.prompts[:, :-1, -1]).sum(1)
    for predicted, attends in ((own, "pattern"), (both, "task")):
        error, ties = prompt_errors(predicted, batch.labels).tolist()
        vote = majority_vote(20, 0.6, rule, attends=attends, is_exact=is_exact)  # type: ignore[arg-type]
        assert error == pytest.approx(vote.error, abs=0.01)
        assert ties == pytest.approx(vote.ties, abs=0.01)


def test_the_layers_attention_at_the_start_is_the_vote() -> None:
    # At the start attention is the product of inputs: 0 for the other pattern, whatever the trigger.
    task = OutlierICL(K=0.0)
    curve = outlier_tolerance_curve(
        GatedLinearAttentionICL(30, gated=False),
        (0.4,),
        task=task,
        count=20_000,
        generator=torch.Generator().manual_seed(0),
    )
    # A sum of equal votes comes out of rounding as a little above or below the tie.
    vote = majority_vote(20, 0.4)
    assert vote.error - 0.01 < float(curve.errors["flip"][0]) < vote.error + vote.ties + 0.01


def test_ties_are_right_and_nan_is_wrong() -> None:
    labels = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    predicted = torch.tensor([1.0, 1.0, 0.0, math.nan, math.inf])
    assert prompt_errors(predicted, labels).tolist() == pytest.approx([0.4, 0.2])


def test_a_model_that_diverged_is_wrong_everywhere() -> None:
    def diverged(prompts: Tensor) -> Tensor:
        return torch.full((len(prompts),), math.nan)

    curve = outlier_tolerance_curve(diverged, (0.0, 0.5), ("flip",), task=OutlierICL(), count=10)
    assert curve.errors["flip"].tolist() == [1.0, 1.0]
    assert math.isnan(max_outlier_fraction(curve)["flip"])


def test_curves_and_places_of_a_model_that_reads_the_last_example() -> None:
    def nearest(prompts: Tensor) -> Tensor:
        is_same = torch.einsum("bd,bd->b", prompts[:, -2, :-1], prompts[:, -1, :-1]) > 4.0
        return prompts[:, -2, -1] * (2.0 * is_same - 1)

    task = OutlierICL()
    rules = {"mine": lambda labels, generator: -labels, "none": lambda labels, generator: labels}
    curve = outlier_tolerance_curve(nearest, (0.0, 0.5, 1.0), rules, task=task, count=1000)
    assert curve.errors["mine"].tolist() == pytest.approx([0.0, 0.5, 1.0], abs=0.05)
    assert curve.errors["none"].tolist() == [0.0] * 3
    places = placement_accuracy(nearest, 0.3, task=task, count=1000)
    assert float(places["FQ"]) == 1.0
    assert float(places["CQ"]) == 0.0
    assert float(places["R"]) == pytest.approx(0.7, abs=0.05)


def test_the_largest_fraction_is_where_errors_were_small_all_the_way() -> None:
    errors = {
        "late": torch.tensor([0.0, 0.05, 0.3]),
        "never": torch.tensor([0.0, 0.1, 0.1]),
        "dip": torch.tensor([0.0, 0.3, 0.0]),
    }
    found = max_outlier_fraction(ToleranceCurve((0.2, 0.4, 0.6), errors, {}))
    assert found == pytest.approx({"late": 0.4, "never": 0.6, "dip": 0.2})


def test_conditions_by_hand() -> None:
    told = theory_conditions()
    assert told["gated/steps"] == pytest.approx(6 / (0.1 * 0.4 * 9))
    assert told["gated/steps"] == pytest.approx(20 * told["linear/steps"])
    assert told["gated/largest_alpha"] == pytest.approx(0.6)
    assert told["linear/batch"] == pytest.approx(100 * math.log(10))
    assert theory_conditions(alpha=0.3)["linear/shortest_test"] == pytest.approx(math.log(6) * 0.3 / 0.04)
    assert told["linear/generalizes"] is False
    assert told["gated/generalizes"] is False  # alpha must stay below the share in training
    assert theory_conditions(alpha=0.55)["gated/generalizes"] is True
    assert theory_conditions(alpha=0.3)["linear/generalizes"] is True
    assert theory_conditions(alpha=0.3, length_test=10)["linear/generalizes"] is False
    assert theory_conditions(kappa_a=0.01)["gated/is_kappa_a_in_range"] is False
    assert theory_conditions(kappa_a=0.01)["linear/is_kappa_a_in_range"] is True
    assert theory_conditions(length_train=500, length_test=500)["gated/is_length_in_range"] is False
    assert theory_conditions(length_train=500, length_test=500)["linear/is_length_in_range"] is True
    assert theory_conditions(p_a=0.0)["gated/largest_alpha"] == 0.0


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: majority_vote(20, 0.4, "swap"), "flip, target or random"),
        (lambda: majority_vote(20, 1.4), "alpha=1.4"),
        (lambda: theory_conditions(p_a=1.0), "p_a=1.0"),
    ],
)
def test_impossible_requests_are_told(call: Callable[[], object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()
