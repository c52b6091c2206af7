"""When a claim holds, does not, or stays open."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dynascope.studies import Claim, judge

CLAIM = Claim("C", "x is large.", "Section 1", None, "x", lambda runs: runs["x"], ">", 1.0)


def judged(samples: list[Any], claim: Claim = CLAIM) -> Any:
    """The judgement when one seed after the other measures these samples, whatever its records are."""
    remaining = iter(samples)
    return judge(replace(claim, measure=lambda runs: next(remaining)), [{} for _ in samples])


def test_holds_when_the_whole_interval_is_beyond_the_threshold() -> None:
    judgement = judged([2.0, 2.1, 1.9])
    assert judgement.holds is True
    # Student's t with 2 degrees of freedom: 4.3027 standard errors of 0.1 / sqrt(3)
    assert judgement.ci95 == pytest.approx((2 - 0.24841, 2 + 0.24841), abs=1e-4)


def test_does_not_hold_when_the_whole_interval_is_short_of_it() -> None:
    assert judged([0.2, 0.1, 0.15]).holds is False


def test_is_undecided_when_the_interval_has_the_threshold_inside() -> None:
    judgement = judged([0.5, 2.5, 1.0])
    assert judgement.holds is None
    assert "more seeds" in judgement.note


def test_one_sample_is_no_interval() -> None:
    judgement = judged([5.0])
    assert (judgement.measured, judgement.ci95, judgement.holds) == (5.0, None, None)


def test_equal_samples_decide() -> None:
    assert judged([2.0, 2.0]).holds is True


@pytest.mark.parametrize(("op", "holds"), [("<", False), ("<=", True), (">", False), (">=", True)])
def test_the_threshold_itself_satisfies_only_the_rules_that_say_so(op: Any, holds: bool) -> None:
    assert judged([1.0, 1.0], replace(CLAIM, op=op)).holds is holds


@pytest.mark.parametrize("nothing", [None, [], float("nan"), np.array([np.nan])])
def test_seeds_that_say_nothing_are_left_out(nothing: Any) -> None:
    assert judged([2.0, nothing, 2.1]).num_samples == 2


def test_what_is_no_number_is_left_out_and_told() -> None:
    judgement = judged([2.0, float("nan"), 2.1])
    assert judgement.holds is True
    assert judgement.note == "1 of 3 samples are no number"


def test_no_samples_at_all_is_undecided() -> None:
    judgement = judged([None, None])
    assert (judgement.measured, judgement.holds) == (None, None)
    assert judgement.note


def test_several_samples_a_seed_are_all_counted() -> None:
    assert judged([[2.0, 2.1], np.array([1.9])]).num_samples == 3


def test_infinite_samples_never_make_a_mean_claim_hold_by_accident() -> None:
    judgement = judged([np.inf, 2.0])
    assert judgement.holds is None


def test_share_uses_wilsons_interval() -> None:
    claim = replace(CLAIM, statistic="share", threshold=0.5)
    judgement = judged([True] * 9 + [False], claim)
    assert judgement.measured == pytest.approx(0.9)
    # Wilson, 9 of 10 at z = 1.96: (0.9 + 0.19207 ± 0.24854) / 1.38416
    assert judgement.ci95 == pytest.approx((0.5958, 0.9821), abs=1e-3)
    assert judgement.holds is True


def test_all_of_three_true_is_too_few_for_more_than_half() -> None:
    assert judged([True, True, True], replace(CLAIM, statistic="share", threshold=0.5)).holds is None


def test_two_samples_are_too_few_for_a_share() -> None:
    judgement = judged([False, False], replace(CLAIM, statistic="share", threshold=0.9))
    assert (judgement.measured, judgement.holds) == (0.0, None)
    assert "too little" in judgement.note


def test_missing_arm_makes_the_claim_undecided_and_names_it() -> None:
    judgement = judge(replace(CLAIM, measure=lambda runs: runs["pruned"]), [{}, {}])
    assert judgement.holds is None
    assert "pruned" in judgement.note


def test_rule_is_told_from_what_is_computed() -> None:
    assert CLAIM.rule == "mean x > 1, whole 95 % interval over seeds"
    assert replace(CLAIM, statistic="share").rule.startswith("share of x > 1")
