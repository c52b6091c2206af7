"""What a constant kernel predicts of training: the network in function space, in closed form (1806.07572).

With cost C = (scale / 2) Σ ‖f − y‖² and learning rate lr, the outputs on the training set obey df/dt = −c Θ (f − y) with
c = lr · scale. `scale` is 1/n for a mean over examples, 1 for a sum, 2/n for `F.mse_loss` with one output.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dynascope.kernels.empirical import Readout, ntk, ntk_vp
from dynascope.kernels.layerwise import called

Times: TypeAlias = int | float | Sequence[float] | Sequence[int] | Float[Tensor, " times"]
"""Steps of training, or units of time; inf is its end."""


@dataclass(frozen=True)
class KernelTraining:
    """Training of outputs `y` under a constant kernel: predictions at any time from one eigendecomposition.

    Args:
        kernel: Θ on the training set, (n, n), shared by all outputs.
        y: Targets (n, outputs).
        start: The outputs before training, f₀ (default: zeros).
        rate: c = lr · scale: what multiplies Θ in a step, or in a unit of time.
        is_discrete: Gradient descent in steps, (I − cΘ)ᵗ, instead of its flow, exp(−cΘt).
        ridge: Added to the kernel's diagonal, as a share of its mean.
        momentum: Of steps as `torch.optim.SGD` takes them; their number is then whole.

    Raises ValueError when shapes do not fit, when the rate is beyond the largest stable one, and for momentum that is not
    below 1, or of a flow.

    >>> training = KernelTraining(torch.eye(2), torch.ones(2, 1), rate=1.0)
    >>> training.at(math.inf)
    tensor([[1.], [1.]])
    """

    kernel: Float[Tensor, "n n"]
    y: Float[Tensor, "n outputs"]
    start: Float[Tensor, "n outputs"] | None = None
    rate: float = 1.0
    is_discrete: bool = False
    ridge: float = 0.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ValueError(f"rate={self.rate} must be above 0")
        if not 0 <= self.momentum < 1 or (self.momentum and not self.is_discrete):
            raise ValueError(
                f"momentum={self.momentum} must lie between 0 and 1, and above 0 only with is_discrete=True"
            )
        largest, most = float(self._eigen[0][-1]), 2 * (1 + self.momentum)
        if self.is_discrete and self.rate * largest >= most:
            told = f"rate={self.rate:g} diverges: steps are stable below {most / largest:g} "
            raise ValueError(told + f"({most:g} over the largest eigenvalue)")

    def at(self, times: Times) -> Float[Tensor, "*times n outputs"]:
        """The outputs on the training set after that many steps (or that much time); inf is the end of training."""
        return self.y - self._basis(self._decay(times) * self._error)

    def elsewhere(
        self,
        cross: Float[Tensor, "m n"],
        times: Times,
        start: Float[Tensor, "m outputs"] | None = None,
    ) -> Float[Tensor, "*times m outputs"]:
        """The outputs on other inputs, from the kernel `cross` between them and the training set, and their own f₀."""
        moved = cross @ self._basis(self._gain(times) * self._error)
        return -moved if start is None else start - moved

    def mode_errors(self, times: Times) -> Float[Tensor, "*times n outputs"]:
        """The error f − y along each eigenvector, by ascending eigenvalue: each decays on its own."""
        return -self._decay(times) * self._error

    @property
    def eigenvalues(self) -> Float[Tensor, " n"]:
        """Of the kernel, ascending."""
        return self._eigen[0]

    @property
    def eigenvectors(self) -> Float[Tensor, "n n"]:
        """One a column."""
        return self._eigen[1]

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        kernel = self.kernel
        if self.ridge:
            kernel = kernel + self.ridge * kernel.diagonal().mean() * torch.eye(len(kernel)).to(kernel)
        values, vectors = torch.linalg.eigh(kernel)
        return values, vectors

    @cached_property
    def _error(self) -> Tensor:
        """y − f₀ along each eigenvector."""
        gap = self.y if self.start is None else self.y - self.start
        return self.eigenvectors.T @ gap

    def _basis(self, along: Tensor) -> Tensor:
        return self.eigenvectors @ along

    def _decay(self, times: Times) -> Tensor:
        left = decay(self.eigenvalues, times, self.rate, is_discrete=self.is_discrete, momentum=self.momentum)
        return left[..., None]

    def _gain(self, times: Times) -> Tensor:
        """−(1 − decay) / eigenvalue, whose limit at an eigenvalue of 0 is that of no movement at infinite time."""
        values = self.eigenvalues
        is_live = values > _floor(values)
        learnt = 1 - self._decay(times)[..., 0]
        return -torch.where(is_live, learnt / torch.where(is_live, values, 1.0), 0.0)[..., None]


def _floor(values: Tensor) -> Tensor:
    """Below it an eigenvalue is rounding."""
    return values[-1].clamp_min(0) * len(values) * torch.finfo(values.dtype).eps


def decay(
    eigenvalues: Float[Tensor, " n"], times: Times, rate: float, *, is_discrete: bool = False, momentum: float = 0.0
) -> Float[Tensor, "*times n"]:
    """What is left of the error along each eigenvector: exp(−cλt), or (1 − cλ)ᵗ in discrete steps.

    Directions whose eigenvalue is zero to rounding are never learnt. Raises ValueError for parts of steps with momentum.

    >>> decay(torch.tensor([0.0, 1.0]), math.inf, 1.0)
    tensor([1., 0.])
    """
    time = torch.as_tensor(times, dtype=eigenvalues.dtype, device=eigenvalues.device)[..., None]
    is_live = eigenvalues > _floor(eigenvalues)
    speed = rate * torch.where(is_live, eigenvalues, 0.0)
    if momentum:
        return _with_momentum(speed, time[..., 0], momentum)
    if is_discrete:
        left = (1 - speed).abs() ** time
        is_odd = (1 - speed < 0) & torch.isfinite(time) & (time % 2 == 1)
        left = torch.where(is_odd, -left, left)
    else:
        left = torch.exp(-torch.where(torch.isfinite(time), speed * time, torch.where(speed > 0, math.inf, 0.0)))
    return torch.where(is_live, left, 1.0)


def _with_momentum(speed: Tensor, steps: Tensor, momentum: float) -> Tensor:
    """The errors of this step and the one before are turned by one matrix a step: e' = e − cλ e + β (e − e_before)."""
    if bool((steps != steps.round()).any()):
        raise ValueError("with momentum, times are whole numbers of steps")
    rows = [torch.stack([1 + momentum - speed, torch.full_like(speed, -momentum)], -1), torch.eye(2)[:1].to(speed)]
    turn = torch.stack([rows[0], rows[1].expand_as(rows[0])], -2)
    left = [
        (speed == 0).to(speed) if math.isinf(step) else torch.linalg.matrix_power(turn, int(step))[:, 0].sum(-1)
        for step in steps.flatten().tolist()
    ]
    return torch.stack(left).view(*steps.shape, -1)


def predict_ensemble(
    ntk_train: Float[Tensor, "n n"],
    nngp_train: Float[Tensor, "n n"],
    ntk_cross: Float[Tensor, "m n"],
    nngp_cross: Float[Tensor, "m n"],
    nngp_test: Float[Tensor, "m m"],
    y: Float[Tensor, "n outputs"],
    times: Times = math.inf,
    *,
    rate: float = 1.0,
    is_discrete: bool = False,
) -> tuple[Float[Tensor, "*times m outputs"], Float[Tensor, "*times m m"]]:
    """Mean and covariance, over initializations, of infinitely wide trained networks: a Gaussian an output.

    With A = Θ_xX Θ⁻¹ (I − e^{−cΘt}): mean A y, covariance K_xx + A K_XX Aᵀ − (A K_Xx + its transpose). Training the last
    layer alone is the same with the NNGP kernel in Θ's place. Source: 1806.07572; Lee et al., 1902.06720.

    >>> mean, covariance = predict_ensemble(ntk, nngp, ntk_cross, nngp_cross, nngp_test, y)
    """
    identity = torch.eye(len(ntk_train)).to(ntk_train)
    training = KernelTraining(ntk_train, identity, rate=rate, is_discrete=is_discrete)
    operator = training.elsewhere(ntk_cross, times)
    mean = operator @ y
    mixed = operator @ nngp_cross.T
    covariance = nngp_test + operator @ nngp_train @ operator.mT - mixed - mixed.mT
    return mean, covariance


@dataclass(frozen=True)
class GPEnsemble:
    """An ensemble of infinitely wide trained networks: outputs drawn from their Gaussian, with no training.

    >>> mean, covariance = predict_ensemble(…)
    >>> GPEnsemble(mean, covariance).sample(100, generator).shape  # (100, inputs, outputs)
    """

    mean: Float[Tensor, "m outputs"]
    covariance: Float[Tensor, "m m"]
    """Of one output at the inputs; outputs are independent and share it."""

    def sample(
        self, num_networks: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "networks m outputs"]:
        """What so many networks say. A covariance that is singular to rounding is drawn from as it is."""
        values, vectors = torch.linalg.eigh(self.covariance)
        root = vectors * values.clamp_min(0).sqrt()
        shape = num_networks, *self.mean.shape
        noise = torch.randn(shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        drawn: Tensor = self.mean + root @ noise
        return drawn


def predict_ode(
    kernel: Float[Tensor, "n n"],
    loss: Callable[[Float[Tensor, "n outputs"]], Float[Tensor, ""]],
    start: Float[Tensor, "n outputs"],
    times: Sequence[float],
    *,
    rate: float = 1.0,
    rtol: float = 1e-6,
) -> Float[Tensor, "times n outputs"]:
    """Outputs on the training set under any loss of them, for which there is no closed form: df/dt = −c Θ ∂loss/∂f solved.

    `loss` is given the outputs in double precision, on the CPU; `times` ascend from 0 on. Raises RuntimeError when the
    solver gives up. Source: 1806.07572, section 4.

    >>> predict_ode(torch.eye(2), lambda f: F.huber_loss(f, y, reduction="sum"), torch.zeros(2, 1), [0.0, 10.0])
    """
    from scipy.integrate import solve_ivp

    matrix, first = kernel.double().cpu().numpy(), start.double().cpu().numpy()

    def velocity(_: float, flat: np.ndarray) -> np.ndarray:
        outputs = torch.tensor(flat.reshape(first.shape), requires_grad=True)
        (slope,) = torch.autograd.grad(loss(outputs), [outputs])
        return np.ravel(-rate * matrix @ slope.numpy())

    solved = solve_ivp(velocity, (0.0, max(times)), first.ravel(), t_eval=list(times), rtol=rtol, atol=1e-9)
    if not solved.success:
        raise RuntimeError(f"the flow could not be solved: {solved.message}")
    return torch.from_numpy(solved.y.T.reshape(len(times), *first.shape)).to(start)


def predict_cross_entropy(
    kernel: Float[Tensor, "n n"],
    labels: Float[Tensor, "n classes"],
    times: Sequence[float],
    *,
    start: Float[Tensor, "n classes"] | None = None,
    rate: float = 1.0,
    rtol: float = 1e-6,
) -> Float[Tensor, "times n classes"]:
    """Logits on the training set under cross-entropy with `labels` as shares: df/dt = −c Θ (softmax f − y) solved.

    Start (default: zeros), times and errors as in `predict_ode`.

    >>> predict_cross_entropy(torch.eye(2), torch.eye(2), [0.0, 10.0])
    """
    targets, first = labels.double().cpu(), torch.zeros_like(labels) if start is None else start
    loss = lambda logits: F.cross_entropy(logits, targets, reduction="sum")  # noqa: E731
    return predict_ode(kernel, loss, first, times, rate=rate, rtol=rtol)


def max_learning_rate(kernel: Float[Tensor, "n n"], scale: float, momentum: float = 0.0) -> float:
    """The largest stable learning rate of full-batch gradient descent on (scale / 2) Σ (f − y)²: 2 / (scale · λ_max).

    With momentum β it is (1 + β) times that.

    >>> max_learning_rate(torch.eye(2), scale=0.5)
    4.0
    """
    return 2 * (1 + momentum) / (scale * float(torch.linalg.eigvalsh(kernel)[-1]))


def mode_times(
    kernel: Float[Tensor, "n n"], y: Float[Tensor, "n outputs"], rate: float = 1.0
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """How fast each part of the labels is learnt: half-lives ln 2 / (cλ), eigenvalues, and the labels' share in each.

    By descending eigenvalue: what is learnt first stands first.

    >>> half_lives, eigenvalues, shares = mode_times(torch.eye(2), torch.ones(2, 1))
    """
    values, vectors = torch.linalg.eigh(kernel)
    values, vectors = values.flip(0), vectors.flip(1)
    shares = (vectors.T @ y).square().sum(1) / y.square().sum()
    return math.log(2) / (rate * values.clamp_min(0)), values, shares


def kernel_regression(
    kernel: Float[Tensor, "n n"],
    y: Float[Tensor, "n outputs"],
    cross: Float[Tensor, "m n"],
    *,
    start: Float[Tensor, "n outputs"] | None = None,
    start_elsewhere: Float[Tensor, "m outputs"] | None = None,
    ridge: float = 0.0,
) -> Float[Tensor, "m outputs"]:
    """Where lazy training ends: f₀ + Θ_xX Θ_XX⁻¹ (y − f₀); singular kernels are inverted where they can be.

    >>> kernel_regression(torch.eye(2), torch.ones(2, 1), torch.eye(2))
    tensor([[1.], [1.]])
    """
    return KernelTraining(kernel, y, start, ridge=ridge).elsewhere(cross, math.inf, start_elsewhere)


def kernel_regression_baseline(
    model: nn.Module,
    x: Any,
    y: Float[Tensor, "n outputs"],
    x_test: Any,
    *,
    ridge: float = 0.0,
    readout: Readout | None = None,
) -> Float[Tensor, "m outputs"]:
    """What the model would say of `x_test` if it were trained to the end with its present features: the lazy plateau.

    All outputs share the mean of their kernels, as they do at infinite width. Source: 2310.06110, section 3.

    >>> plateau = F.mse_loss(kernel_regression_baseline(model, x, y, x_test), y_test)
    """
    read = readout or (lambda outputs: outputs)
    with torch.no_grad():
        start, elsewhere = (read(called(model, inputs)).reshape(-1, y.shape[1]) for inputs in (x, x_test))
    kernel, cross = (
        ntk(model, *pair, output="trace", readout=readout, dtype=torch.float64) for pair in ((x, None), (x_test, x))
    )
    found = kernel_regression(
        kernel, y.double(), cross, start=start.double(), start_elsewhere=elsewhere.double(), ridge=ridge
    )
    return found.to(y)


def ntk_solve(
    model: nn.Module,
    x: Any,
    y: Float[Tensor, "n ..."],
    *,
    ridge: float = 1e-6,
    readout: Readout | None = None,
    max_iterations: int = 1000,
    on_fail: Literal["raise", "best"] = "raise",
) -> Float[Tensor, "n ..."]:
    """(Θ + ridge · I)⁻¹ y without the kernel, by conjugate gradients over kernel-vector products: for many examples.

    Raises RuntimeError when it does not converge in `max_iterations`, unless `on_fail="best"`.

    >>> weights = ntk_solve(model, images, targets)
    """
    from scipy.sparse.linalg import LinearOperator, cg

    def product(flat: np.ndarray) -> np.ndarray:
        vector = torch.as_tensor(flat, dtype=y.dtype, device=y.device).view(y.shape)
        image = ntk_vp(model, x, vector, readout=readout) + ridge * vector
        return image.detach().flatten().double().cpu().numpy()

    operator = LinearOperator((y.numel(), y.numel()), matvec=product, dtype=np.float64)
    solved, status = cg(operator, y.detach().flatten().double().cpu().numpy(), maxiter=max_iterations)
    if status and on_fail == "raise":
        raise RuntimeError(f"conjugate gradients did not converge in {max_iterations} products; try a larger ridge")
    return torch.as_tensor(solved, dtype=y.dtype, device=y.device).view(y.shape)
