"""Preference training: healthy and merely noisy runs are silent, responses that go together are told."""

import numpy as np
import pytest
import trl

from dynascope.findings.preference import CHOSEN, RATIO, REJECTED, SynchronizedLogps


def course(
    chosen: float, rejected: float, *, noise: float = 2.0, own: float = 0.5, num_looks: int = 80
) -> dict[str, np.ndarray]:
    """Both drift by so many nats over the run; `noise` is shared (easy and hard batches), `own` is each side's."""
    random = np.random.default_rng(3)
    shared, progress = noise * random.standard_normal(num_looks), np.linspace(0, 1, num_looks)
    sides = {CHOSEN: (-60, chosen), REJECTED: (-65, rejected)}
    return {
        name: start + drift * progress + shared + own * random.standard_normal(num_looks)
        for name, (start, drift) in sides.items()
    }


@pytest.mark.parametrize(
    "values",
    [
        course(8, -30),  # what is wanted
        course(0, 0),  # nothing happens
        course(0.5, -40),  # the chosen one stays
        course(-30, -30),  # both fall, and the margin with them stays: no preference is learnt
        course(-30, -10),  # a margin that shrinks is another illness
        course(-4, -9, noise=6.0),  # within the noise of batches
    ],
    ids=["healthy", "still", "chosen-stays", "no-margin", "shrinking", "noise"],
)
def test_silent(told, values: dict[str, np.ndarray]) -> None:  # type: ignore[no-untyped-def]
    assert told(SynchronizedLogps, values) == []


def test_noise_alone_is_silent_over_long_runs(told) -> None:  # type: ignore[no-untyped-def]
    assert told(SynchronizedLogps, course(0, 0, num_looks=400)) == []


def test_both_falling_is_told_with_its_numbers(told) -> None:  # type: ignore[no-untyped-def]
    (finding,) = told(SynchronizedLogps, course(-60, -90))
    assert finding.id == "synchronized-fall"
    assert 10 < finding.step < 45  # long before the end
    assert finding.evidence["rejected"] < finding.evidence["chosen"] < 0 < finding.evidence["margin"]
    assert "good answers get rarer" in finding.message
    exec(finding.remedy, scope := {})
    assert issubclass(scope["DPOTrainer"], trl.DPOTrainer)


def test_both_rising_is_told(told) -> None:  # type: ignore[no-untyped-def]
    (finding,) = told(SynchronizedLogps, course(90, 60))
    assert finding.id == "synchronized-rise"
    assert "bad answers" in finding.message
    exec(finding.remedy, scope := {})
    assert issubclass(scope["DPOTrainer"], trl.DPOTrainer)


def test_the_norms_of_the_gradients_are_told_where_they_were_measured(told) -> None:  # type: ignore[no-untyped-def]
    (finding,) = told(SynchronizedLogps, {**course(-60, -90), RATIO: np.full(80, 1.7)})
    assert finding.evidence["norm_ratio"] == pytest.approx(1.7)
    assert "1.7 times as long" in finding.message


def test_what_is_no_number_is_passed_over(told) -> None:  # type: ignore[no-untyped-def]
    values = course(-60, -90)
    values[CHOSEN][20:23] = np.nan
    assert [finding.id for finding in told(SynchronizedLogps, values)] == ["synchronized-fall"]


def test_memory_is_bounded_where_one_side_is_logged_more_often(told) -> None:  # type: ignore[no-untyped-def]
    values = course(8, -30, num_looks=200)
    values[REJECTED] = values[REJECTED][::4]
    assert told(SynchronizedLogps, values, {REJECTED: 4}) == []
