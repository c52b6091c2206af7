"""What attention heads that regress in context compute, and how they learn it: predictors, risks and a flow (2503.12734).

A head that has found the pattern has two numbers: ω, the multiple of the identity in KQ, and μ, what OV takes of the label.
Σ_h μ_h yᵀ softmax(ω_h X x_q) is then the whole model. Two heads with opposite ω and μ take one step of gradient descent on
centred inputs, exactly so as ω → 0 at fixed ω μ, and that is where training creeps to. Labels have β ~ N(0, I/d), inputs
N(0, I) unless told otherwise, and risks are mean squared errors against noisy labels.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.integrate import solve_ivp
from torch import Tensor

Phase = Literal["growth", "alignment", "manifold"]

# Predictors of the query's label from the prompt


def gd_predict(
    x: Float[Tensor, "*batch length dim"],
    y: Float[Tensor, "*batch length"],
    query: Float[Tensor, "*batch dim"],
    step: float,
    lengths: Sequence[int] | None = None,
) -> Float[Tensor, "..."]:
    """One step of gradient descent from zero: (η/L) Σ y_l x_l·x_q.

    With `lengths` the answers (lengths, *batch) to the beginnings of so many examples, at little more than the cost of the
    longest. Raises ValueError unless these rise from at least 1 to at most the prompt's.

    >>> gd_predict(torch.eye(2), torch.tensor([1.0, 3.0]), torch.tensor([1.0, 0.0]), 1.0)
    tensor(0.5000)
    """
    per_example = y * _along(x, query)
    return _shaped(step * _mean(per_example, lengths), lengths)


def debiased_gd_predict(
    x: Float[Tensor, "*batch length dim"],
    y: Float[Tensor, "*batch length"],
    query: Float[Tensor, "*batch dim"],
    step: float,
    lengths: Sequence[int] | None = None,
) -> Float[Tensor, "..."]:
    """The same on centred inputs, (η/L) Σ y_l (x_l − x̄)·x_q: blind to a constant added to all labels.

    `lengths` as in `gd_predict`.

    >>> debiased_gd_predict(torch.eye(2), torch.tensor([1.0, 3.0]), torch.tensor([1.0, 0.0]), 1.0)
    tensor(-0.5000)
    """
    along = _along(x, query)
    # Centred labels come to the same, and nothing cancels when they are far from zero.
    centred = y - y.mean(-1, keepdim=True)
    covariance = _mean(centred * along, lengths) - _mean(centred, lengths) * _mean(along, lengths)
    return _shaped(step * covariance, lengths)


def ridge_predict(
    x: Float[Tensor, "*batch length dim"],
    y: Float[Tensor, "*batch length"],
    query: Float[Tensor, "*batch dim"],
    noise_variance: float,
    lengths: Sequence[int] | None = None,
) -> Float[Tensor, "..."]:
    """The best of all predictors, x_qᵀ (XᵀX + σ² d I)⁻¹ Xᵀ y: the mean of the label given the prompt.

    Without noise it is least squares of smallest norm. `lengths` as in `gd_predict`. Raises ValueError for a negative variance.

    >>> ridge_predict(torch.eye(2), torch.tensor([1.0, 3.0]), torch.tensor([1.0, 0.0]), 0.0)
    tensor(1.)
    """
    if noise_variance < 0:
        raise ValueError(f"noise_variance={noise_variance} must not be negative")
    if noise_variance == 0:
        ends = _ends(y.shape[-1], lengths)
        weights = torch.stack([(torch.linalg.pinv(x[..., :end, :]) @ y[..., :end, None])[..., 0] for end in ends])
        return _shaped((weights * query).sum(-1), lengths)
    # The answer is what elimination leaves of the bordered system (XᵀX + σ² d I, Xᵀy; x_q, 0), but for its sign. Over
    # all prompts at once that costs a seventh of LAPACK, which takes small systems one by one.
    dim, system = x.shape[-1], _second_moments(x, y, lengths)
    system.diagonal(dim1=0, dim2=1)[..., :dim].add_(noise_variance * dim)
    system[dim, :dim] = query.movedim(-1, 0)[:, None]
    system[dim, dim] = 0
    for _ in range(dim):
        system = torch.addcmul(system[1:, 1:], system[1:, :1], system[:1, 1:] / system[0, 0], value=-1)
    return _shaped(-system[0, 0], lengths)


def softmax_heads_predict(
    x: Float[Tensor, "*batch length dim"],
    y: Float[Tensor, "*batch length"],
    query: Float[Tensor, "*batch dim"],
    omega: Float[Tensor, " heads"],
    mu: Float[Tensor, " heads"],
    lengths: Sequence[int] | None = None,
) -> Float[Tensor, "..."]:
    """What heads with KQ = ω I and OV = μ on the label say: Σ_h μ_h Σ_l softmax(ω_h x_l·x_q) y_l.

    `lengths` as in `gd_predict`. Source: 2503.12734, section 3.

    >>> softmax_heads_predict(torch.eye(2), torch.ones(2), torch.ones(2), torch.tensor([1.0]), torch.tensor([3.0]))
    tensor(3.)
    """
    along, labels = (one.movedim(-1, 0).contiguous() for one in (_along(x, query), y))
    logits = omega.view(-1, *(1,) * (along.ndim - 1)) * along[:, None]
    ends = _ends(len(labels), lengths)
    parts = (one[: ends[-1]].tensor_split(ends[:-1]) for one in (logits, labels[:, None]))
    # Shares by the largest logit so far: nothing overflows, and no sum is empty.
    largest = torch.full_like(logits[0], -math.inf)
    total = labelled = torch.zeros_like(logits[0])
    per_head = []
    for part, told in zip(*parts, strict=True):
        before, largest = largest, torch.maximum(largest, part.amax(0))
        kept, weights = (before - largest).exp(), (part - largest).exp()
        total, labelled = kept * total + weights.sum(0), kept * labelled + (weights * told).sum(0)
        per_head.append(labelled / total)
    return _shaped(torch.stack(per_head).movedim(1, -1) @ mu, lengths)


def _along(x: Tensor, query: Tensor) -> Tensor:
    """x_l·x_q of every example, a row times a matrix: small batched products the other way round take four times as long."""
    return (query[..., None, :] @ x.mT)[..., 0, :]


def _ends(num_examples: int, lengths: Sequence[int] | None) -> list[int]:
    """How many examples each answer may see."""
    ends = [num_examples] if lengths is None else list(lengths)
    if not ends or ends[0] < 1 or ends[-1] > num_examples or any(b <= a for a, b in itertools.pairwise(ends)):
        raise ValueError(f"lengths={ends} must rise from 1 or more to at most the prompt's {num_examples}")
    return ends


def _second_moments(x: Tensor, y: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """Σ z zᵀ of tokens z = (x, y) over the first so many examples, (token, token, lengths, *batch)."""
    if lengths is None:
        tokens = torch.cat([x, y[..., None]], -1)
        return (tokens.mT @ tokens).movedim((-2, -1), (0, 1))[:, :, None].contiguous()
    # Products of many matrices of few examples cost thrice what sums of rank one over the whole batch do.
    by_example = torch.cat([x.movedim((-2, -1), (0, 1)), y.movedim(-1, 0)[:, None]], 1)
    ends, moments = _ends(y.shape[-1], lengths), list[Tensor]()
    total = by_example.new_zeros(x.shape[-1] + 1, *by_example.shape[1:])
    for count, example in enumerate(by_example[: ends[-1]], start=1):
        total.addcmul_(example[:, None], example)
        if count == ends[len(moments)]:
            moments.append(total.clone())
    return torch.stack(moments, 2)


def _mean(per_example: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """Means over the first so many examples, by length."""
    if lengths is None:
        return per_example.mean(-1)[None]
    ends = torch.tensor(_ends(per_example.shape[-1], lengths), device=per_example.device)
    return (per_example.cumsum(-1)[..., ends - 1] / ends).movedim(-1, 0)


def _shaped(answers: Tensor, lengths: Sequence[int] | None) -> Tensor:
    return answers[0] if lengths is None else answers


# Risks


def gd_risk(step: float, dim: int, length: int, noise_variance: float) -> float:
    """Risk of one step of gradient descent, exact at every length.

    >>> gd_risk(0.897, 5, 40, 0.1)
    0.2413...
    """
    second = 1 + (dim + 1) / length + noise_variance * dim / length
    return 1 + noise_variance - 2 * step + step**2 * second


def debiased_gd_risk(step: float, dim: int, length: int, noise_variance: float) -> float:
    """Risk of one step of gradient descent on centred inputs, exact at every length; at length 1 it predicts 0.

    >>> debiased_gd_risk(0.897, 5, 40, 0.1)
    0.2432...
    """
    kept = (length - 1) / length
    return 1 + noise_variance - 2 * step * kept + step**2 * kept * (length + dim + noise_variance * dim) / length


def best_step(dim: int, length: int, noise_variance: float, *, debiased: bool = True) -> float:
    """The step of least risk: η* = L/(L + (1 + σ²) d) on centred inputs, for which it is exact, too.

    >>> best_step(5, 40, 0.1)
    0.8791...
    """
    return length / (length + (1 + noise_variance) * dim + (0 if debiased else 1))


def bayes_risk_asymptotic(ratio: float, noise_variance: float) -> float:
    """Risk of ridge regression, the best there is, as inputs d and examples L grow with d/L = `ratio`.

    Raises ValueError for a ratio that is not above 0. Source: 2503.12734, section 4; Marchenko and Pastur.

    >>> bayes_risk_asymptotic(0.125, 0.1)
    0.1140...
    """
    if ratio <= 0:
        raise ValueError(f"ratio={ratio} of inputs to examples must be above 0")
    missing = (1 - ratio) / ratio
    # 1/2 (σ² − m + sqrt(4 σ² + (σ² + m)²)), written so that nothing cancels at small ratios.
    root = math.sqrt(4 * noise_variance + (noise_variance + missing) ** 2)
    if noise_variance + missing <= 0:
        return 0.5 * (noise_variance - missing + root)
    return noise_variance + 2 * noise_variance / (root + noise_variance + missing)


def preconditioner(
    covariance: Float[Tensor, "dim dim"], length: int, noise_variance: float
) -> Float[Tensor, "dim dim"]:
    """The best A in x_qᵀ A (1/L) Xᵀ y for inputs N(0, Σ): ((1 + 1/L) Σ + (tr Σ + d σ²)/L · I)⁻¹.

    To first order heads make Σ_h μ_h KQ_h of it. Exact for β ~ N(0, I/d).

    >>> preconditioner(torch.eye(2), 4, 0.5)[0, 0]  # 1/(1 + 1/4 + (2 + 1)/4)
    tensor(0.5000)
    """
    dim = len(covariance)
    identity = torch.eye(dim, dtype=covariance.dtype, device=covariance.device)
    rest = (covariance.trace() + dim * noise_variance) / length
    inverse: Tensor = torch.linalg.inv((1 + 1 / length) * covariance + rest * identity)
    return inverse


# The loss of heads that have the pattern, and its flow


def approx_icl_loss(
    omega: Float[Tensor, "*batch heads"],
    mu: Float[Tensor, "*batch heads"],
    dim: int,
    length: int,
    noise_variance: float,
) -> Float[Tensor, "*batch"]:
    """Risk of heads (ω, μ) as d and L grow together: 1 + σ² − 2 μ·ω + μᵀ A μ, A = ωωᵀ + (1+σ²)/L exp(d ωωᵀ) entrywise.

    Source: 2503.12734, section 4.

    >>> pair = torch.tensor([0.13, -0.13]), torch.tensor([3.45, -3.45])
    >>> approx_icl_loss(*pair, 5, 40, 0.1)
    tensor(0.2214)
    """
    quadratic = (mu * (_second_moment(omega, dim, length, noise_variance) @ mu[..., None])[..., 0]).sum(-1)
    loss: Tensor = 1 + noise_variance - 2 * (mu * omega).sum(-1) + quadratic
    return loss


def icl_loss_gradients(
    omega: Float[Tensor, "*batch heads"],
    mu: Float[Tensor, "*batch heads"],
    dim: int,
    length: int,
    noise_variance: float,
) -> tuple[Float[Tensor, "*batch heads"], Float[Tensor, "*batch heads"]]:
    """Gradients of half the loss by ω and by μ, in closed form.

    >>> icl_loss_gradients(torch.zeros(2), torch.zeros(2), 5, 40, 0.1)
    (tensor([-0., -0.]), tensor([-0., -0.]))
    """
    noise = (1 + noise_variance) / length
    outer = omega[..., :, None] * omega[..., None, :]
    spread = noise * torch.exp(dim * outer)
    along = (mu * omega).sum(-1, keepdim=True)
    by_mu = -omega + along * omega + (spread @ mu[..., None])[..., 0]
    weighted = spread * mu[..., :, None] * mu[..., None, :]
    by_omega = -mu + along * mu + dim * (weighted @ omega[..., None])[..., 0]
    return by_omega, by_mu


def optimal_mu(
    omega: Float[Tensor, "*batch heads"], dim: int, length: int, noise_variance: float
) -> Float[Tensor, "*batch heads"]:
    """The best μ at fixed ω; of smallest norm where heads with equal ω leave a choice.

    >>> optimal_mu(torch.tensor([0.13, -0.13]), 5, 40, 0.1)
    tensor([ 3.3..., -3.3...])
    """
    moment = _second_moment(omega, dim, length, noise_variance)
    best: Tensor = (torch.linalg.pinv(moment, hermitian=True) @ omega[..., None])[..., 0]
    return best


def single_head_optimum(dim: int, length: int, noise_variance: float) -> tuple[float, float, float]:
    """(ω, μ, loss) of the best single head: a kernel regression with ω = 1/√d.

    >>> single_head_optimum(5, 40, 0.1)
    (0.4472..., 1.6293..., 0.3720...)
    """
    gain = 1 / (1 + (1 + noise_variance) * dim * math.e / length)
    return 1 / math.sqrt(dim), math.sqrt(dim) * gain, 1 + noise_variance - gain


def head_limits(dim: int, length: int, noise_variance: float) -> tuple[float, float]:
    """(Σ μ ω, loss) that several heads of both signs come near for ever, ω → 0 with the sum fixed: η* and 1 + σ² − η*.

    >>> head_limits(5, 40, 0.1)
    (0.8791..., 0.2208...)
    """
    step = best_step(dim, length, noise_variance)
    return step, 1 + noise_variance - step


@dataclass(frozen=True)
class HeadFlow:
    """How heads move under gradient flow on half the loss; time is learning rate times steps of plain descent."""

    times: Float[Tensor, " times"]
    omega: Float[Tensor, "times heads"]
    mu: Float[Tensor, "times heads"]
    loss: Float[Tensor, " times"]


def simulate_head_flow(
    omega: Float[Tensor, " heads"],
    mu: Float[Tensor, " heads"],
    dim: int,
    length: int,
    noise_variance: float,
    *,
    times: Float[Tensor, " times"],
) -> HeadFlow:
    """Gradient flow of heads from (ω, μ) on half of `approx_icl_loss`, at rising times.

    Gradient descent with learning rate lr is at `times` = lr · steps. Raises ValueError for times that do not rise from 0
    or later, and RuntimeError when the integration breaks down. Source: 2503.12734, section 4.

    >>> flow = simulate_head_flow(0.01 * torch.randn(4), 0.01 * torch.randn(4), 5, 40, 0.1, times=torch.logspace(-1, 3, 50))
    """
    at = times.double().numpy()
    if len(at) < 1 or at[0] < 0 or np.any(np.diff(at) <= 0):
        raise ValueError("times must rise, from 0 or later")
    heads = len(omega)

    def slope(time: float, state: np.ndarray) -> np.ndarray:
        whole = torch.from_numpy(state)
        gradients = icl_loss_gradients(whole[:heads], whole[heads:], dim, length, noise_variance)
        return -torch.cat(gradients).numpy()

    start = torch.cat([omega, mu]).double().numpy()
    # The flow slows by orders of magnitude from phase to phase and is stiff on its manifold.
    solved: Any = solve_ivp(slope, (0.0, at[-1]), start, method="LSODA", t_eval=at, rtol=1e-8, atol=1e-12)
    if not solved.success:
        raise RuntimeError(f"the flow could not be followed: {solved.message}")
    omegas, mus = torch.from_numpy(solved.y.T.copy()).split(heads, dim=1)
    loss = approx_icl_loss(omegas, mus, dim, length, noise_variance)
    return HeadFlow(times.double(), omegas, mus, loss)


def head_phases(
    omega: Float[Tensor, "times heads"], mu: Float[Tensor, "times heads"], *, near: float = 0.1, dummy: float = 0.05
) -> list[Phase]:
    """Which phase of training heads are in at each time, from their two numbers alone.

    "growth": ω and μ grow from small, signs aligned, until the gain Σ μ ω has come within `near` of its largest value.
    "alignment": until heads are of one size (standard deviation over mean of |ω|) and cancel (|Σ μ| over Σ |μ|), both
    within `near`. "manifold": from then on, with ω falling and μ growing for ever at constant gain. Heads whose |μ| is
    below `dummy` of the largest do not count; heads of one sign never come to the manifold.

    Works for a flow and for the recorded training of a model. Source: the three phases are 2503.12734's, section 4; the
    thresholds are ours.

    >>> head_phases(flow.omega, flow.mu)[-1]
    'manifold'
    """
    gain, size = (mu * omega).sum(-1), mu.abs()
    live = torch.where(size < dummy * size.amax(-1, keepdim=True), torch.nan, omega.abs())
    mean = live.nanmean(-1, keepdim=True)
    spread = (live - mean).square().nanmean(-1).sqrt() / mean[:, 0]
    has_grown = _from_first((gain >= (1 - near) * gain.max()) & (gain > 0))
    is_settled = (spread <= near) & (mu.sum(-1).abs() <= near * size.sum(-1))
    is_on_manifold = _from_first(has_grown & is_settled)
    names: tuple[Phase, Phase, Phase] = ("growth", "alignment", "manifold")
    return [names[place] for place in (has_grown.int() + is_on_manifold.int()).tolist()]


def _from_first(holds: Tensor) -> Tensor:
    return holds.cummax(0).values


def _second_moment(omega: Tensor, dim: int, length: int, noise_variance: float) -> Tensor:
    outer = omega[..., :, None] * omega[..., None, :]
    return outer + (1 + noise_variance) / length * torch.exp(dim * outer)
