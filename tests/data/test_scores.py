"""Scores of examples, against hand-worked numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dynascope.data import el2n, grand, l1_error, margin, over_tokens, unclog
from dynascope.data.scores import cross_entropy


def test_el2n_of_undecided_right_and_wrong() -> None:
    logits = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0]])
    expected = [math.sqrt(0.5), 0.0, math.sqrt(2)]  # (1/2, -1/2); nothing; (-1, 1)
    assert el2n(logits, torch.tensor([0, 0, 0])).tolist() == pytest.approx(expected)


def test_l1_error_is_twice_the_missing_probability() -> None:
    logits, labels = torch.randn(5, 4), torch.randint(4, (5,))
    right = logits.softmax(-1)[torch.arange(5), labels]
    torch.testing.assert_close(l1_error(logits, labels), 2 * (1 - right))


def test_margins() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    assert margin(logits, torch.tensor([0])).item() == pytest.approx(0.3 - 0.5)
    assert margin(logits, torch.tensor([0]), kind="sum").item() == pytest.approx(0.3 + 0.2 - 0.5)
    assert margin(logits, torch.tensor([2])).item() == pytest.approx(0.5 - 0.2)


def test_el2n_is_grand_where_logit_gradients_are_orthogonal_and_equal() -> None:
    # logits = weight, one row an example: the gradient of logit k is the k-th unit vector
    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Embedding(4, 3)

        def forward(self, index: torch.Tensor) -> torch.Tensor:
            return self.weight(index)

    model, index, labels = Free(), torch.arange(4), torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(grand(model, cross_entropy, (index, labels)), el2n(model(index), labels).detach())


def test_grand_looks_in_evaluation_mode_and_leaves_the_modes() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3))
    model[2].eval()
    batch = torch.randn(6, 4), torch.randint(3, (6,))
    assert torch.equal(grand(model, cross_entropy, batch), grand(model, cross_entropy, batch))
    assert [module.training for module in model] == [True, True, False, True]


def test_scores_of_sequences_are_means_over_the_tokens_that_are_told() -> None:
    logits = torch.tensor([[[0.0, 0.0], [100.0, 0.0], [9.0, 1.0]], [[0.0, 0.0]] * 3])
    labels = torch.tensor([[0, 1, -100], [-100, -100, -100]])
    told = over_tokens(el2n, logits, labels)
    assert told[0].item() == pytest.approx((math.sqrt(0.5) + math.sqrt(2)) / 2)
    assert told[1].isnan()  # nothing to go by, which `select` refuses
    assert cross_entropy(logits, labels)[0].item() == pytest.approx((math.log(2) + 100) / 2)


def test_half_precision_logits_are_scored_in_single() -> None:
    logits, labels = torch.randn(6, 3).bfloat16(), torch.randint(3, (6,))
    expected = (F.softmax(logits.float(), -1) - F.one_hot(labels, 3)).norm(dim=1)
    assert torch.equal(el2n(logits, labels), expected)


def test_unclog_of_a_linear_model_is_the_distance_from_the_mean_input() -> None:
    # ∇ Σ_k w_k·x = (x, …, x) over the rows, and 1 for each bias, which every example shares.
    model = nn.Linear(3, 4).double()
    inputs, reference = torch.randn(5, 3).double(), torch.randn(8, 3).double()
    expected = math.sqrt(4) * (inputs - reference.mean(0)).norm(dim=1)
    torch.testing.assert_close(unclog(model, inputs, reference), expected)


def test_unclog_is_that_of_explicit_gradients() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Dropout(), nn.Linear(12, 4)).double()
    inputs, reference = torch.randn(5, 1, 4, 4).double(), torch.randn(6, 1, 4, 4).double()

    def pull(one: torch.Tensor) -> torch.Tensor:
        gradients = torch.autograd.grad(model(one[None]).sum(), model.parameters())
        return torch.cat([gradient.flatten() for gradient in gradients])

    scores = unclog(model, inputs, reference)
    assert model.training
    model.eval()
    mean = torch.stack([pull(one) for one in reference]).mean(0)
    torch.testing.assert_close(scores, torch.stack([(pull(one) - mean).norm() for one in inputs]))
