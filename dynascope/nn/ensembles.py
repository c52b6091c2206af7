"""Many networks of one shape trained at once, and the moments of what they say."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap


class TwoLayerNet(nn.Module):
    """A two-layer ReLU network, k inputs to k outputs, in the parametrization of the theory or of common practice.

    "ntk": w/√n · W₂ relu(w/√k · W₁ x) with standard normal weights, so that both layers learn at one pace. "standard":
    weights drawn with those scales and used as they are, where the second layer's gradient outweighs the first's by the
    width: training is then regression on fixed random features. `b_std` above 0 adds biases (zeros at first in
    "standard"). Source: 2502.16763, section 3 (NTKMLP2).

    >>> TwoLayerNet(5, width=2048)(torch.eye(5)).shape
    torch.Size([5, 5])
    """

    def __init__(
        self, k: int, width: int, *, parametrization: str = "ntk", w_std: float = 1.0, b_std: float = 0.0
    ) -> None:
        if parametrization not in ("ntk", "standard"):
            raise ValueError(f"parametrization is ntk or standard, not {parametrization!r}")
        super().__init__()
        scales = w_std / math.sqrt(k), w_std / math.sqrt(width)
        is_ntk = parametrization == "ntk"
        self.scales = scales if is_ntk else (1.0, 1.0)
        self.bias_scale = b_std if is_ntk else 1.0
        init = (1.0, 1.0) if is_ntk else scales
        self.first = nn.Parameter(init[0] * torch.randn(width, k))
        self.second = nn.Parameter(init[1] * torch.randn(k, width))
        has_bias = b_std > 0
        start = torch.randn if is_ntk else torch.zeros
        self.first_bias = nn.Parameter(start(width)) if has_bias else None
        self.second_bias = nn.Parameter(start(k)) if has_bias else None

    def forward(self, x: Float[Tensor, "batch k"]) -> Float[Tensor, "batch k"]:
        hidden = self._add(self.scales[0] * (x @ self.first.T), self.first_bias).relu()
        return self._add(self.scales[1] * (hidden @ self.second.T), self.second_bias)

    def _add(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return x if bias is None else x + self.bias_scale * bias


@dataclass
class RunningMoments:
    """Mean and variance of outputs over networks, without keeping the outputs (Welford's method, in float64).

    >>> moments = RunningMoments()
    >>> moments.update(torch.randn(100, 3))
    >>> moments.mean, moments.variance
    """

    count: int = 0
    mean: Tensor | None = None
    squares: Tensor | None = None
    """Sum of squared distances from the mean."""

    def update(self, outputs: Shaped[Tensor, "networks ..."]) -> None:
        """Take in the outputs of some more networks."""
        outputs = outputs.detach().double()
        mean = outputs.mean(0)
        self.merge(RunningMoments(len(outputs), mean, (outputs - mean).square().sum(0)))

    def merge(self, other: "RunningMoments") -> None:
        """Take in what others saw."""
        if other.mean is None or other.squares is None:
            return
        if self.mean is None or self.squares is None:
            self.count, self.mean, self.squares = other.count, other.mean, other.squares
            return
        total = self.count + other.count
        gap = other.mean - self.mean
        self.mean = self.mean + gap * other.count / total
        self.squares = self.squares + other.squares + gap.square() * self.count * other.count / total
        self.count = total

    def all_reduce(self) -> None:
        """Merge over all processes of torch.distributed; every one of them must have seen some."""
        assert self.mean is not None
        assert self.squares is not None
        sums = torch.stack([self.mean * self.count, self.squares + self.mean.square() * self.count])
        count = torch.tensor(float(self.count), dtype=torch.float64, device=sums.device)
        torch.distributed.all_reduce(sums)
        torch.distributed.all_reduce(count)
        self.count, self.mean = int(count), sums[0] / count
        self.squares = sums[1] - self.mean.square() * count

    @property
    def variance(self) -> Tensor:
        """Unbiased; NaN for fewer than two networks."""
        if self.squares is None:
            raise ValueError("no outputs were taken in yet")
        return self.squares / (self.count - 1) if self.count > 1 else torch.full_like(self.squares, math.nan)


def train_ensemble(
    factory: Callable[[], nn.Module],
    x: Shaped[Tensor, "examples ..."],
    y: Shaped[Tensor, "examples ..."],
    inputs: Shaped[Tensor, "others ..."],
    num_networks: int,
    *,
    lr: float,
    num_steps: int,
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    at_once: int = 64,
    stop: Callable[[RunningMoments], bool] | None = None,
) -> Iterator[Float[Tensor, "networks others ..."]]:
    """Networks trained by full-batch gradient descent, `at_once` side by side; yields what each says of `inputs`.

    `loss_fn` is of one network's outputs and `y` (default: half the sum of squares). `stop` is asked after each portion
    with the moments so far, on examples held out from what it judges, and ends the training of further ones. Every
    network starts from a draw of `factory()`. A `TwoLayerNet` without biases is trained by `descend_two_layers`.

    Raises ValueError when training diverges.

    >>> outputs = torch.cat(list(train_ensemble(lambda: TwoLayerNet(5, 512), x, y, x, 256, lr=1.0, num_steps=60)))
    """
    measure = loss_fn or (lambda outputs, targets: 0.5 * (outputs - targets).square().sum())
    moments = RunningMoments()
    for first in range(0, num_networks, at_once):
        networks = [factory() for _ in range(min(at_once, num_networks - first))]
        states, buffers = stack_module_state(networks)
        skeleton = copy.deepcopy(networks[0]).to("meta")

        def outputs_on(
            data: Tensor,
            states: dict[str, Tensor] = states,
            buffers: dict[str, Tensor] = buffers,
            model: nn.Module = skeleton,
        ) -> Tensor:
            call: Tensor = vmap(lambda state, own: functional_call(model, (state, own), (data,)))(states, buffers)
            return call

        one = networks[0]
        if loss_fn is None and isinstance(one, TwoLayerNet) and one.first_bias is None:
            descend_two_layers(states["first"], states["second"], one.scales, x, y, lr=lr, num_steps=num_steps)
        else:
            optimizer = torch.optim.SGD(states.values(), lr=lr)
            for _ in range(num_steps):
                optimizer.zero_grad()
                vmap(measure, in_dims=(0, None))(outputs_on(x), y).sum().backward()
                optimizer.step()
        with torch.no_grad():
            ends = outputs_on(inputs)
        if not bool(torch.isfinite(ends).all()):
            raise ValueError(f"training diverged at lr={lr:g}; see dynascope.kernels.max_learning_rate")
        yield ends
        moments.update(ends)
        if stop is not None and stop(moments):
            return


@torch.no_grad()
def descend_two_layers(
    first: Float[Tensor, "networks width k"],
    second: Float[Tensor, "networks outputs width"],
    scales: tuple[float, float],
    x: Float[Tensor, "examples k"],
    y: Float[Tensor, "examples outputs"],
    *,
    lr: float,
    num_steps: int,
) -> None:
    """Steps of gradient descent on half the sum of squares of s₂ W₂ relu(s₁ W₁ x) - y, in place and without a graph.

    `scales` are (s₁, s₂). At unit inputs, all of `x` in 2502.16763, W₁ x is W₁ itself, and costs nothing.

    >>> descend_two_layers(net.first[None], net.second[None], net.scales, torch.eye(5), y, lr=1.0, num_steps=60)
    """
    scale, is_unit = scales[0] * scales[1], x.shape[0] == x.shape[1] and torch.equal(x, torch.eye(len(x)).to(x))
    columns = first.mT.contiguous()
    for _ in range(num_steps):
        before = columns if is_unit else x @ columns
        hidden = before.relu()
        residual = scale * (hidden @ second.mT) - y
        slopes = (residual @ second) * (before > 0)
        second.baddbmm_(residual.mT, hidden, alpha=-lr * scale)
        columns.sub_(slopes if is_unit else x.T @ slopes, alpha=lr * scale)
    first.copy_(columns.mT)


@torch.no_grad()
def last_layer_limit(
    network: TwoLayerNet,
    x: Float[Tensor, "examples k"],
    y: Float[Tensor, "examples outputs"],
    inputs: Float[Tensor, "others k"],
) -> Float[Tensor, "others outputs"]:
    """What a network says of `inputs` when training of its last layer alone has come to its end: one solve, no steps.

    In the standard parametrization at large width this is where training both layers ends, too: regression on the random
    features of the first. Raises ValueError for a network with biases. Source: 2502.16763, experiments.

    >>> last_layer_limit(TwoLayerNet(5, 2048, parametrization="standard"), torch.eye(5), y, inputs)
    """
    if network.first_bias is not None:
        raise ValueError("a network with biases has no such closed form here; take b_std=0")
    features, others = ((one @ network.first.T).relu() for one in (x, inputs))
    share = torch.linalg.solve(features @ features.T, features @ others.T)
    said: Tensor = network(inputs) + share.T @ (y - network(x))
    return said
