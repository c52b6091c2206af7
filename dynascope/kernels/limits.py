"""Kernels of infinitely wide networks, dense or convolutional: the NNGP kernel K of outputs at initialization, and the NTK Θ.

A network is a list of layers, `[Dense(b_std=0.1), Relu(), Dense(b_std=0.1)]`. Each takes the pair of kernels through the
recursion of 1806.07572, section 4: Σ' = w² E[σ(u)σ(v)] + b², Θ' = w² Θ E[σ'(u)σ'(v)] + Σ'.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Kernels:
    """What goes from layer to layer: `nngp` and `ntk` (…, n, m), and each side's own NNGP kernel with itself."""

    nngp: Float[Tensor, "*batch n m"]
    ntk: Float[Tensor, "*batch n m"]
    own1: Float[Tensor, "*batch n"]
    own2: Float[Tensor, "*batch m"]
    space: tuple[int, int] | None = None
    """Height and width of images, whose positions are rows of their own: n and m are then examples × positions."""


class Layer(ABC):
    """One layer of an infinitely wide network."""

    @abstractmethod
    def __call__(self, kernels: Kernels) -> Kernels:
        """The kernels after this layer."""


@dataclass(frozen=True)
class Dense(Layer):
    """A fully connected layer in NTK parametrization: w/√n W x + b β with standard normal W and β."""

    w_std: float = 1.0
    b_std: float = 0.0

    def __call__(self, kernels: Kernels) -> Kernels:
        w, b = self.w_std**2, self.b_std**2
        nngp = w * kernels.nngp + b
        return replace(
            kernels, nngp=nngp, ntk=w * kernels.ntk + nngp, own1=w * kernels.own1 + b, own2=w * kernels.own2 + b
        )


@dataclass(frozen=True)
class LayerNorm(Layer):
    """Normalization over an infinite layer: every input is divided by its own scale."""

    def __call__(self, kernels: Kernels) -> Kernels:
        scale = (kernels.own1[..., :, None] * kernels.own2[..., None, :]).sqrt()
        nngp, ntk = kernels.nngp / scale, kernels.ntk / scale
        own1, own2 = (torch.ones_like(one) for one in (kernels.own1, kernels.own2))
        return replace(kernels, nngp=nngp, ntk=ntk, own1=own1, own2=own2)


@dataclass(frozen=True)
class Flatten(Layer):
    """Flattening, which changes no inner product; of images, equal positions meet."""

    def __call__(self, kernels: Kernels) -> Kernels:
        return _without_space(kernels, lambda pairs: pairs.diagonal(dim1=1, dim2=3).mean(-1))


@dataclass(frozen=True)
class GlobalAvgPool(Layer):
    """The mean over an image's positions, of which every pair meets. Elsewhere it changes nothing."""

    def __call__(self, kernels: Kernels) -> Kernels:
        return _without_space(kernels, lambda pairs: pairs.mean((1, 3)))


@dataclass(frozen=True)
class Conv(Layer):
    """A square convolution of images in NTK parametrization: w/√(channels · area) W ∗ x + b β, zeros beyond the border.

    Source: 1806.07572's recursion for sums over patches; Arora et al. 2019, 1904.11955, section 4.
    """

    kernel_size: int = 3
    stride: int = 1
    padding: int = 0
    w_std: float = 1.0
    b_std: float = 0.0

    def __call__(self, kernels: Kernels) -> Kernels:
        if kernels.space is None:
            raise ValueError("a convolution wants images: put it before Flatten() and GlobalAvgPool()")
        reach = self.kernel_size - 2 * self.padding
        space = tuple((size - reach) // self.stride + 1 for size in kernels.space)
        if min(space) < 1:
            raise ValueError(f"a kernel of {self.kernel_size} leaves nothing of images of {kernels.space}; pad them")
        nngp = self.w_std**2 * self._over_patches(kernels.nngp, kernels.space, space) + self.b_std**2
        ntk = self.w_std**2 * self._over_patches(kernels.ntk, kernels.space, space) + nngp
        own = nngp.diagonal()
        return Kernels(nngp, ntk, own, own, (space[0], space[1]))

    def _over_patches(self, kernel: Tensor, space: tuple[int, int], after: tuple[int, ...]) -> Tensor:
        """Mean over the places in a patch, the same in both images."""
        p = self.padding
        pairs = F.pad(kernel.view(-1, *space, len(kernel) // math.prod(space), *space), (p, p, p, p, 0, 0, p, p, p, p))
        total = pairs.new_zeros(())
        for place in itertools.product(range(self.kernel_size), repeat=2):
            rows, columns = (
                slice(start, start + self.stride * (size - 1) + 1, self.stride)
                for start, size in zip(place, after, strict=True)
            )
            total = total + pairs[:, rows, columns, :, rows, columns]
        return total.reshape(pairs.shape[0] * math.prod(after), -1) / self.kernel_size**2


class Activation(Layer):
    """A function applied to every unit, through its two Gaussian expectations."""

    @abstractmethod
    def expectations(self, s11: Tensor, s12: Tensor, s22: Tensor) -> tuple[Tensor, Tensor]:
        """(E[σ(u)σ(v)], E[σ'(u)σ'(v)]) for (u, v) of covariance [[s11, s12], [s12, s22]]; all broadcast."""

    def __call__(self, kernels: Kernels) -> Kernels:
        s11, s22 = kernels.own1[..., :, None], kernels.own2[..., None, :]
        product, slope = self.expectations(s11, kernels.nngp, s22)
        own1, own2 = (self.expectations(own, own, own)[0] for own in (kernels.own1, kernels.own2))
        return replace(kernels, nngp=product, ntk=kernels.ntk * slope, own1=own1, own2=own2)


@dataclass(frozen=True)
class LeakyRelu(Activation):
    """x above 0, `slope` · x below; −1 gives |x|."""

    slope: float = 0.01

    def expectations(self, s11: Tensor, s12: Tensor, s22: Tensor) -> tuple[Tensor, Tensor]:
        # σ(x) = relu(x) − slope · relu(−x), and the sign of one side flips the correlation.
        one, one_slope = _relu(s11, s12, s22)
        flipped, flipped_slope = _relu(s11, -s12, s22)
        squares, product = 1 + self.slope**2, 2 * self.slope
        return squares * one - product * flipped, squares * one_slope + product * flipped_slope


@dataclass(frozen=True)
class Relu(LeakyRelu):
    """max(x, 0)."""

    slope: float = 0.0


@dataclass(frozen=True)
class Abs(LeakyRelu):
    """|x|."""

    slope: float = -1.0


class Erf(Activation):
    """The error function."""

    def expectations(self, s11: Tensor, s12: Tensor, s22: Tensor) -> tuple[Tensor, Tensor]:
        square = (1 + 2 * s11) * (1 + 2 * s22)
        slope = 4 / math.pi / (square - 4 * s12**2).sqrt()
        return 2 / math.pi * torch.asin(2 * s12 / square.sqrt()), slope


class Identity(Activation):
    """x."""

    def expectations(self, s11: Tensor, s12: Tensor, s22: Tensor) -> tuple[Tensor, Tensor]:
        return s12, torch.ones_like(s12)


class Quadratic(Activation):
    """x²."""

    def expectations(self, s11: Tensor, s12: Tensor, s22: Tensor) -> tuple[Tensor, Tensor]:
        return s11 * s22 + 2 * s12**2, 4 * s12


class Sin(Activation):
    """sin x."""

    def expectations(self, s11: Tensor, s12: Tensor, s22: Tensor) -> tuple[Tensor, Tensor]:
        return _waves(s11, s12, s22)


class Cos(Activation):
    """cos x."""

    def expectations(self, s11: Tensor, s12: Tensor, s22: Tensor) -> tuple[Tensor, Tensor]:
        sines, cosines = _waves(s11, s12, s22)
        return cosines, sines


class Gaussian(Activation):
    """exp(−x²)."""

    def expectations(self, s11: Tensor, s12: Tensor, s22: Tensor) -> tuple[Tensor, Tensor]:
        determinant = (1 + 2 * s11) * (1 + 2 * s22) - 4 * s12**2
        return determinant**-0.5, 4 * s12 * determinant**-1.5


class Gelu(Activation):
    """x Φ(x), exact."""

    def expectations(self, s11: Tensor, s12: Tensor, s22: Tensor) -> tuple[Tensor, Tensor]:
        # Price's theorem: the slopes' expectation is the derivative of the first by the covariance.
        product, pullback, *_ = torch.func.vjp(lambda covariance: _gelu(s11, covariance, s22), s12)
        (slope,) = pullback(torch.ones_like(product))
        return product, slope


@dataclass(frozen=True)
class Elementwise(Activation):
    """Any function by Gauss-Hermite quadrature with `order`² nodes; its slope by differentiation unless given.

    Functions with kinks converge slowly; those above are exact.

    >>> Elementwise(torch.tanh)
    """

    function: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor] | None = None
    order: int = 64

    def expectations(self, s11: Tensor, s12: Tensor, s22: Tensor) -> tuple[Tensor, Tensor]:
        s11, s12, s22 = torch.broadcast_tensors(s11, s12, s22)
        nodes, weights = (torch.from_numpy(one).to(s12) for one in np.polynomial.hermite.hermgauss(self.order))
        nodes, weights = math.sqrt(2) * nodes, weights / math.sqrt(math.pi)
        slope = self.slope or _derivative(self.function)
        # The Cholesky factor of the covariance; at full correlation its last entry is 0.
        along = s12 / s11.clamp_min(torch.finfo(s12.dtype).tiny).sqrt()
        rest = (s22 - along**2).clamp_min(0).sqrt()
        totals = [torch.zeros_like(s12), torch.zeros_like(s12)]
        for node, weight in zip(nodes, weights, strict=True):
            u = (s11.sqrt() * node)[..., None]
            v = (along * node)[..., None] + rest[..., None] * nodes
            for at, function in enumerate((self.function, slope)):
                totals[at] = totals[at] + weight * (function(u) * function(v) * weights).sum(-1)
        return totals[0], totals[1]


def limit_kernels(
    layers: Sequence[Layer],
    x1: Float[Tensor, "*batch n features"] | Float[Tensor, "images channels height width"],
    x2: Float[Tensor, "*batch m features"] | Float[Tensor, "others channels height width"] | None = None,
) -> tuple[Float[Tensor, "*batches rows columns"], Float[Tensor, "*batches rows columns"]]:
    """(NNGP, NTK) of the infinitely wide network: the limits of its outputs' covariance and of its tangent kernel.

    Differentiable, on any device, in the inputs' precision (float64 is worth it: singular kernels want it). With a `Conv`
    or `GlobalAvgPool` among the layers inputs are images, and memory is ((n + m) · positions)².

    Raises ValueError for no layers, or layers that do not fit the inputs.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    >>> limit_kernels([Dense(), Relu(), Dense()], x[:1], x)[1]
    tensor([[0.5000, 0.0796, 0.0000]])
    """
    if not layers:
        raise ValueError("a network needs layers, as in [Dense(), Relu(), Dense()]")
    if any(isinstance(layer, (Conv, GlobalAvgPool)) for layer in layers):
        return _of_images(layers, x1, x2)
    other = x1 if x2 is None else x2
    width = x1.shape[-1]
    own1, own2 = (side.square().sum(-1) / width for side in (x1, other))
    nngp = x1 @ other.mT / width
    kernels = Kernels(nngp, torch.zeros_like(nngp), own1, own2)
    for layer in layers:
        kernels = layer(kernels)
    return kernels.nngp, kernels.ntk


def _of_images(layers: Sequence[Layer], x1: Tensor, x2: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same with a row for each position, of all images with all, so that each side's own kernel is at hand."""
    if x1.ndim != 4:
        raise ValueError(f"convolutions want images (n, channels, height, width), not {tuple(x1.shape)}")
    images = x1 if x2 is None else torch.cat([x1, x2])
    rows = images.flatten(2).transpose(1, 2).flatten(0, 1)
    nngp = rows @ rows.T / rows.shape[1]
    own = nngp.diagonal()
    kernels = Kernels(nngp, torch.zeros_like(nngp), own, own, (images.shape[2], images.shape[3]))
    for layer in layers:
        kernels = layer(kernels)
    if kernels.space is not None:
        raise ValueError("a network of images wants Flatten() or GlobalAvgPool() before its end")
    columns = slice(None) if x2 is None else slice(len(x1), None)
    return kernels.nngp[: len(x1), columns], kernels.ntk[: len(x1), columns]


def _without_space(kernels: Kernels, over_pairs: Callable[[Tensor], Tensor]) -> Kernels:
    """Kernels of whole examples, from pairs of positions (n, positions, m, positions)."""
    if kernels.space is None:
        return kernels
    area = math.prod(kernels.space)
    nngp, ntk = (over_pairs(one.view(-1, area, one.shape[1] // area, area)) for one in (kernels.nngp, kernels.ntk))
    return Kernels(nngp, ntk, nngp.diagonal(), nngp.diagonal())


def _relu(s11: Tensor, s12: Tensor, s22: Tensor) -> tuple[Tensor, Tensor]:
    scale = (s11 * s22).sqrt()
    cosine = (s12 / scale.clamp_min(torch.finfo(scale.dtype).tiny)).clamp(-1, 1)
    # At full correlation the sine is 0, where its root has no slope: keep that out of the graph.
    square = 1 - cosine**2
    sine = torch.where(square > 0, square.where(square > 0, torch.ones_like(square)).sqrt(), 0.0)
    angle = math.pi - torch.atan2(sine, cosine)
    return scale / (2 * math.pi) * (sine + angle * cosine), angle / (2 * math.pi)


def _waves(s11: Tensor, s12: Tensor, s22: Tensor) -> tuple[Tensor, Tensor]:
    """(E[sin u sin v], E[cos u cos v])."""
    middle = (s11 + s22) / 2
    near, far = torch.exp(s12 - middle), torch.exp(-s12 - middle)
    return (near - far) / 2, (near + far) / 2


def _gelu(s11: Tensor, s12: Tensor, s22: Tensor) -> Tensor:
    """E[u Φ(u) v Φ(v)] = E[u v; a > 0, b > 0] with a = u − z, b = v − z' for independent standard normal z, z'."""
    a, b = 1 + s11, 1 + s22
    determinant = a * b - s12**2
    r = s12 / (a * b).sqrt()
    root = (1 - r**2).sqrt()
    quadrant = 0.25 + torch.asin(r) / (2 * math.pi)
    square_of_a = a * (quadrant + r * root / (2 * math.pi))
    square_of_b = b * (quadrant + r * root / (2 * math.pi))
    both = (a * b).sqrt() * (r * quadrant + root / (2 * math.pi))
    # Given (a, b), u and v have means linear in them and a constant covariance.
    u_a, u_b = (s11 * b - s12**2) / determinant, s12 / determinant
    v_a, v_b = s12 / determinant, (s22 * a - s12**2) / determinant
    rest = s12 - u_a * s12 - u_b * s22
    return u_a * v_a * square_of_a + u_b * v_b * square_of_b + (u_a * v_b + u_b * v_a) * both + rest * quadrant


def _derivative(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def slope(x: Tensor) -> Tensor:
        _, pullback, *_ = torch.func.vjp(function, x)
        (derivative,) = pullback(torch.ones_like(x))
        return derivative  # type: ignore[no-any-return]

    return slope
