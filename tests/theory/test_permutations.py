"""The closed forms of exact permutation learning, by hand and against the general kernel formulas."""

import math

import numpy as np
import pytest
import torch

from dynascope.data import PermutationTask
from dynascope.kernels import GPEnsemble, KernelTraining, limit_kernels, ntk, predict_ensemble
from dynascope.kernels.limits import Dense, Relu
from dynascope.nn import TwoLayerNet
from dynascope.theory.permutations import (
    bit_margins,
    ensemble_size,
    exact_match,
    largest_lr,
    permutation_predictor,
    round_ensemble,
)


@pytest.mark.parametrize(
    ("k", "num_ones", "kernel", "expected"),
    [
        (5, 2, "ntk", (0.560632, -0.014640, 0.013235)),
        (5, 2, "nngp", (0.601657, -0.039543, 0.012877)),
        (10, 5, "ntk", (0.283730, -0.040712, 0.012505)),
        (30, 2, "ntk", (0.571005, -0.004267, 0.002140)),
    ],
)
def test_means_and_variances_by_hand(k: int, num_ones: int, kernel: str, expected: tuple[float, float, float]) -> None:
    found = permutation_predictor(k, num_ones, kernel)  # type: ignore[arg-type]
    assert (found.one, found.zero, found.variance) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kernel", ["ntk", "nngp"])
@pytest.mark.parametrize("steps", [math.inf, 7.0, 0.0])
def test_the_closed_form_is_the_general_one(kernel: str, steps: float) -> None:
    task = PermutationTask(6, seed=1)
    x, y = task.train()
    inputs, images = task.all_inputs()
    nngp, tangent = limit_kernels([Dense(), Relu(), Dense()], torch.cat([x, inputs]))
    used = tangent if kernel == "ntk" else nngp
    mean, covariance = predict_ensemble(
        used[:6, :6],
        nngp[:6, :6],
        used[6:, :6],
        nngp[6:, :6],
        nngp[6:, 6:],
        y,
        steps,
        rate=0.9 * largest_lr(6, kernel),  # type: ignore[arg-type]
        is_discrete=True,
    )
    for at, image in enumerate(images):
        found = permutation_predictor(6, int(image.sum()), kernel, steps=steps)  # type: ignore[arg-type]
        assert mean[at][image > 0].tolist() == pytest.approx([found.one] * int(image.sum()), abs=1e-9)
        assert mean[at][image == 0].tolist() == pytest.approx([found.zero] * (6 - int(image.sum())), abs=1e-9)
        assert covariance[at, at].item() == pytest.approx(found.variance, abs=1e-9)


def test_training_inputs_are_learnt_and_an_untrained_network_is_centred() -> None:
    for k in (3, 8, 40):
        learnt = permutation_predictor(k, 1)
        assert (learnt.one, learnt.zero, learnt.variance) == (pytest.approx(1.0), 0.0, 0.0)
        assert learnt.failure(1, 1, k) == 0
        fresh = permutation_predictor(k, 2, steps=0.0)
        assert (fresh.one, fresh.zero, fresh.variance) == (0, 0, pytest.approx(1 / (2 * k)))


def test_signs_tell_ones_from_zeros_at_every_input() -> None:
    for k in (2, 5, 30):
        for num_ones in range(2, k + 1):
            found = permutation_predictor(k, num_ones)
            assert found.one > 0
            assert num_ones == k or found.zero < 0


def test_the_weight_scale_changes_the_variance_alone() -> None:
    one, two = permutation_predictor(7, 3), permutation_predictor(7, 3, w_std=2.0)
    assert (two.one, two.zero, two.variance) == pytest.approx((one.one, one.zero, 16 * one.variance))


def test_the_training_kernels_inverse_in_closed_form() -> None:
    k, c = 9, 1 / (2 * math.pi)
    x, _ = PermutationTask(k).train()
    tangent = k * limit_kernels([Dense(), Relu(), Dense()], x)[1]
    assert tangent[0, 0].item() == pytest.approx(1.0)
    assert tangent[0, 1].item() == pytest.approx(c)
    eye, ones = torch.eye(k, dtype=torch.float64), torch.ones(k, k, dtype=torch.float64)
    inverse = (eye - c / (1 - c + k * c) * ones) / (1 - c)
    torch.testing.assert_close(torch.linalg.inv(tangent), inverse, rtol=1e-12, atol=1e-12)
    assert 2 / float(torch.linalg.eigvalsh(tangent / k)[-1]) == pytest.approx(largest_lr(k))


@pytest.mark.parametrize(
    ("kernel", "delta", "sizes"),
    [
        ("ntk", 0.1, (205, 333, 454, 579, 708, 840)),
        ("ntk", 0.001, (716, 902, 1123, 1359, 1603, 1854)),
        ("nngp", 0.1, (28, 58, 89, 121, 155, 190)),
        ("nngp", 0.001, (96, 156, 219, 284, 351, 419)),
    ],
)
def test_ensemble_sizes(kernel: str, delta: float, sizes: tuple[int, ...]) -> None:
    assert tuple(ensemble_size(k, delta, kernel=kernel) for k in (5, 10, 15, 20, 25, 30)) == sizes  # type: ignore[arg-type]


def test_sizes_are_the_smallest_and_bounds_are_larger() -> None:
    for k in (5, 12):
        size = ensemble_size(k, 0.05)
        found = permutation_predictor(k, 2)
        assert found.failure(size, 2, k) <= 0.05 < found.failure(size - 1, 2, k)
        assert ensemble_size(k, 0.05, bound="hoeffding") >= size
        assert ensemble_size(k, 0.05, "worst") >= size
        assert ensemble_size(k, 0.05, "all", bound="hoeffding") >= ensemble_size(k, 0.05, "all") > size


def test_the_failure_of_an_average_against_drawing_it() -> None:
    task = PermutationTask(5)
    x, y = task.train()
    inputs, images = task.with_ones(2)
    nngp, tangent = limit_kernels([Dense(), Relu(), Dense()], torch.cat([x, inputs[:1]]))
    mean, covariance = predict_ensemble(tangent[:5, :5], nngp[:5, :5], tangent[5:, :5], nngp[5:, :5], nngp[5:, 5:], y)
    generator = torch.Generator().manual_seed(0)
    outputs = GPEnsemble(mean, covariance).sample(100_000, generator)
    averages = outputs.view(1000, 100, 1, 5).mean(1)
    wrong = 1 - exact_match(round_ensemble(averages), images[:1]).mean().item()
    expected = permutation_predictor(5, 2).failure(100, 2, 5)
    assert wrong == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 1000))
    assert outputs.var(0).mean().item() == pytest.approx(permutation_predictor(5, 2).variance, rel=0.02)
    assert (bit_margins(outputs.mean(0), images[:1]) > 0).all()


def test_wide_networks_have_the_kernels_of_both_parametrizations() -> None:
    torch.manual_seed(0)
    x, _ = PermutationTask(4).train()
    nngp, tangent = limit_kernels([Dense(), Relu(), Dense()], x)
    wide = ntk(TwoLayerNet(4, 200_000).double(), x, output="trace")
    torch.testing.assert_close(wide, tangent, rtol=0.02, atol=0.002)
    standard = ntk(TwoLayerNet(4, 200_000, parametrization="standard").double(), x, output="trace")
    torch.testing.assert_close(standard / 200_000, nngp, rtol=0.02, atol=0.002)


def test_predictions_permute_with_the_permutation() -> None:
    kernels = limit_kernels(
        [Dense(), Relu(), Dense()], torch.cat([torch.eye(4), PermutationTask(4).all_inputs()[0].float()])
    )
    tangent = kernels[1].double()
    plain = KernelTraining(tangent[:4, :4], torch.eye(4, dtype=torch.float64)).elsewhere(tangent[4:, :4], math.inf)
    task = PermutationTask(4, seed=3)
    moved = KernelTraining(tangent[:4, :4], task.train()[1]).elsewhere(tangent[4:, :4], math.inf)
    torch.testing.assert_close(moved, task.image(plain))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: permutation_predictor(1, 1), "at least 2"),
        (lambda: permutation_predictor(5, 6), "between 1 and k"),
        (lambda: ensemble_size(5, 1.5), "between 0 and 1"),
        (lambda: PermutationTask(1), "at least 2 bits"),
        (lambda: PermutationTask(3, torch.tensor([0, 0, 1])), "no permutation"),
        (lambda: PermutationTask(3).test(4, 10), "between 1 and k=3"),
        (lambda: PermutationTask(21).all_inputs(), "up to 20 bits"),
        (lambda: TwoLayerNet(3, 8, parametrization="mup"), "ntk or standard"),
    ],
)
def test_impossible_requests_are_told(call: object, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()  # type: ignore[operator]


def test_the_task_gives_unit_inputs_and_their_images() -> None:
    task = PermutationTask(4, torch.tensor([2, 0, 3, 1]))
    _, y = task.train()
    assert torch.equal(y[0], torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    inputs, images = task.all_inputs()
    assert inputs.shape == (15, 4)
    torch.testing.assert_close(inputs.norm(dim=1), torch.ones(15, dtype=torch.float64))
    assert torch.equal(images, (inputs[:, task.perm] > 0).double())
    tests, of_tests = task.test(2, 50)
    assert (of_tests.sum(1) == 2).all()
    assert np.isclose(tests.numpy()[tests.numpy() > 0], 1 / math.sqrt(2)).all()
    assert len(task.with_ones(2)[0]) == 6
