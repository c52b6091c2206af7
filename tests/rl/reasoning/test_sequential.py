"""Judging until enough is known: an interval that holds whenever one stops, by exact count of all orders."""

from collections.abc import Sequence

import pytest
import torch

from dynascope.rl.reasoning.judge_ensemble import JudgeEnsemble
from dynascope.rl.reasoning.judges import Solution
from dynascope.rl.reasoning.pass_at_k import cot_pass_at_k
from dynascope.rl.reasoning.sequential import count_bounds, judge_sequentially


def judge(solutions: Sequence[Solution]) -> list[bool]:
    return [one.reasoning.startswith("right") for one in solutions]


def chains(right: int, wrong: int, unanswered: int = 0) -> tuple[list[Solution], torch.Tensor]:
    """Distinct chains: right ones, wrong ones, and those of wrong answers."""
    names = [*("right" for _ in range(right)), *("wrong" for _ in range(wrong)), *("right" for _ in range(unanswered))]
    solutions = [Solution("?", f"{name} {place}") for place, name in enumerate(names)]
    return solutions, torch.arange(len(names)) < right + wrong


def test_bounds_by_hand() -> None:
    # One of two drawn and right: 0 of 2 is impossible, 1 and 2 were a third each and are now a third and two thirds.
    assert count_bounds(1, 1, 2) == (1, 2)
    # At 0.55 the bar is 1 / 0.45: three of three, each a fifth before, are 4/5 now, and 3 of 4 are 1/5: both stay.
    assert count_bounds(3, 3, 4, 0.55) == (3, 4)
    # Of ten thousand, 200 right in a row leave no room for one half.
    assert count_bounds(200, 200, 10_000)[0] > 9_000
    assert count_bounds(0, 0, 7) == (0, 7)
    assert count_bounds(7, 10, 10) == (7, 7)


@pytest.mark.parametrize("confidence", [0.6, 0.8, 0.95])
def test_the_interval_holds_at_all_times_at_once(confidence: float) -> None:
    """Exact: the chance over all orders that the true count is ever left out, by counting paths."""
    total = 24
    bounds = {
        (judged, right): count_bounds(right, judged, total, confidence)
        for judged in range(total + 1)
        for right in range(judged + 1)
    }
    worst = 0.0
    for count in range(total + 1):
        inside = {0: 1.0}  # chance of each number of right ones, never left out before
        for judged in range(total):
            after: dict[int, float] = {}
            for right, chance in inside.items():
                is_right = (count - right) / (total - judged)
                for drawn, share in ((right + 1, is_right), (right, 1 - is_right)):
                    low, high = bounds[judged + 1, min(drawn, judged + 1)]
                    if share > 0 and low <= count <= high:
                        after[drawn] = after.get(drawn, 0.0) + chance * share
            inside = after
        worst = max(worst, 1 - sum(inside.values()))
    assert 0 < worst <= 1 - confidence


def test_it_stops_when_the_share_is_known_well_enough() -> None:
    solutions, is_right = chains(1900, 100, 50)
    told = judge_sequentially(
        JudgeEnsemble(judge, n=1), solutions, is_right, width=0.1, generator=torch.Generator().manual_seed(0)
    )
    assert told.total == 2000
    assert told.judged < 500
    assert told.num_calls == told.judged
    assert told.low <= 1900 <= told.high
    assert told.high - told.low <= 200
    assert told.share.low <= 0.95 <= told.share.high
    low, high = cot_pass_at_k(2050, [told.low, told.high], 8)
    assert low <= cot_pass_at_k(2050, 1900, 8) <= high


def test_nothing_less_than_certainty_judges_them_all() -> None:
    solutions, is_right = chains(5, 3, 4)
    told = judge_sequentially(JudgeEnsemble(judge, n=1), solutions, is_right, width=0.0, batch_size=3)
    assert (told.low, told.high, told.judged, told.total) == (5, 5, 8, 8)
    assert told.share.value == 5 / 8


@pytest.mark.parametrize(("right", "is_above"), [(900, True), (100, False)])
def test_a_threshold_is_decided_sooner(right: int, is_above: bool) -> None:
    solutions, is_right = chains(right, 1000 - right)
    told = judge_sequentially(
        JudgeEnsemble(judge, n=1), solutions, is_right, threshold=0.5, generator=torch.Generator().manual_seed(1)
    )
    assert told.judged < 64
    assert (told.share.low > 0.5) == is_above
    assert (told.share.high < 0.5) == (not is_above)


def test_verdicts_are_kept_and_their_calls_counted() -> None:
    solutions, is_right = chains(20, 20)
    ensemble = JudgeEnsemble(judge, n=3)
    first = judge_sequentially(ensemble, solutions, is_right, width=0.0)
    assert first.num_calls == 2 * 40  # two equal verdicts settle a majority
    assert judge_sequentially(ensemble, solutions, is_right, width=0.0).num_calls == 0


def test_what_cannot_be_is_told_in_one_line() -> None:
    solutions, is_right = chains(1, 0)
    ensemble = JudgeEnsemble(judge, n=1)
    with pytest.raises(ValueError, match="each must be at most the next"):
        count_bounds(2, 1, 3)
    with pytest.raises(ValueError, match="between 0 and 1"):
        count_bounds(1, 1, 3, 1.0)
    with pytest.raises(ValueError, match="batch_size=0"):
        judge_sequentially(ensemble, solutions, is_right, batch_size=0)
    with pytest.raises(ValueError, match="of a share"):
        judge_sequentially(ensemble, solutions, is_right, threshold=50.0)
    nothing = judge_sequentially(ensemble, solutions, torch.tensor([False]))
    assert (nothing.low, nothing.high, nothing.judged) == (0, 0, 0)
    with pytest.raises(ValueError, match="no answer is right"):
        nothing.share  # noqa: B018
