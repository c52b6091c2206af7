"""Strata of difficulty, and where questions moved."""

import math

import pytest
import torch

from dynascope.rl.tasks.difficulty import (
    DifficultyProbe,
    DifficultyProfile,
    chance_of_all_wrong,
    classify_difficulty,
    mean_by_stratum,
    transition_matrix,
)


def test_every_accuracy_of_eight_answers_has_the_papers_stratum() -> None:
    assert classify_difficulty(torch.arange(9) / 8).tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3]


def test_a_question_that_was_solved_once_is_not_among_the_hardest() -> None:
    assert classify_difficulty(torch.tensor([0.0, 1 / 64, 1 / 16, 2 / 8, 3 / 8])).tolist() == [0, 1, 1, 1, 2]


def test_edges_of_ones_own_count_as_reached_in_any_precision() -> None:
    assert classify_difficulty(torch.tensor([0.0, 0.1, 0.3, 0.3001]), edges=(0.1, 0.3)).tolist() == [0, 1, 2, 2]
    for edges in ((0.5, 0.25), (-0.1, 0.5), (0.5, 1.5)):
        with pytest.raises(ValueError, match="must rise"):
            classify_difficulty(torch.tensor([0.5]), edges)
    for accuracy in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            classify_difficulty(torch.tensor([accuracy]))


def test_transitions_count_every_question_once() -> None:
    before, after = torch.tensor([0, 0, 0, 2, 3]), torch.tensor([0, 3, 3, 1, 3])
    matrix = transition_matrix(before, after)
    assert matrix.sum() == 5
    assert matrix[0].tolist() == [1, 0, 0, 2]
    assert (matrix[2, 1], matrix[3, 3]) == (1, 1)


def test_an_empty_stratum_has_no_mean() -> None:
    means = mean_by_stratum(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 0, 3]))
    assert means[[0, 3]].tolist() == [1.5, 6.0]
    assert bool(means[1:3].isnan().all())


def test_how_often_an_unlucky_question_looks_hardest() -> None:
    assert float(chance_of_all_wrong(0.2, 8)) == pytest.approx(0.168, abs=5e-4)
    drawn = torch.rand(20_000, 8) < 0.2
    assert float((drawn.sum(1) == 0).float().mean()) == pytest.approx(0.168, abs=0.01)


def test_the_probe_follows_questions_by_where_they_began() -> None:
    ids = ["a", "b", "c"]
    start = DifficultyProfile.of(ids, torch.tensor([[0, 0], [0, 0], [1, 1]]).bool(), torch.full((3, 2), 10.0))
    probe = DifficultyProbe(start)
    order = ["c", "a", "b"]
    now = DifficultyProfile.of(
        order, torch.tensor([[1, 0], [1, 1], [0, 0]]).bool(), torch.tensor([[8.0, 8], [20, 22], [9, 9]])
    )
    told = probe.compare(now)
    assert told["difficulty/questions"].tolist() == [2, 0, 0, 1]
    assert told["difficulty/accuracy"][[0, 3]].tolist() == [0.5, 0.5]
    assert told["difficulty/length"][[0, 3]].tolist() == [15.0, 8.0]
    assert told["difficulty/transitions"][0].tolist() == [0.5, 0, 0, 0.5]
    assert told["difficulty/transitions"][3].tolist() == [0, 0, 1, 0]
    with pytest.raises(ValueError, match="'d' among them"):
        probe.compare(DifficultyProfile.of(["d"], torch.tensor([[True, True]])))
    with pytest.raises(ValueError, match="one row"):
        DifficultyProfile.of(["a", "a"], torch.ones(2, 2).bool())
