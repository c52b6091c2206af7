"""Queries of the right difficulty: how much groups of answers teach, and a sampler that follows it."""

import pytest
import torch

from dynascope.rl.tasks.curriculum import QueryDifficultySelector, in_band, learnable_share, levels_of, recommend_level


def test_learnable_share_by_hand_and_by_drawing() -> None:
    rates = torch.tensor([0.01, 0.05, 0.2, 0.5])
    assert learnable_share(rates, 8).tolist() == pytest.approx([0.0773, 0.3366, 0.8322, 0.9922], abs=1e-4)
    torch.testing.assert_close(learnable_share(rates, 8), learnable_share(1 - rates, 8))
    assert learnable_share(torch.tensor([0.0, 1.0]), 8).tolist() == [0.0, 0.0]
    counts = (torch.rand(50_000, 8) < 0.2).sum(1)
    assert float(((counts > 0) & (counts < 8)).float().mean()) == pytest.approx(0.8322, abs=0.01)


def test_the_level_that_teaches_most() -> None:
    levels = {"easy": torch.tensor([0.95, 1.0]), "medium": torch.tensor([0.4, 0.6]), "hard": torch.tensor([0.0, 0.02])}
    best, shares = recommend_level(levels)
    assert best == "medium"
    assert shares["medium"] > shares["easy"] > shares["hard"]
    assert recommend_level({"a": torch.tensor([0.8]), "b": torch.tensor([0.2])})[0] == "b"  # as learnable, and harder
    with pytest.raises(ValueError, match="no level holds"):
        recommend_level({"a": torch.tensor([0.0]), "b": torch.tensor([1.0])})
    with pytest.raises(ValueError, match="every level needs"):
        recommend_level({"a": torch.zeros(0)})
    assert list(levels_of(["x", "y", "x"], torch.tensor([0.1, 0.5, 0.3]))) == ["x", "y"]


def test_the_band_includes_its_ends() -> None:
    assert in_band(torch.tensor([0.0, 0.125, 0.5, 0.875, 1.0])).tolist() == [False, True, True, True, False]
    with pytest.raises(ValueError, match="lower end first"):
        in_band(torch.tensor([0.5]), 0.8, 0.2)


def test_it_draws_each_query_of_the_band_once_a_pass_in_another_order() -> None:
    selector = QueryDifficultySelector(torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0] * 8), explore=0.0, seed=1)
    first, second = list(selector), list(selector)
    assert sorted(first) == sorted(second) == selector.indices()
    assert len(selector) == 24
    assert first != second


def test_it_follows_rollouts() -> None:
    selector = QueryDifficultySelector(torch.tensor([0.0, 0.5]), memory=0.5)
    assert selector.indices() == [1]
    selector.update([0, 1], torch.tensor([[True, False], [True, True]]))
    assert selector.pass_rate.tolist() == [0.25, 0.75]
    assert selector.indices() == [0, 1]
    for _ in range(4):
        selector.update([1], torch.tensor([[True, True]]))
    assert selector.indices() == [0]
    static = QueryDifficultySelector(torch.tensor([0.0, 0.5]), memory=1.0)
    static.update([0], torch.tensor([[True, False]]))
    assert static.indices() == [1]
    assert selector.learnable(8) == pytest.approx(float(learnable_share(0.25, 8)))


def test_with_nothing_in_the_band_the_nearest_are_drawn() -> None:
    assert QueryDifficultySelector(torch.tensor([0.0, 0.05, 1.0]), low=0.2, high=0.8).indices() == [1]
    assert QueryDifficultySelector(torch.tensor([1.0, 1.0])).indices() == [0, 1]


def test_put_back_it_draws_the_same() -> None:
    selector = QueryDifficultySelector.of_answers(torch.rand(30, 8) < 0.5)
    list(selector)
    other = QueryDifficultySelector(torch.full((30,), 0.5))
    other.load_state_dict(selector.state_dict())
    assert [list(selector) for _ in range(3)] == [list(other) for _ in range(3)]


@pytest.mark.parametrize("wrong", [{"pass_rate": torch.tensor([1.5])}, {"pass_rate": torch.zeros(0)}])
def test_rates_that_are_none_are_refused(wrong: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        QueryDifficultySelector(**wrong)
    with pytest.raises(ValueError, match="memory=2"):
        QueryDifficultySelector(torch.tensor([0.5]), memory=2.0)


def test_shares_of_what_is_no_rate_are_refused() -> None:
    for rate, num in ((1.5, 8), (float("nan"), 8), (0.5, 0)):
        with pytest.raises(ValueError, match="must lie between 0 and 1, and num_samples"):
            learnable_share(rate, num)


def test_it_selects_from_a_dataset_of_hugging_face() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"prompt": ["a", "b", "c"]})
    selector = QueryDifficultySelector(torch.tensor([0.0, 0.5, 0.4]))
    assert rows.select(selector.indices())["prompt"][:] == ["b", "c"]


def test_what_fell_out_of_the_band_is_asked_now_and_then_and_comes_back() -> None:
    selector = QueryDifficultySelector(torch.cat([torch.full((20,), 0.5), torch.zeros(5)]), memory=0.0, explore=0.1)
    passes = [list(selector) for _ in range(20)]
    assert all(len(one) == len(selector) == 22 and set(range(20)) <= set(one) for one in passes)
    assert {query for one in passes for query in one} == set(range(25))
    asked = next(query for query in passes[-1] if query >= 20)
    selector.update([asked], torch.tensor([[True, False]]))
    assert asked in selector.indices()


@pytest.mark.parametrize(
    ("queries", "correct", "message"),
    [([0], torch.zeros(1, 0).bool(), "an answer at least"), ([2], torch.ones(1, 1).bool(), "not among the 2")],
)
def test_answers_to_nothing_are_refused(queries: list[int], correct: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QueryDifficultySelector(torch.tensor([0.5, 0.5])).update(queries, correct)
