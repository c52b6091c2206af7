"""Weights that disentangle: the changes that they give to first order, and the losses that use them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dynascope.losses import (
    DisentangledWeights,
    PairwiseNormalizedPreference,
    PreferencePairs,
    disentangled_weights,
    margin_loss,
    normalized_weights,
)


def changes(
    inner: torch.Tensor, squares: tuple[torch.Tensor, torch.Tensor], weights: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    pull, push = weights
    return pull * squares[0] - push * inner, pull * inner - push * squares[1]


def random_geometry(count: int = 500) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of gradients of very different lengths and all angles."""
    chosen = torch.randn(count, 3, dtype=torch.float64) * torch.logspace(-2, 2, count)[:, None]
    rejected = torch.randn(count, 3, dtype=torch.float64) + chosen * torch.rand(count, 1)
    return (chosen * rejected).sum(1), (chosen.square().sum(1), rejected.square().sum(1))


def test_normalized_weights_of_a_pair_by_hand() -> None:
    # (1, 1) and (2, 1) with weights of 1/|g|: √2 − 3/√5 and 3/√2 − √5, times c.
    inner, squares = torch.tensor([3.0]), (torch.tensor([2.0]), torch.tensor([5.0]))
    weights = normalized_weights(*squares, (torch.ones(1), torch.ones(1)))
    scale = (2**0.5 + 5**0.5) / 2
    torch.testing.assert_close(
        torch.cat(changes(inner, squares, weights)) / scale, torch.tensor([0.0725728, -0.1147476])
    )


def test_normalized_weights_never_lower_the_chosen_response_nor_raise_the_rejected() -> None:
    inner, squares = random_geometry()
    both = torch.rand(2, len(inner), dtype=torch.float64)
    chosen, rejected = changes(inner, squares, normalized_weights(*squares, (both[0], both[1])))
    assert bool((chosen >= -1e-9).all())
    assert bool((rejected <= 1e-9).all())


def test_a_gradient_of_zero_gets_no_weight() -> None:
    pull, push = normalized_weights(torch.zeros(1), torch.tensor([4.0]), (torch.ones(1), torch.ones(1)))
    assert (float(pull), float(push)) == (0.0, 0.5)


def test_disentangled_weights_move_both_the_right_way_and_keep_their_product() -> None:
    inner, squares = random_geometry()
    ones = torch.ones_like(inner)
    pull, push = disentangled_weights(inner, *squares, (ones, ones))
    chosen, rejected = changes(inner, squares, (pull, push))
    assert bool((chosen > 0).all())
    assert bool((rejected < 0).all())
    torch.testing.assert_close(pull * push, ones)


def test_pairs_that_are_well_inside_keep_their_weights() -> None:
    inner, squares = torch.tensor([0.1, -1.0]), (torch.ones(2), torch.ones(2))
    weights = disentangled_weights(inner, *squares, (torch.tensor([2.0, 9.0]), torch.tensor([1.5, 0.1])))
    torch.testing.assert_close(torch.stack(weights), torch.tensor([[2.0, 9.0], [1.5, 0.1]]))


def test_equal_gradients_leave_one_ratio_under_which_nothing_moves() -> None:
    weights = disentangled_weights(torch.tensor([25.0]), *[torch.tensor([25.0])] * 2, (torch.ones(1), torch.ones(1)))
    torch.testing.assert_close(torch.cat(weights), torch.ones(2))


def test_a_share_beyond_one_half_is_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and"):
        disentangled_weights(*[torch.ones(1)] * 3, (torch.ones(1), torch.ones(1)), inside=0.6)


def pairs_of(model: nn.Module, features: torch.Tensor) -> PreferencePairs:
    scores = model(features).log_softmax(-1)
    return PreferencePairs(scores[:, 0], scores[:, 1], -torch.ones(len(features)), -torch.ones(len(features)))


@pytest.mark.parametrize("is_normalized", [True, False])
def test_disentangled_loss_has_the_value_of_the_loss_and_the_gradient_of_its_weights(is_normalized: bool) -> None:
    model, features = nn.Linear(4, 3), torch.randn(5, 4)
    pairs, base = pairs_of(model, features), margin_loss("dpo")
    inner, squares = torch.full((5,), 3.0), (torch.full((5,), 2.0), torch.full((5,), 5.0))
    loss = DisentangledWeights(base, is_normalized=is_normalized)(pairs, inner, *squares)
    torch.testing.assert_close(loss, base(pairs))
    found = torch.autograd.grad(loss.sum(), [pairs.chosen, pairs.rejected], retain_graph=True)
    if is_normalized:
        pull, push = normalized_weights(*squares, base.coefficients(pairs))
    else:
        pull, push = disentangled_weights(inner, *squares, base.coefficients(pairs))
    torch.testing.assert_close(found, (-pull, push))


def test_normalized_step_of_one_pair_is_the_difference_of_unit_gradients() -> None:
    model, features = nn.Linear(4, 3), torch.randn(1, 4)
    pairs = pairs_of(model, features)
    up, down = (
        torch.cat([g.flatten() for g in torch.autograd.grad(one.sum(), list(model.parameters()), retain_graph=True)])
        for one in (pairs.chosen, pairs.rejected)
    )
    weight = margin_loss("dpo").coefficients(pairs)[0].detach()
    loss = PairwiseNormalizedPreference(margin_loss("dpo")).backward(pairs, model.parameters())
    found = torch.cat([one.grad.flatten() for one in model.parameters()])
    expected = -weight * (up.norm() + down.norm()) / 2 * (up / up.norm() - down / down.norm())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(loss, margin_loss("dpo")(pairs).mean())


def test_two_processes_take_the_step_of_their_pairs_together(tmp_path: Path) -> None:
    script = Path(__file__).with_name("distributed_normalized.py")
    ranks = [
        subprocess.Popen([sys.executable, str(script), str(tmp_path), str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for one in ranks:
        _, errors = one.communicate(timeout=240)
        assert one.returncode == 0, errors[-2000:]
    torch.manual_seed(0)
    model, features = nn.Linear(4, 3), torch.randn(6, 4)
    PairwiseNormalizedPreference(margin_loss("dpo")).backward(pairs_of(model, features), model.parameters())
    for rank in range(2):
        found = torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, [one.grad for one in model.parameters()])


def test_normalized_gradients_add_up_over_calls() -> None:
    model, features = nn.Linear(4, 3), torch.randn(2, 4)
    loss = PairwiseNormalizedPreference(margin_loss("simpo"))
    grads = []
    for calls in (1, 2):
        model.zero_grad()
        for _ in range(calls):
            scores = model(features).log_softmax(-1)
            lengths = torch.ones(2), torch.ones(2)
            loss.backward(PreferencePairs(scores[:, 0], scores[:, 1], None, None, *lengths), model.parameters())
        grads.append(model.weight.grad)
    torch.testing.assert_close(grads[1], 2 * grads[0])
