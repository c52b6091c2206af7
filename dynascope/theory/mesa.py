"""What next-token training makes of linear attention on autoregressive processes: one step of gradient descent (2405.16845)."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from dynascope.nn.linear_attention import LinearCausalAttention, causal_linear_attention


@dataclass(frozen=True)
class Moments:
    """κ₁ = E x_j⁴, κ₂ = E x_j⁶ and κ₃ = Σ_{r≠j} E x_j² x_r⁴ of the first token, and their standard errors if estimated."""

    k1: float
    k2: float
    k3: float
    errors: tuple[float, float, float] = (0.0, 0.0, 0.0)


def law_moments(law: str, dim: int, scale: float = 1.0) -> Moments:
    """The moments of the laws that `ARProcess` knows by name.

    Raises ValueError for another law.

    >>> law_moments("gaussian", 5).k2
    15.0
    """
    four, six = scale**4, scale**6
    if law == "gaussian":
        return Moments(3 * four, 15 * six, 3 * (dim - 1) * six)
    if law == "sparse":
        return Moments(four / dim, six / dim, 0.0)
    if law == "ones":
        return Moments(four, six, (dim - 1) * six)
    raise ValueError(f"law is gaussian, sparse or ones, not {law!r}; for a sample use estimate_moments")


def estimate_moments(first: Float[Tensor, "count dim"]) -> Moments:
    """The moments from a sample of first tokens, averaged over coordinates, with standard errors.

    >>> estimate_moments(torch.randn(100_000, 5)).k1  # about 3
    """
    squares = first.double().square()
    fourth = squares.square()
    parts = (fourth, squares * fourth, squares * (fourth.sum(1, keepdim=True) - fourth))
    means = [part.mean(1) for part in parts]
    errors = [float(mean.std() / math.sqrt(len(first))) for mean in means]
    k1, k2, k3 = (float(mean.mean()) for mean in means)
    return Moments(k1, k2, k3, (errors[0], errors[1], errors[2]))


def ab_star(moments: Moments, length: int) -> float:
    """The product of the two scalars that training from a diagonal start converges to (2405.16845, Theorem 4.1).

    Raises ValueError for fewer than three tokens.

    >>> ab_star(law_moments("sparse", 5, scale=2.0), 100)
    0.25
    """
    if length < 3:
        raise ValueError(f"length={length} must be at least 3")
    return moments.k1 / (moments.k2 + moments.k3 * _harmonic(length) / (length - 2))


def reduced_loss(ab: Float[Tensor, "..."], moments: Moments, dim: int, length: int, mean_square: float) -> Tensor:
    """The population loss of a diagonal model as a function of a·b; `mean_square` is E x_j².

    >>> reduced_loss(torch.tensor(1.0), law_moments("sparse", 5), 5, 100, 1 / 5)
    tensor(0.)
    """
    linear, square = (length - 2) * moments.k1, (length - 2) * moments.k2 + moments.k3 * _harmonic(length)
    total: Tensor = dim / 2 * ((length - 2) * mean_square - 2 * ab * linear + ab**2 * square)
    return total


def mesa_flow(
    a0: float, b0: float, moments: Moments, dim: int, length: int, times: Any, *, rtol: float = 1e-10
) -> tuple[Float[np.ndarray, " times"], Float[np.ndarray, " times"]]:
    """The two scalars under gradient flow, at ascending times; a² − b² is conserved on the way (2405.16845, Lemma 5.3).

    Raises RuntimeError when the solver gives up.

    >>> a, b = mesa_flow(0.1, 0.1, law_moments("sparse", 3), 3, 20, [0.0, 10.0])
    """
    from scipy.integrate import solve_ivp

    times = np.asarray(times, float)
    linear, square = (length - 2) * moments.k1, (length - 2) * moments.k2 + moments.k3 * _harmonic(length)

    def velocity(_: float, state: np.ndarray) -> list[float]:
        a, b = state
        pull = dim * (linear - a * b * square)
        return [b * pull, a * pull]

    solved = solve_ivp(velocity, (0.0, float(times[-1])), [a0, b0], t_eval=times, rtol=rtol, atol=1e-12, method="LSODA")
    if not solved.success:
        raise RuntimeError(f"the flow could not be solved: {solved.message}")
    return solved.y[0], solved.y[1]


class FullBatchLoss:
    """`model.loss(x)` of a fixed set of sequences for any `LinearCausalAttention`, from moments that are taken once.

    Predictions are linear in the products pv[i, a] · kq[b, c], with features E_t[a, b] e_t[c] / (t − 1) of the data; so the
    loss is a quadratic form in these products, and a step of full-batch descent no longer sees the data. One pass over
    it costs (2 dim)⁶ operations a position, each loss dim · (2 dim)⁶. Sums are kept in complex double precision.

    >>> loss = FullBatchLoss(process.sample(4000, generator))
    >>> loss(model).backward()
    """

    def __init__(self, x: Shaped[Tensor, "batch length dim"], chunk: int = 256) -> None:
        width = 2 * x.shape[2]
        self.moment = torch.zeros(width**3, width**3, dtype=torch.complex128)
        self.cross = torch.zeros(width**3, x.shape[2], dtype=torch.complex128)
        for part in x.split(chunk):
            before = torch.cat([torch.zeros_like(part[:, :1]), part[:, :-1]], dim=1)
            tokens = torch.cat([part, before], dim=2)
            seen = torch.einsum("bta,btc->btac", tokens, tokens.conj()).cumsum(1)[:, 1:-1]
            features = torch.einsum("btac,btq->btacq", seen, tokens[:, 1:-1]).flatten(2)
            features = (features / torch.arange(1, x.shape[1] - 1)[:, None]).flatten(0, 1)
            self.moment += features.T @ features.conj()
            self.cross += features.T @ part[:, 2:].flatten(0, 1).conj()
        self.moment, self.cross = self.moment / len(x), self.cross / len(x)
        self.constant = x[:, 2:].abs().double().square().sum() / len(x)

    def __call__(self, model: LinearCausalAttention) -> Float[Tensor, ""]:
        products = torch.einsum("ia,bq->iabq", model.pv, model.kq).flatten(1).to(torch.complex128)
        square = ((products @ self.moment) * products.conj()).sum().real
        total: Tensor = 0.5 * (square - 2 * (products * self.cross.T).sum().real + self.constant)
        return total


def mesa_gd_predict(x: Shaped[Tensor, "batch length dim"], step: float) -> Shaped[Tensor, "batch predictions dim"]:
    """Predictions of x_3 … x_T by one explicit step of gradient descent, from zero, on the least squares of the context.

    At position t the step is step/(t−1) on ½ Σ_{i<t} ‖x_{i+1} − W x_i‖² (2405.16845, eq. 7). Time is linear in T.

    >>> mesa_gd_predict(ARProcess(3, 20).sample(8, generator), step=0.2).shape
    torch.Size([8, 18, 3])
    """
    length = x.shape[1]
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
    attended = causal_linear_attention(x, before, x)[:, 1:-1]
    return step * attended / torch.arange(1, length - 1, device=x.device)[:, None]


def ols_predict(x: Shaped[Tensor, "batch length dim"], ridge: float = 1e-6) -> Shaped[Tensor, "batch predictions dim"]:
    """Predictions of x_3 … x_T by the whole least squares solution of the context, for comparison.

    >>> ols_predict(ARProcess(3, 20).sample(8, generator)).shape
    torch.Size([8, 18, 3])
    """
    earlier, later = x[:, :-1], x[:, 1:]
    moved = torch.einsum("bti,btj->btij", later, earlier.conj()).cumsum(1)[:, :-1]
    own = torch.einsum("bti,btj->btij", earlier, earlier.conj()).cumsum(1)[:, :-1]
    own = own + ridge * torch.eye(x.shape[2], dtype=x.dtype, device=x.device)
    return torch.einsum("btij,btj->bti", moved, torch.linalg.solve(own, x[:, 1:-1, :, None])[..., 0])


@dataclass(frozen=True)
class EffectiveStep:
    """How well a model's predictions are one step of gradient descent on its context."""

    step: Tensor
    """The best single step size: real part of the regression of the model's predictions on those of a unit step."""
    residual: Tensor
    """Share of the predictions' square that is left: 0 for exactly one step."""
    preconditioner: Tensor
    """The matrix P (dim, dim) for which predictions are best W_unit P x."""
    preconditioned_residual: Tensor
    """Share that is left with it."""


class GDStepFit:
    """Fits predictions of x_3 … x_T by one step of gradient descent on fixed sequences, whose part is worked out once.

    Memory: batch · length · dim³ numbers. Each fit costs two passes over them.

    >>> fit = GDStepFit(x)
    >>> fit(model(x)).residual  # near 0: the model is a one-step learner
    """

    def __init__(self, x: Shaped[Tensor, "batch length dim"]) -> None:
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        outer = torch.einsum("bti,btj->btij", x, before.conj()).cumsum(1)[:, 1:-1]
        outer = outer / torch.arange(1, x.shape[1] - 1, device=x.device)[:, None, None]
        # predictions = W_unit P x is linear in P: one column of the design an entry.
        design = torch.einsum("btij,btk->btijk", outer, x[:, 1:-1]).flatten(0, 2).flatten(1)
        left, sizes, right = torch.linalg.svd(design, full_matrices=False)
        # Laws with few nonzero coordinates leave entries of P undetermined; it is then the smallest.
        known = sizes > sizes[0] * torch.finfo(sizes.dtype).eps * max(design.shape)
        self.dim, self.basis = x.shape[2], left[:, known]
        self.from_basis = right[known].mH / sizes[known]
        self.unit = mesa_gd_predict(x, 1.0).flatten()

    def __call__(self, predictions: Shaped[Tensor, "batch positions dim"]) -> EffectiveStep:
        """The best step and the best preconditioner for these predictions."""
        flat = predictions.flatten()
        power = flat.abs().square().sum()
        step = torch.vdot(self.unit, flat).real / self.unit.abs().square().sum()
        along = self.basis.mH @ flat
        return EffectiveStep(
            step,
            (flat - step * self.unit).abs().square().sum() / power,
            (self.from_basis @ along).view(self.dim, self.dim),
            (flat - self.basis @ along).abs().square().sum() / power,
        )


def effective_gd_step(
    predictions: Shaped[Tensor, "batch positions dim"], x: Shaped[Tensor, "batch length dim"]
) -> EffectiveStep:
    """Fit any sequence model's predictions of x_3 … x_T by one step of gradient descent, plain and preconditioned.

    `GDStepFit` does the same for several models or times on the same sequences.

    >>> effective_gd_step(model(x), x).residual  # near 0: the model is a one-step learner
    """
    return GDStepFit(x)(predictions)


def off_diagonal_share(block: Shaped[Tensor, "dim dim"]) -> Float[Tensor, ""]:
    """Frobenius norm off the diagonal over the whole: 0 where training kept plain gradient descent.

    >>> off_diagonal_share(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    tensor(0.)
    """
    diagonal = torch.diag(block.diagonal())
    share: Tensor = (block - diagonal).abs().square().sum().sqrt() / block.abs().square().sum().sqrt()
    return share


@dataclass(frozen=True)
class ConditionReport:
    """Whether a condition of the paper is met by a sample, on what evidence."""

    holds: bool
    statistic: float
    """Condition 1: the largest |z| of all tested moments. Condition 2: relative spread of the nonzero squares."""
    threshold: float
    worst: str
    """Which moment it was."""


def check_condition_1(first: Float[Tensor, "count dim"], *, level: float = 1e-3) -> ConditionReport:
    """Whether odd mixed moments vanish and even ones are the same at every coordinate: enough for gradient descent.

    Tests E x_i, E x_i x_jʳ (r = 1, 2, 3) and E x_i x_j² x_k² for distinct coordinates, and the spread of κ₁, κ₂, κ₃ over
    coordinates, each by its z statistic; `level` is shared among them (Bonferroni). Source: 2405.16845, Assumption 4.1.

    >>> check_condition_1(torch.randn(20_000, 4)).holds
    True
    """
    from scipy import stats

    x, (count, dim) = first.double(), first.shape
    tested: dict[str, Tensor] = {f"E x{i}": x[:, i] for i in range(dim)}
    for i in range(dim):
        for j in range(dim):
            if i != j:
                tested |= {f"E x{i} x{j}^{power}": x[:, i] * x[:, j] ** power for power in (1, 2, 3)}
                tested |= {
                    f"E x{i} x{j}^2 x{k}^2": x[:, i] * (x[:, j] * x[:, k]) ** 2 for k in range(j + 1, dim) if k != i
                }
    squares = x.square()
    fourth = squares.square()
    evens = {"k1": fourth, "k2": squares * fourth, "k3": squares * (fourth.sum(1, keepdim=True) - fourth)}
    tested |= {f"{name} at {i}": part[:, i] - part.mean(1) for name, part in evens.items() for i in range(dim)}
    scores = {name: _z(values, count) for name, values in tested.items()}
    worst = max(scores, key=lambda name: scores[name])
    threshold = float(stats.norm.isf(level / (2 * len(scores))))
    return ConditionReport(scores[worst] < threshold, scores[worst], threshold, worst)


def check_condition_2(first: Float[Tensor, "count dim"], *, tolerance: float = 0.01) -> ConditionReport:
    """Whether every nonzero square x_j² equals κ₂/κ₁: needed and enough for the process to be recovered.

    Source: 2405.16845, Theorem 4.2.

    >>> check_condition_2(ARProcess(4, 20, "sparse").first(1000, generator)).holds
    True
    """
    moments = estimate_moments(first)
    squares = first.double().square()
    nonzero = squares[squares > 0]
    spread = float((nonzero / (moments.k2 / moments.k1) - 1).abs().max()) if nonzero.numel() else math.inf
    return ConditionReport(spread <= tolerance, spread, tolerance, "squares of nonzero coordinates over k2/k1")


def _z(values: Tensor, count: int) -> float:
    spread = float(values.std()) / math.sqrt(count)
    mean = abs(float(values.mean()))
    return mean / spread if spread > 1e-12 else (0.0 if mean < 1e-12 else math.inf)


def _harmonic(length: int) -> float:
    """Σ_{t=2}^{T−1} 1/(t−1)."""
    return sum(1 / t for t in range(1, length - 1))
