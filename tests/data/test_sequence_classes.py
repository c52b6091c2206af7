"""Sequences of common and distinct tokens, and the counts that tell which are which."""

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch.utils.data import DataLoader

from dynascope.data import SequenceClassData, python_sources, token_stats, word_ids


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_layout_and_probabilities_of_the_papers_task() -> None:
    data = SequenceClassData(num_last=2, num_next_per_last=2, num_common_per_last=5)
    # 10 common, 2 · 5 common of a query, 4 · 10 distinct, 2 queries, 4 next tokens.
    assert data.vocab == 10 + 10 + 40 + 2 + 4
    population = data.population()
    assert population.queries.tolist() == [60, 60, 61, 61]
    assert population.targets.tolist() == [62, 63, 64, 65]
    torch.testing.assert_close(population.probs.sum(1), torch.ones(4).double())
    # Weights: 15 commons of 1 and 5.5 of distinct tokens, of which the rarest has 0.1.
    assert float(population.probs[2, 0]) == pytest.approx(1 / 20.5)
    assert float(population.probs[2, 15]) == pytest.approx(1 / 20.5)
    assert float(population.probs[2, 10]) == 0.0
    assert float(population.probs[2, 40]) == pytest.approx(0.1 / 20.5)
    assert float(population.probs[2, 49]) == pytest.approx(1 / 20.5)
    assert data.is_common.sum() == 20
    assert data.is_distinct.sum() == 40
    assert [one.target for one in data.classes] == [62, 63, 64, 65]


def test_common_mass_of_the_papers_task_by_hand() -> None:
    probs = SequenceClassData(1, 2).population().probs
    assert float(probs[0, :10].sum()) == pytest.approx(10 / 15.5)
    assert float(torch.special.entr(probs[0]).sum()) == pytest.approx(2.8993, abs=1e-4)


def test_samples_follow_their_classes() -> None:
    data = SequenceClassData(3, 2, length=40)
    tokens, targets = data.sample(4000, generator())
    population = data.population()
    chosen = targets - population.targets[0]
    assert torch.equal(tokens[:, -1], population.queries[chosen])
    assert bool((population.probs[chosen].gather(1, tokens[:, :-1]) > 0).all())
    for place in range(6):
        here = torch.bincount(tokens[chosen == place][:, :-1].flatten(), minlength=data.vocab).double()
        expected = population.probs[place] * here.sum()
        seen = expected > 0
        # Pearson's statistic of 20 cells has mean 19 and standard deviation 6.2.
        assert float(((here - expected)[seen].square() / expected[seen]).sum()) < 19 + 5 * 6.2
    assert torch.bincount(chosen, minlength=6).min() > 500


def test_counts_are_those_of_the_same_sequences() -> None:
    data = SequenceClassData(2, 2, length=30)
    tokens, targets = data.sample(50, generator(3))
    counts, query, following = data.sample_counts(50, generator(3))
    assert torch.equal(targets, following)
    assert torch.equal(query, tokens[:, -1])
    assert torch.equal(counts[7].long(), torch.bincount(tokens[7, :-1], minlength=data.vocab))


def test_batches_come_without_end_and_every_worker_draws_its_own() -> None:
    data = SequenceClassData(1, 1, length=8, batch_size=4, seed=5)
    first, second = (torch.stack([batch[0] for batch, _ in zip(data, range(3), strict=False)]) for _ in range(2))
    assert torch.equal(first, second)
    loader = iter(DataLoader(data, batch_size=None, num_workers=2))
    assert not torch.equal(next(loader)[0], next(loader)[0])


@pytest.mark.parametrize("query", ["last", "none"])
def test_statistics_by_hand(query: str) -> None:
    tokens, targets = torch.tensor([[0, 0, 1, 3], [0, 2, 2, 3]]), torch.tensor([4, 5])
    stats = token_stats([(tokens, targets)], 6, query=query, fewest=1)  # type: ignore[arg-type]
    seen = stats.co_occurrence(torch.tensor([0, 0, 1, 2, 2, 3]), torch.tensor([4, 5, 4, 5, 4, 4]))
    assert seen.tolist() == [2, 1, 1, 2, 0, 0 if query == "last" else 1]
    # Token 0 goes with both next tokens 2 : 1, of which each has half of the pairs: H(2/3) / H(1/2).
    assert float(stats.commonness[0]) == pytest.approx(0.9183, abs=1e-4)
    assert stats.commonness[1:3].tolist() == [0.0, 0.0]
    assert stats.commonness[3].isnan().item() is (query == "last")
    assert stats.is_common[:3].tolist() == [True, False, False]
    assert stats.is_distinct[:3].tolist() == [False, True, True]


def test_the_tasks_own_split_is_found() -> None:
    data = SequenceClassData(3, 2)
    batches = (data.sample(128, generator(seed)) for seed in range(10))
    stats = token_stats(batches, data.vocab)
    context = data.vocab - 3 - 6
    assert torch.equal(stats.is_common[:context], data.is_common[:context])
    assert torch.equal(stats.is_distinct[:context], data.is_distinct[:context])


def test_a_text_is_read_window_by_window(monkeypatch: pytest.MonkeyPatch) -> None:
    text = torch.randint(7, (200,), generator=generator())
    whole = token_stats(text, 7, window=5)
    expected = torch.zeros(7, 7, dtype=torch.long)
    for end in range(5, 200):
        for place in range(end - 5, end - 1):
            expected[text[place], text[end]] += 1
    context, following = torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij")
    assert torch.equal(whole.co_occurrence(context, following), expected)
    # The package hands on the function of this name, which hides its module.
    monkeypatch.setattr(import_module("dynascope.data.token_stats"), "PAIRS_AT_ONCE", 33)
    assert torch.equal(token_stats(text, 7, window=5).counts, whole.counts)


def test_words_are_numbered_by_frequency() -> None:
    ids, names = word_ids(torch.tensor(list(b"To be, or not to be."), dtype=torch.uint8), vocab=4)
    assert names == ["", "to", "be", ","]
    assert ids.tolist() == [1, 2, 3, 0, 0, 1, 2, 0]
    assert word_ids(python_sources(5000), 100)[0].max() <= 99


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: SequenceClassData(0), "start at 1"),
        (lambda: SequenceClassData(num_common=-1), "start at 1"),
        (lambda: SequenceClassData(length=1), "at least one context token"),
        (lambda: token_stats(torch.arange(9), 5, window=3), "do not fit"),
        (lambda: token_stats(torch.arange(3), 5, window=8), "no context"),
        (lambda: token_stats(torch.arange(9), 9, window=1), "no context"),
        (lambda: token_stats([], 9), "no context"),
        (lambda: word_ids(torch.zeros(3, dtype=torch.uint8), 1), "at least 2"),
    ],
)
def test_impossible_requests_are_told(call: Callable[[], object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()
