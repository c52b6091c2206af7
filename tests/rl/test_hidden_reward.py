"""Token hidden reward: by hand, against the double sum and autograd, and what it leaves alone."""

import pytest
import torch
from hidden_world import VOCABULARY, WIDTH, World
from torch import Tensor

from dynascope.kernels.layerwise import Outer
from dynascope.kernels.products import inner_products
from dynascope.rl import hidden_reward
from dynascope.rl.hidden_reward import gwhes, nthr_reweight, thr_reweight, token_hidden_reward


def double_sum(world: World, vocabulary: str = "full") -> Tensor:
    """The definition: over all pairs of tokens, by the library's products of a layer's gradients."""
    probs = (world.hidden @ world.unembedding.T).softmax(-1)
    error = torch.nn.functional.one_hot(world.tokens, VOCABULARY) - probs
    influence = torch.zeros(world.mask.shape, dtype=torch.float64)
    for row, column in world.mask.nonzero().tolist():
        group = world.group_ids == world.group_ids[row]
        anchors = (group & world.correct)[:, None] & world.mask
        others, own = error[anchors], error[row, column].expand(int(anchors.sum()), -1)
        if vocabulary == "group":
            kept = world.tokens[group[:, None] & world.mask].unique()
            others, own = others[:, kept], own[:, kept]
        hidden = world.hidden[row, column].expand(len(own), -1)
        one, two = Outer(hidden[:, None], own[:, None]), Outer(world.hidden[anchors][:, None], others[:, None])
        influence[row, column] = inner_products([one], [two], torch.Size([own.shape[1], WIDTH])).sum()
    return influence


@pytest.mark.parametrize("vocabulary", ["full", "group"])
def test_matrix_form_is_the_double_sum(vocabulary: str) -> None:
    world = World()
    expected = double_sum(world, vocabulary)
    for chunk in (1, 3, 1000):
        found = world.measure(vocabulary=vocabulary, chunk=chunk).influence
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    logits = world.hidden @ world.unembedding.T
    given = world.measure(vocabulary=vocabulary, unembedding=None, logits=logits).influence
    torch.testing.assert_close(given, expected, atol=1e-10, rtol=0)


def test_groups_one_by_one_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = World().measure().influence
    monkeypatch.setattr(hidden_reward, "MAX_ANCHOR_NUMBERS", 1)
    torch.testing.assert_close(World().measure().influence, expected)


def test_weighed_by_advantages_it_is_the_product_of_gradients_at_the_unembedding() -> None:
    world, advantage = World(), World().advantage
    weight = world.unembedding.clone().requires_grad_()
    log_probs = (world.hidden @ weight.T).log_softmax(-1).gather(-1, world.tokens[..., None])[..., 0] * world.mask
    told = world.measure(advantage=advantage, weighting="advantage")
    for group in (5, 2):
        rows = world.group_ids == group
        ours = (advantage[:, None] * log_probs)[rows].sum()
        right = log_probs[rows & world.correct].sum()
        gradients = [torch.autograd.grad(one, weight, retain_graph=True)[0] for one in (ours, right)]
        torch.testing.assert_close(told.thr[rows].sum(), (gradients[0] * gradients[1]).sum())


def test_a_small_step_on_the_unembedding_does_what_is_told() -> None:
    world = World()
    rows = world.group_ids == 5
    weight = world.unembedding.clone().requires_grad_()

    def log_probs(w: Tensor) -> Tensor:
        scores = (world.hidden @ w.T).log_softmax(-1).gather(-1, world.tokens[..., None])[..., 0]
        return scores * world.mask * rows[:, None]

    advantage = world.advantage * rows
    (gradient,) = torch.autograd.grad((advantage[:, None] * log_probs(weight)).sum(), weight)
    lr = 1e-4
    with torch.no_grad():
        change = (log_probs(weight + lr * gradient) - log_probs(weight))[world.correct].sum()
    predicted = lr * world.measure(advantage=advantage, weighting="advantage").thr[rows].sum()
    assert float(change) == pytest.approx(float(predicted), rel=0.02)


@pytest.mark.parametrize(("wrong", "influence", "expected"), [(1, -0.5, 0.5), (0, 0.5, -0.5)])
def test_by_hand(wrong: int, influence: float, expected: float) -> None:
    """Two tokens, even odds: a wrong answer of its own, and one that shares the right answer's token."""
    told = token_hidden_reward(
        torch.ones(2, 1, 1),
        torch.tensor([[0], [wrong]]),
        torch.ones(2, 1).bool(),
        torch.tensor([True, False]),
        unembedding=torch.zeros(2, 1),
    )
    torch.testing.assert_close(told.influence, torch.tensor([[0.5], [influence]]))
    torch.testing.assert_close(told.thr, torch.tensor([[0.5], [expected]]))
    torch.testing.assert_close(told.tau, torch.tensor([0.5, 0.5]))


def test_influence_over_right_tokens_is_a_square() -> None:
    world = World()
    influence = world.measure().influence
    for group in (5, 2, 9):
        rows = (world.group_ids == group) & world.correct
        error = torch.nn.functional.one_hot(world.tokens, VOCABULARY) - (world.hidden @ world.unembedding.T).softmax(-1)
        counted = rows[:, None] & world.mask
        square = (error[counted].T @ world.hidden[counted]).square().sum()
        torch.testing.assert_close(influence[rows].sum(), square)
        assert float(world.measure().anchors[rows].max()) >= 0


def test_order_padding_and_scale() -> None:
    world, told = World(), World().measure()
    order = torch.randperm(9)
    shuffled = token_hidden_reward(
        world.hidden[order], world.tokens[order], world.mask[order], world.correct[order], world.group_ids[order],
        unembedding=world.unembedding,
    )  # fmt: skip
    torch.testing.assert_close(shuffled.thr, told.thr[order])
    padded = token_hidden_reward(
        torch.nn.functional.pad(world.hidden, (0, 0, 0, 3), value=torch.nan),
        torch.nn.functional.pad(world.tokens, (0, 3)),
        torch.nn.functional.pad(world.mask, (0, 3)),
        world.correct,
        world.group_ids,
        unembedding=world.unembedding,
    )
    torch.testing.assert_close(padded.thr[:, :5], told.thr)
    assert padded.thr[:, 5:].abs().max() == 0
    # Hidden states times 3, with the same distribution.
    logits, scaled = world.hidden @ world.unembedding.T, World()
    scaled.hidden = 3 * world.hidden
    other = scaled.measure(unembedding=None, logits=logits)
    torch.testing.assert_close(other.thr, 9 * told.thr)
    torch.testing.assert_close(other.tau, 9 * told.tau)
    assert torch.equal(other.is_dominant, told.is_dominant)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_at_a_temperature_it_is_the_product_of_gradients_at_the_unembedding(temperature: float) -> None:
    world, weight = World(), World().unembedding.clone().requires_grad_()
    scores = (world.hidden @ weight.T / temperature).log_softmax(-1)
    log_probs = scores.gather(-1, world.tokens[..., None])[..., 0]
    influence = world.measure(temperature=temperature).influence
    for row, column in world.mask.nonzero().tolist():
        right = world.mask & ((world.group_ids == world.group_ids[row]) & world.correct)[:, None]
        ours, of_right = (
            torch.autograd.grad(one, weight, retain_graph=True)[0]
            for one in (log_probs[row, column], log_probs[right].sum())
        )
        torch.testing.assert_close(influence[row, column], (ours * of_right).sum())


@pytest.mark.parametrize("weighting", ["sign", "advantage"])
def test_what_is_dominant_does_not_depend_on_the_scale_of_advantages(weighting: str) -> None:
    world = World()
    by_token = world.advantage[:, None] * torch.rand(9, 5, dtype=torch.float64)
    for advantage in (world.advantage, by_token):
        one, ten = (world.measure(advantage=scale * advantage, weighting=weighting) for scale in (1, 10))
        assert torch.equal(one.is_dominant, ten.is_dominant)
        assert 0 < int(one.is_dominant.sum()) < int(world.mask.sum())


def test_a_threshold_of_weighed_influences_is_their_smallest_mean_over_right_answers() -> None:
    world = World()
    told = world.measure(advantage=world.advantage, weighting="advantage")
    for group in (5, 2):
        rows = (world.group_ids == group) & world.correct
        means = told.thr[rows].sum(1) / world.mask[rows].sum(1)
        torch.testing.assert_close(told.tau[rows], means.min().clamp(min=0).expand(int(rows.sum())))


def test_nothing_is_dominant_in_padding_or_where_all_are_right() -> None:
    told, world = World().measure(), World()
    assert not bool(told.is_dominant[~world.mask].any())
    assert not bool(told.is_dominant[world.group_ids == 9].any())
    assert told.is_mixed.tolist() == [group != 9 for group in world.group_ids.tolist()]


def test_answers_that_are_right_in_part_count_in_part() -> None:
    world = World()
    shares = torch.tensor([0.5, 0.0, 0.1, 2.0, 0.0, 0.3, 0.0, 0.0, 0.7]).double()
    weight = world.unembedding.clone().requires_grad_()
    log_probs = (world.hidden @ weight.T).log_softmax(-1).gather(-1, world.tokens[..., None])[..., 0] * world.mask
    world.correct = shares
    told, by_token = world.measure(), world.measure(normalise="tokens")
    for group in (5, 2):
        rows = world.group_ids == group
        right = (log_probs * shares[:, None])[rows].sum()
        (of_right,) = torch.autograd.grad(right, weight, retain_graph=True)
        (ours,) = torch.autograd.grad(log_probs[rows][0].sum(), weight, retain_graph=True)
        torch.testing.assert_close(told.influence[rows][0].sum(), (ours * of_right).sum())
        counted = (shares[rows] * world.mask[rows].sum(1)).sum()
        torch.testing.assert_close(by_token.influence[rows], told.influence[rows] / counted)
    assert bool((told.thr[shares > 0] * told.influence[shares > 0] >= 0).all())


def test_normalised_by_tokens_a_repeated_answer_counts_once() -> None:
    world = World()
    rows = torch.tensor([0, 1])
    twice = torch.tensor([0, 0, 1])
    for kind, factor in (("none", 2.0), ("tokens", 1.0)):
        once, more = (
            token_hidden_reward(
                world.hidden[some], world.tokens[some], world.mask[some], world.correct[some],
                unembedding=world.unembedding, normalise=kind,
            )
            for some in (rows, twice)
        )  # fmt: skip
        torch.testing.assert_close(more.influence[-1], factor * once.influence[-1])


def test_the_threshold_is_the_least_mean_of_a_right_answer_and_not_below_zero() -> None:
    world, told = World(), World().measure(beta=0.5)
    means = (told.influence.sum(1) / world.mask.sum(1))[(world.group_ids == 5) & world.correct]
    assert float(told.tau[0]) == pytest.approx(max(0.5 * float(means.min()), 0.0))
    assert torch.equal(told.tau[world.group_ids == 9], torch.full((2,), -torch.inf, dtype=torch.float64))


def test_low_precision_is_widened() -> None:
    world = World()
    low = token_hidden_reward(
        world.hidden.bfloat16(), world.tokens, world.mask, world.correct, world.group_ids,
        unembedding=world.unembedding.bfloat16(),
    )  # fmt: skip
    assert low.thr.dtype == torch.float32
    torch.testing.assert_close(low.thr.double(), world.measure().thr, atol=0.3, rtol=0.1)


@pytest.mark.parametrize("p", [0.2, -0.2])
def test_tilting_by_sign(p: float) -> None:
    scores = torch.tensor([[2.0, -1.0, 0.0]])
    found = thr_reweight(torch.tensor([-1.0]), scores, p=p)
    torch.testing.assert_close(found, -torch.tensor([[1 + p, 1 - p, 1.0]]))
    masked = thr_reweight(torch.tensor([-1.0]), scores, p=p, tau=1.5, mask_small=True)
    torch.testing.assert_close(masked, -torch.tensor([[1 + p, 0.0, 0.0]]))


def test_masking_alone_keeps_what_is_dominant() -> None:
    scores, tau = torch.tensor([[2.0, -1.0], [0.0, 0.0]]), torch.tensor([1.5, -torch.inf])
    found = thr_reweight(torch.ones(2), scores, tau=tau, mask_small=True)
    assert found.tolist() == [[1, 0], [1, 1]]


def test_shared_tokens_of_wrong_answers_are_let_off_by_the_share_of_right_ones() -> None:
    influence = torch.tensor([1.0, -1.0])
    for right, size, eta in ((1, 2, 0.0), (1, 4, 0.5), (7, 8, 0.75), (1, 10, 0.8)):
        correct = torch.arange(size) < right
        advantage = torch.where(correct, 1.0, -2.0)
        found = nthr_reweight(advantage, influence.expand(size, 2), correct, torch.zeros(size).long(), 0.0)
        torch.testing.assert_close(found[-1], torch.tensor([-2 * eta, -2.0]))
        assert torch.equal(found[0], torch.ones(2))


def test_question_score_is_what_the_step_takes_from_right_answers() -> None:
    world = World()
    told = world.measure(advantage=world.advantage, weighting="advantage")
    scores = gwhes(told.influence, world.correct, world.group_ids)
    by_group = [-told.thr[world.group_ids == group].sum() for group in (2, 5, 9)]
    torch.testing.assert_close(scores, torch.stack(by_group))
    assert float(scores[2]) == 0


def test_what_is_missing_or_impossible_is_told() -> None:
    world = World()
    with pytest.raises(ValueError, match="either unembedding or logits"):
        world.measure(unembedding=None)
    with pytest.raises(ValueError, match="weighting is sign or advantage"):
        world.measure(weighting="size")
    with pytest.raises(ValueError, match="needs advantage="):
        world.measure(weighting="advantage")
    world.tokens[0, 0] = VOCABULARY
    with pytest.raises(ValueError, match="token 7 lies outside the vocabulary of 7"):
        world.measure()
    world.tokens[0, 0] = -100
    with pytest.raises(ValueError, match="token -100 lies outside"):
        world.measure(unembedding=None, logits=world.hidden @ world.unembedding.T)
    world.tokens[0, 0], world.tokens[~world.mask] = 0, -100
    world.measure()  # padding may be anything
    world.correct = world.advantage
    with pytest.raises(ValueError, match="from 0 up"):
        world.measure()
    world = World()
    with pytest.raises(ValueError, match="chunk=0"):
        world.measure(chunk=0)
    with pytest.raises(ValueError, match="between -1 and 1"):
        thr_reweight(torch.ones(1), torch.ones(1, 1), p=1.0)
    with pytest.raises(ValueError, match="needs tau"):
        thr_reweight(torch.ones(1), torch.ones(1, 1), mask_small=True)
