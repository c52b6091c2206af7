"""Bigram-Backcopy sequences: the rule to the letter, and the oracle against counts."""

import itertools

import pytest
import torch
from torch import Tensor

from dynascope.data.bigram_backcopy import (
    Bigram,
    BigramBackcopy,
    bigram_from_text,
    dirichlet_bigram,
    stationary_law,
)

TEXT = "to be or not to be that is the question"


def drawn(task: BigramBackcopy, count: int = 400, seed: int = 0) -> Tensor:
    return task.sample(count, torch.Generator().manual_seed(seed))


def test_bigram_of_a_text_by_hand() -> None:
    # "aab": a is followed by a once and by b once, b by nothing: there the marginal law (2/3, 1/3) stands in.
    bigram = bigram_from_text("aab")
    torch.testing.assert_close(bigram.transitions, torch.tensor([[1 / 2, 1 / 2], [2 / 3, 1 / 3]], dtype=torch.float64))
    torch.testing.assert_close(bigram.marginal, torch.tensor([2 / 3, 1 / 3], dtype=torch.float64))
    assert bigram.characters == ["a", "b"]


def test_stationary_law_is_kept() -> None:
    bigram = dirichlet_bigram(20, seed=3)
    torch.testing.assert_close(bigram.marginal @ bigram.transitions, bigram.marginal)
    torch.testing.assert_close(
        stationary_law(torch.tensor([[0.5, 0.5], [1.0, 0.0]])), bigram.marginal.new_tensor([2 / 3, 1 / 3])
    )


@pytest.mark.parametrize("n_bos", [0, 1, 2])
def test_every_trigger_is_followed_by_the_token_before_it(n_bos: int) -> None:
    task = BigramBackcopy(dirichlet_bigram(12), 3, 30, n_bos=n_bos)
    x = drawn(task)
    assert x.shape == (400, 31)
    is_trigger = task.trigger_mask(x)
    assert not is_trigger[:, : n_bos + 1].any()  # the first character is none
    assert torch.equal(x[:, 2:][is_trigger[:, 1:-1]], x[:, :-2][is_trigger[:, 1:-1]])
    assert (x[:, :n_bos] == task.bos).all()
    assert (x[:, n_bos:] != task.bos).all()


def test_triggers_are_the_most_frequent_tokens() -> None:
    bigram = bigram_from_text(TEXT)
    task = BigramBackcopy(TEXT, 2, 20)
    assert sorted(bigram.characters[token] for token in task.triggers) == [" ", "t"]


def test_two_triggers_in_a_row_alternate() -> None:
    # From c (no trigger) always to a, from a always to b; a and b are triggers. c a: copy c.
    bigram = Bigram(torch.tensor([[0.0, 1, 0], [1, 0, 0], [1, 0, 0]]), torch.tensor([0.4, 0.4, 0.2]))
    assert drawn(BigramBackcopy(bigram, 2, 6), 1)[0].tolist() == [3, 2, 0, 2, 0, 2, 0]
    # With the rule acting half of the time, a b comes about, and then b a b a while it acts.
    task = BigramBackcopy(bigram, 2, 40, mix_p=0.5)
    law = task.oracle(torch.tensor([[3, 2, 0, 1]]))
    torch.testing.assert_close(law[0, 2], torch.tensor([0.0, 0.5, 0.5, 0.0], dtype=torch.float64))
    torch.testing.assert_close(law[0, 3], torch.tensor([1.0, 0, 0, 0], dtype=torch.float64))


def test_no_triggers_give_the_plain_markov_chain() -> None:
    bigram = dirichlet_bigram(8)
    copying, markov = (
        drawn(task, 100) for task in (BigramBackcopy(bigram, 0, 20), BigramBackcopy(bigram, 0, 20, rule="markov"))
    )
    assert torch.equal(copying, markov)


TASKS = {
    "copy": BigramBackcopy(dirichlet_bigram(6), 2, 12),
    "two bos": BigramBackcopy(dirichlet_bigram(6), 2, 12, n_bos=2),
    "no bos": BigramBackcopy(dirichlet_bigram(6), 2, 12, n_bos=0),
    "mixed": BigramBackcopy(dirichlet_bigram(6), 2, 12, mix_p=0.6),
    "delimiter": BigramBackcopy(dirichlet_bigram(6), 2, 12, delimiter_p=0.2),
    "markov": BigramBackcopy(dirichlet_bigram(6), 2, 12, rule="markov"),
    "dormant": BigramBackcopy(dirichlet_bigram(6), 2, 12, rule="dormant"),
    "induction": BigramBackcopy(dirichlet_bigram(6), 2, 12, rule="induction"),
}


@pytest.mark.parametrize("name", TASKS)
def test_oracle_is_calibrated_against_what_is_drawn(name: str) -> None:
    task = TASKS[name]
    x = drawn(task, 6000)
    law, targets = task.oracle(x[:, :-1]), x[:, 1:]
    torch.testing.assert_close(law.sum(-1), torch.ones_like(law[..., 0]))
    told = law.gather(2, targets[..., None])[..., 0]
    assert (told > 0).all()
    # Mean log-likelihood of the draws equals minus the mean entropy, and expected counts equal those drawn.
    entropy = torch.special.entr(law).sum(-1)
    assert abs(float(-told.log().mean() - entropy.mean())) < 4 * float(told.log().std()) / len(told.flatten()) ** 0.5
    counts = torch.bincount(targets.flatten(), minlength=task.vocab_size)
    torch.testing.assert_close(law.sum((0, 1)), counts.double(), rtol=0.03, atol=120)


def test_delimiter_starts_the_sequence_anew() -> None:
    task = TASKS["delimiter"]
    x = drawn(task)
    after = x[:, 1:][x[:, :-1] == task.delimiter]
    assert len(after)
    assert not task.trigger_mask(after[None]).any()


def test_induction_repeats_the_first_follower() -> None:
    task = TASKS["induction"]
    for sequence in drawn(task, 50).tolist():
        followers: dict[int, int] = {}
        for token, follower in itertools.pairwise(sequence):
            if token in task.triggers.tolist():
                assert followers.setdefault(token, follower) == follower


def test_oracle_has_no_excess_risk_and_a_model_has_some() -> None:
    task = TASKS["copy"]
    x = drawn(task, 200)[:, :-1]
    perfect = task.risks(task.oracle(x).log().clamp(min=-1e4), x)
    assert float(perfect.markov_excess) == pytest.approx(0, abs=1e-9)
    assert float(perfect.copy) == pytest.approx(0, abs=1e-9)  # a copy has no entropy
    other = task.risks(torch.randn(*x.shape, task.vocab_size), x)
    assert float(other.markov_excess) > 0
    assert float(other.copy_excess) == float(other.copy) > 0


def test_risk_by_hand() -> None:
    # Two tokens that follow each other; <s> is followed by either. Uniform logits over three: log 3 everywhere.
    task = BigramBackcopy(torch.tensor([[0.0, 1], [1, 0]]), 0, 3)
    risks = task.risks(torch.zeros(1, 3, 3), torch.tensor([[2, 0, 1]]))
    assert float(risks.markov) == pytest.approx(1.0986, abs=1e-4)
    assert float(risks.markov_excess) == pytest.approx(1.0986 - 0.6931 / 3, abs=1e-4)  # only <s> has entropy, log 2
    assert torch.isnan(risks.copy)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rule": "swap"}, "rule is one of"),
        ({"mix_p": 1.5}, "probabilities"),
        ({"delimiter_p": 1.0}, "probabilities"),
        ({"n_bos": 3}, "n_bos=3"),
        ({"seq_len": 0}, "seq_len=0"),
        ({"k_triggers": 6}, "no token to begin with"),
    ],
)
def test_impossible_settings_are_told(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        BigramBackcopy(dirichlet_bigram(6), **settings)


def test_a_text_without_bigrams_is_told() -> None:
    with pytest.raises(ValueError, match="two different"):
        bigram_from_text("aaa")
