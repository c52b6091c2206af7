"""How far scores can be trusted."""

import numpy as np
import pytest

from dynascope.data import label_noise_report, near_duplicates, rank_average, reliability, runs_needed


def noisy_runs(num_runs: int, noise: float) -> np.ndarray:
    random = np.random.default_rng(0)
    truth = random.normal(size=400)
    return truth + noise * random.normal(size=(num_runs, 400))


def test_equal_runs_are_perfectly_reliable_and_unrelated_ones_not() -> None:
    assert reliability(np.tile(np.arange(9.0), (4, 1))) == pytest.approx(1.0)
    assert abs(reliability(np.random.default_rng(0).random((10, 500)))) < 0.1


def test_reliability_is_the_textbook_one() -> None:
    # Two halves of 5 runs with noise of variance 4 each: r = 1 / (1 + 4 / 5) = 0.556 for Pearson, a little less by ranks.
    assert reliability(noisy_runs(10, 2.0)) == pytest.approx(0.54, abs=0.06)


def test_runs_needed_follow_spearman_and_brown() -> None:
    # One run has r = 1 / (1 + 4) = 0.2, so 0.9 takes 0.9 * 0.8 / (0.2 * 0.1) = 36.
    assert runs_needed(noisy_runs(10, 2.0)) == pytest.approx(38, abs=6)
    assert runs_needed(np.tile(np.arange(9.0), (4, 1))) == 1
    assert runs_needed(np.stack([np.arange(9.0), -np.arange(9.0)])) is None


def test_one_run_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="at least two"):
        reliability(np.ones((1, 4)))


def test_known_noise_is_measured() -> None:
    scores, is_noisy = np.array([0.9, 0.1, 0.8, 0.2]), np.array([True, False, False, True])
    report = label_noise_report(scores, is_noisy, top=0.5)
    assert report.suspects == [0, 2]
    assert (report.precision, report.recall) == (0.5, 0.5)
    assert report.auroc == pytest.approx(3 / 4)  # of four pairs (noisy, clean) only (0.2, 0.8) is the wrong way round


def test_unknown_noise_has_suspects_only() -> None:
    report = label_noise_report(np.array([0.1, np.inf, 0.5]), top=0.3)
    assert report.suspects == [1]
    assert report.auroc is None
    with pytest.raises(ValueError, match="share"):
        label_noise_report(np.array([0.1]), top=0.0)


def test_near_duplicates_are_grouped_and_contradictions_told() -> None:
    features = np.array([[0.0, 0.0], [0.05, 0.0], [0.1, 0.0], [3.0, 3.0], [3.0, 3.0]])
    groups = near_duplicates(features, radius=0.06, labels=np.array([1, 1, 1, 0, 2]))
    assert groups == [([0, 1, 2], False), ([3, 4], True)]


def test_ranks_average_over_runs_of_any_scale() -> None:
    assert rank_average(np.array([[1.0, 2.0, 3.0], [10.0, 900.0, 30.0]])).tolist() == [0.0, 0.75, 0.75]
