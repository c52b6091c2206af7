"""Kernels of infinite width: the paper's recursion by hand, by quadrature, and against wide networks."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynascope.kernels import limit_kernels, ntk
from dynascope.kernels.limits import (
    Abs,
    Activation,
    Conv,
    Cos,
    Dense,
    Elementwise,
    Erf,
    Flatten,
    Gaussian,
    Gelu,
    GlobalAvgPool,
    Identity,
    Layer,
    LayerNorm,
    LeakyRelu,
    Quadratic,
    Relu,
    Sin,
)
from dynascope.nn import NTKConv2d, NTKLinear

CIRCLE = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)


def deep(depth: int, b_std: float, activation: Activation | None = None) -> list:
    """`depth` weight layers."""
    layers: list = [Dense(1.0, b_std)]
    for _ in range(depth - 1):
        layers += [activation or Relu(), Dense(1.0, b_std)]
    return layers


@pytest.mark.parametrize(
    ("depth", "b_std", "nngp", "ntk"),
    [
        (2, 0.0, (0.25, 0.0795775, 0.0), (0.5, 0.0795775, 0.0)),
        (2, 0.1, None, (0.52, 0.0962158, -0.0113170)),
        (4, 0.1, (0.08125, 0.0557603, 0.0480966), (0.2825, 0.0927021, 0.0643538)),
    ],
)
def test_relu_networks_by_hand(depth: int, b_std: float, nngp: tuple | None, ntk: tuple) -> None:
    covariance, tangent = limit_kernels(deep(depth, b_std), CIRCLE[:1], CIRCLE)
    assert tangent[0].tolist() == pytest.approx(ntk, abs=1e-6)
    assert nngp is None or covariance[0].tolist() == pytest.approx(nngp, abs=1e-6)


def test_the_diagonal_of_a_relu_network_in_closed_form() -> None:
    x = torch.randn(5, 7, dtype=torch.float64)
    for depth in (1, 2, 5):
        covariance, tangent = limit_kernels(deep(depth, 0.0), x)
        own = x.square().sum(1) / 7 / 2 ** (depth - 1)
        torch.testing.assert_close(covariance.diagonal(), own)
        torch.testing.assert_close(tangent.diagonal(), depth * own)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        (Erf(), torch.erf),
        (Gelu(), F.gelu),
        (Sin(), torch.sin),
        (Cos(), torch.cos),
        (Gaussian(), lambda x: torch.exp(-(x**2))),
        (Quadratic(), torch.square),
        (Identity(), lambda x: x),
    ],
)
def test_closed_forms_equal_quadrature(activation: Activation, function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(6, 5, dtype=torch.float64)
    x = 0.5 * x / x.norm(dim=1, keepdim=True) * torch.linspace(0.5, 1.5, 6, dtype=torch.float64)[:, None]
    layers = [Dense(1.1, 0.2), activation, Dense(0.9, 0.1), activation, Dense()]
    numeric = [Elementwise(function) if layer is activation else layer for layer in layers]
    for exact, approximate in zip(limit_kernels(layers, x), limit_kernels(numeric, x), strict=True):
        torch.testing.assert_close(exact, approximate, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("slope", [0.0, 0.3, -1.0])
def test_leaky_relu_against_sampling(slope: float) -> None:
    generator = torch.Generator().manual_seed(0)
    s11, s12, s22 = (torch.tensor(one, dtype=torch.float64) for one in (1.3, 0.4, 0.7))
    z = torch.randn(2, 1_000_000, generator=generator, dtype=torch.float64)
    u, v = s11.sqrt() * z[0], s12 / s11.sqrt() * z[0] + (s22 - s12**2 / s11).sqrt() * z[1]
    product = F.leaky_relu(u, slope) * F.leaky_relu(v, slope)
    slopes = torch.where(u > 0, 1.0, slope) * torch.where(v > 0, 1.0, slope)
    found = LeakyRelu(slope).expectations(s11, s12, s22)
    for value, samples in zip(found, (product, slopes), strict=True):
        assert abs(value - samples.mean()) < 4 * samples.std() / 1000


def test_absolute_value_and_relu_are_leaky_relus() -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    assert torch.equal(limit_kernels(deep(2, 0.1, Abs()), x)[1], limit_kernels(deep(2, 0.1, LeakyRelu(-1.0)), x)[1])
    assert torch.equal(limit_kernels(deep(2, 0.1), x)[1], limit_kernels(deep(2, 0.1, LeakyRelu(0.0)), x)[1])


def test_layer_norm_makes_lengths_of_inputs_irrelevant_and_flatten_changes_nothing() -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    layers = [Dense(), LayerNorm(), Relu(), Flatten(), Dense()]
    nngp, _ = limit_kernels(layers, x)
    torch.testing.assert_close(nngp, limit_kernels(layers, x * torch.tensor([[1.0], [2.0], [5.0], [0.1]]))[0])
    torch.testing.assert_close(nngp.diagonal(), torch.full((4,), 0.5, dtype=torch.float64))


def test_batches_and_slopes_through_identical_inputs_are_finite() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    batched = limit_kernels(deep(3, 0.1), x)[1]
    torch.testing.assert_close(batched[1], limit_kernels(deep(3, 0.1), x[1])[1])
    twice = torch.cat([x[0], x[0][:1]]).requires_grad_()
    limit_kernels(deep(3, 0.1), twice)[1].sum().backward()
    assert twice.grad is not None
    assert torch.isfinite(twice.grad).all()


def test_positive_definite_on_the_sphere_but_for_polynomials() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 10, generator=generator, dtype=torch.float64)
    x = x / x.norm(dim=1, keepdim=True)
    for activation in (Relu(), Erf()):
        assert torch.linalg.eigvalsh(limit_kernels(deep(3, 0.1, activation), x)[1])[0] > 1e-6
    linear = limit_kernels(deep(3, 0.1, Identity()), x)[1]
    assert torch.linalg.matrix_rank(linear, hermitian=True) == 11
    # Without a bias a ReLU network of two layers is even up to a linear part: antipodal pairs beyond the input's rank fail.
    pairs = torch.cat([x[:25], -x[:25]])
    assert torch.linalg.eigvalsh(limit_kernels(deep(2, 0.0), pairs)[1])[0] < 1e-12
    assert torch.linalg.eigvalsh(limit_kernels(deep(3, 0.5), pairs)[1])[0] > 1e-7


def test_finite_networks_approach_the_limit_as_one_over_root_width() -> None:
    angles = torch.tensor([0.0, 0.7, 1.9, 3.0], dtype=torch.float64)
    x = torch.stack([angles.cos(), angles.sin()], 1)
    expected = limit_kernels(deep(4, 0.1), x)[1]
    errors = []
    widths = (64, 256, 1024)
    for width in widths:
        of_seeds = []
        for seed in range(4):
            torch.manual_seed(seed)
            sizes = [2, width, width, width, 1]
            layers: list[nn.Module] = []
            for before, after in itertools.pairwise(sizes):
                layers += [NTKLinear(before, after, b_std=0.1), nn.ReLU()]
            kernel = ntk(nn.Sequential(*layers[:-1]), x.float())[..., 0, 0]
            of_seeds.append(float((kernel - expected).norm() / expected.norm()))
        errors.append(np.mean(of_seeds))
    slope = np.polyfit(np.log(widths), np.log(errors), 1)[0]
    assert -0.8 < slope < -0.25
    assert errors[-1] < 0.15
    assert math.isfinite(errors[0])


IMAGES = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (1, 1), (2, 1)])
def test_a_convolution_is_inner_products_of_patches(stride: int, padding: int) -> None:
    patches = F.unfold(IMAGES, 3, stride=stride, padding=padding)  # (n, 2 · 9, positions)
    expected = torch.einsum("ncp,mcp->nm", patches, patches) / patches[0].numel()
    nngp, tangent = limit_kernels([Conv(3, stride, padding), Flatten()], IMAGES)
    torch.testing.assert_close(nngp, expected)
    torch.testing.assert_close(tangent, expected)  # a linear network's
    pooled = torch.einsum("ncp,mcq->nm", patches, patches) / patches.shape[1] / patches.shape[2] ** 2
    torch.testing.assert_close(limit_kernels([Conv(3, stride, padding), GlobalAvgPool()], IMAGES)[0], pooled)


def test_a_convolution_of_single_pixels_is_a_dense_layer() -> None:
    pixels = IMAGES[:, :, :1, :1]
    dense = limit_kernels([Dense(1.2, 0.3), Relu(), LayerNorm(), Dense(0.9, 0.1)], pixels.flatten(1))
    convolutional = [Conv(1, w_std=1.2, b_std=0.3), Relu(), LayerNorm(), GlobalAvgPool(), Dense(0.9, 0.1)]
    for one, other in zip(dense, limit_kernels(convolutional, pixels), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("end", [Flatten(), GlobalAvgPool()])
def test_wide_convolutional_networks_approach_the_limit(end: Layer) -> None:
    limit = [Conv(3, padding=1, b_std=0.2), Relu(), Conv(3, stride=2, padding=1, b_std=0.2), Relu(), end, Dense()]
    expected = limit_kernels(limit, IMAGES[:2], IMAGES[1:])[1]
    errors = []
    for width in (32, 512):
        found = []
        for seed in range(4):
            torch.manual_seed(seed)
            last = (nn.Flatten(), NTKLinear(4 * width, 1, bias=False))
            if isinstance(end, GlobalAvgPool):
                last = (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), NTKLinear(width, 1, bias=False))
            model = nn.Sequential(
                *(NTKConv2d(2, width, 3, padding=1, b_std=0.2), nn.ReLU()),
                *(NTKConv2d(width, width, 3, stride=2, padding=1, b_std=0.2), nn.ReLU(), *last),
            )
            found.append(ntk(model, IMAGES[:2].float(), IMAGES[1:].float())[..., 0, 0].double())
        errors.append(float((torch.stack(found).mean(0) - expected).norm() / expected.norm()))
    assert errors[1] < errors[0]
    assert errors[1] < 0.05


@pytest.mark.parametrize(
    ("layers", "x", "told"),
    [
        ([Conv(), Flatten()], CIRCLE, "want images"),
        ([Flatten(), Conv()], IMAGES, "before Flatten"),
        ([Conv(), Relu()], IMAGES, "before its end"),
        ([Conv(5), Flatten()], IMAGES, "leaves nothing"),
    ],
)
def test_layers_that_do_not_fit_are_told(layers: list[Layer], x: Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        limit_kernels(layers, x)


def test_a_network_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="needs layers"):
        limit_kernels([], CIRCLE)
