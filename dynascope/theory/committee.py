"""The quadratic committee in closed form: its test loss from two statistics, its tangent kernel, its mean-field limit.

Source: 2310.06110, section 3 and appendices; `QuadraticCommittee` has the model, `quadratic_teacher` the task.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dynascope.data.teachers import quadratic_teacher
from dynascope.nn.committee import QuadraticCommittee


@dataclass(frozen=True)
class SummaryStatistics:
    """All that the outputs of a committee depend on: the mean neuron, and the neurons' mean outer product."""

    mean: Float[Tensor, "*committees dim"]
    second: Float[Tensor, "*committees dim dim"]

    def since(self, start: "SummaryStatistics") -> "SummaryStatistics":
        """What a committee centred at `start` has instead."""
        return SummaryStatistics(self.mean - start.mean, self.second - start.second)


def summary_statistics(weight: Float[Tensor, "*committees neurons dim"]) -> SummaryStatistics:
    """w̄ = mean of wᵢ and M = mean of wᵢ wᵢᵀ; then f(x) = α w̄·x + (αε/2) xᵀ M x.

    >>> summary_statistics(torch.eye(2)).mean
    tensor([0.5000, 0.5000])
    """
    return SummaryStatistics(weight.mean(-2), weight.mT @ weight / weight.shape[-2])


@dataclass(frozen=True)
class TestLoss:
    """The test loss of one or more committees in its parts, which sum to it."""

    __test__ = False  # its name is no test's

    scale: Float[Tensor, "*committees"]
    """A: how far the mean prediction is off."""
    misalignment: Float[Tensor, "*committees"]
    """B: between the learnt quadratic form and the teacher's."""
    linear: Float[Tensor, "*committees"]
    """C: power in linear functions, of which the task has none; it rises while noise is fitted with the first features."""

    @property
    def total(self) -> Tensor:
        """A + B + C."""
        return self.scale + self.misalignment + self.linear


def committee_test_loss(
    statistics: SummaryStatistics,
    beta: Float[Tensor, "*committees dim"],
    *,
    alpha: float | Float[Tensor, "*committees"],
    eps: float | Float[Tensor, "*committees"],
) -> TestLoss:
    """The exact mean of (f − y)² over x ~ N(0, I/dim).

    >>> committee_test_loss(summary_statistics(torch.eye(2)), torch.ones(2), alpha=1.0, eps=1.0).total
    tensor(0.6250)
    """
    dim = beta.shape[-1]
    second = statistics.second
    form = torch.as_tensor(alpha * eps, dtype=second.dtype, device=second.device)[..., None, None] * second
    trace = form.diagonal(dim1=-2, dim2=-1).sum(-1)
    return TestLoss(
        ((beta.square().sum(-1) - trace) / dim).square() / 4,
        (form - beta[..., :, None] * beta[..., None, :]).square().sum((-2, -1)) / (2 * dim**2),
        alpha**2 * statistics.mean.square().sum(-1) / dim,
    )


def committee_ntk(
    statistics: SummaryStatistics,
    x1: Float[Tensor, "n dim"],
    x2: Float[Tensor, "m dim"],
    *,
    alpha: float,
    eps: float,
    num_neurons: int,
) -> Float[Tensor, "n m"]:
    """The committee's tangent kernel at any time, (α²/N)(x·x')[1 + ε w̄·(x + x') + ε² xᵀ M x'], from two products.

    >>> committee_ntk(summary_statistics(model.weight), x, x, alpha=1.0, eps=0.25, num_neurons=200)
    """
    linear = (x1 @ statistics.mean)[:, None] + (x2 @ statistics.mean)[None]
    bracket = 1 + eps * linear + eps**2 * (x1 @ statistics.second @ x2.T)
    return alpha**2 / num_neurons * (x1 @ x2.T) * bracket


@dataclass(frozen=True)
class CommitteeSweep:
    """The training of many committees at once, by look and committee."""

    steps: list[int]
    train: Float[Tensor, "looks committees"]
    test: TestLoss
    """Its parts (looks, committees), exact."""


def committee_sweep(
    arms: Sequence[tuple[float, float, int]],
    *,
    dim: int,
    num_neurons: int,
    num_examples: int,
    num_steps: int,
    looks: Collection[int],
    center: bool = True,
    pace: float = 1.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> CommitteeSweep:
    """Train a `QuadraticCommittee` for every (α, ε, seed) at once, on a task of its own.

    A seed draws the teacher, its examples and then the first weights, as training it alone would. The learning rate is
    `pace` · N/α². Memory: committees × (neurons × dim + examples × (neurons + dim)) numbers.

    Raises ValueError for no arms, and for steps to look at that are never reached.
    Source: 2310.06110, section 3.

    >>> grid = itertools.product((0.25, 1.0, 4.0), (0.05, 0.25), range(10))
    >>> sizes = {"dim": 40, "num_neurons": 200, "num_examples": 200}
    >>> committee_sweep(list(grid), **sizes, num_steps=1000, looks=range(0, 1001, 100)).test.total[-1]
    """
    if not arms or not looks or min(looks) < 0 or max(looks) > num_steps:
        raise ValueError(f"a sweep needs one or more arms, and looks at steps from 0 to {num_steps}")
    generators = [torch.Generator().manual_seed(seed) for *_, seed in arms]
    tasks = [quadratic_teacher(dim, num_examples, generator=one, dtype=dtype) for one in generators]
    x, y, beta = (torch.stack(parts).to(device) for parts in zip(*tasks, strict=True))
    alpha, eps = (torch.tensor(dial, dtype=torch.float64) for dial in zip(*((a, e) for a, e, _ in arms), strict=True))
    model = QuadraticCommittee(
        dim, num_neurons, alpha=alpha, eps=eps, center=center, generator=generators, dtype=dtype
    ).to(device)
    start = summary_statistics(model.weight.detach())
    seen: list[tuple[Tensor, ...]] = []

    def look(step: int, residual: Tensor) -> None:
        now = summary_statistics(model.weight)
        now = now.since(start) if center else now
        parts = committee_test_loss(now, beta, alpha=model.alpha, eps=model.eps)
        seen.append((residual.square().mean(-1), parts.scale, parts.misalignment, parts.linear))

    model.descend(x, y, num_steps, lr=pace * model.lr, looks=looks, look=look)
    train, *test = (torch.stack(one) for one in zip(*seen, strict=True))
    return CommitteeSweep(sorted(set(looks)), train, TestLoss(*test))


@dataclass(frozen=True)
class MeanField:
    """A committee's training in the limit of many dimensions and examples: losses and order parameters by step."""

    train: Float[Tensor, " steps"]
    test: Float[Tensor, " steps"]
    overlap: Float[Tensor, "steps neurons"]
    """Of each neuron with the teacher."""
    gram: Float[Tensor, "steps neurons neurons"]
    """Of the neurons with each other, over dim."""


def committee_dmft(
    num_neurons: int,
    delta: float,
    *,
    alpha: float,
    eps: float,
    eta0: float,
    num_steps: int,
    num_samples: int = 8000,
    seed: int = 0,
) -> MeanField:
    """Dynamical mean-field theory of full-batch gradient descent on the committee, `delta` = examples over dimensions.

    The learning rate is `eta0` · dim · N/α². Weights follow a linear process whose coefficients are propagated exactly;
    fields h = W x of a training example are sampled forward in time, given their past, and their responses along each
    path. Nothing is iterated to self-consistency, as no step depends on a later one. Time and memory grow with
    num_samples · num_steps² · N².

    Raises ValueError for impossible sizes.

    >>> committee_dmft(3, 5.0, alpha=1.0, eps=0.5, eta0=0.05, num_steps=30).test
    """
    if num_neurons < 1 or num_steps < 1 or num_samples < 1 or delta <= 0:
        raise ValueError("num_neurons, num_steps and num_samples must be at least 1, and delta above 0")
    generator = torch.Generator().manual_seed(seed)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64)

    n, steps, samples = num_neurons, num_steps, num_samples
    eye = torch.eye(n, dtype=torch.float64)
    # w(t) = a(t) w(0) + b(t) β + noise; response[t, s] is that of w(t) to a push at step s.
    a, b = zeros(steps + 1, n, n), zeros(steps + 1, n)
    a[0] = eye
    response = zeros(steps + 1, steps + 1, n, n)
    push = zeros(steps, steps, n, n)  # E q(t) q(s)ᵀ
    slope = zeros(steps, steps, n, n)  # E ∂q(t)/∂ζ(s)
    drift = zeros(steps, n)  # E ∂q(t)/∂u
    overlaps = zeros(steps + 1, steps + 1, n, n)  # E w(t) w(s)ᵀ / dim
    u = torch.randn(samples, generator=generator, dtype=torch.float64)
    fields = zeros(samples, steps, n)  # ζ
    pushes = zeros(samples, steps, n)  # q
    by_field = zeros(samples, steps, steps, n, n)  # ∂q(t)/∂ζ(s)
    by_teacher = zeros(samples, steps, n)  # ∂q(t)/∂u
    train, test = zeros(steps), zeros(steps)
    for t in range(steps):
        for s in range(t + 1):
            noise = torch.einsum("xij,xykj,ylk->il", response[t, :t], push[:t, :s].transpose(2, 3), response[s, :s])
            overlaps[t, s] = a[t] @ a[s].T + torch.outer(b[t], b[s]) + eta0**2 / delta * noise
            overlaps[s, t] = overlaps[t, s].T.clone()
        test[t] = _mean_field_test_loss(overlaps[t, t], b[t], alpha, eps)

        fields[:, t] = _next_field(u, fields[:, :t], overlaps[: t + 1, : t + 1], b[: t + 1], generator)
        hidden = fields[:, t] - eta0 / delta * torch.einsum("sij,bsj->bi", response[t, :t], pushes[:, :t])
        features = 1 + eps * hidden
        residual = alpha * (hidden + 0.5 * eps * hidden.square()).mean(1) - u.square() / 2
        train[t] = residual.square().mean()
        pushes[:, t] = 2 / alpha * residual[:, None] * features
        jacobian = 2 / n * features[:, :, None] * features[:, None, :] + 2 / alpha * eps * residual[:, None, None] * eye
        carried = -eta0 / delta * torch.einsum("xij,bxsjk->bsik", response[t, :t], by_field[:, :t, : t + 1])
        carried[:, t] += eye
        by_field[:, t, : t + 1] = torch.einsum("bij,bsjk->bsik", jacobian, carried)
        earlier = -eta0 / delta * torch.einsum("xij,bxj->bi", response[t, :t], by_teacher[:, :t])
        by_teacher[:, t] = -2 / alpha * u[:, None] * features + torch.einsum("bij,bj->bi", jacobian, earlier)

        push[t, : t + 1] = torch.einsum("bi,bsj->sij", pushes[:, t], pushes[:, : t + 1]) / samples
        push[: t + 1, t] = push[t, : t + 1].transpose(1, 2).clone()
        slope[t, : t + 1] = by_field[:, t, : t + 1].mean(0)
        drift[t] = by_teacher[:, t].mean(0)

        a[t + 1] = a[t] - eta0 * torch.einsum("sij,sjk->ik", slope[t, : t + 1], a[: t + 1])
        b[t + 1] = b[t] - eta0 * (torch.einsum("sij,sj->i", slope[t, : t + 1], b[: t + 1]) + drift[t])
        pulled = torch.einsum("xij,xsjk->sik", slope[t, : t + 1], response[: t + 1, :t])
        response[t + 1, :t] = response[t, :t] - eta0 * pulled
        response[t + 1, t] = eye
    gram = torch.stack([overlaps[t, t] for t in range(steps)])
    return MeanField(train, test, b[:steps], gram)


def _next_field(u: Tensor, past: Tensor, overlaps: Tensor, b: Tensor, generator: torch.Generator) -> Tensor:
    """ζ(t) of each sample given u and ζ before t: jointly Gaussian, of covariance `overlaps` and `b` with u."""
    samples, t, n = past.shape
    known = torch.cat([u[:, None], past.flatten(1)], dim=1)
    covariance = torch.eye(1 + t * n, dtype=u.dtype)
    covariance[1:, 1:] = overlaps[:t, :t].permute(0, 2, 1, 3).reshape(t * n, t * n)
    covariance[0, 1:] = covariance[1:, 0] = b[:t].flatten()
    cross = torch.cat([b[t][:, None], overlaps[t, :t].transpose(0, 1).reshape(n, t * n)], dim=1)
    weights = torch.linalg.solve(covariance + 1e-9 * torch.eye(len(covariance), dtype=u.dtype), cross.T)
    values, vectors = torch.linalg.eigh(overlaps[t, t] - cross @ weights)
    noise = torch.randn(samples, n, generator=generator, dtype=u.dtype)
    drawn: Tensor = known @ weights + noise @ (vectors * values.clamp_min(0).sqrt()).T
    return drawn


def _mean_field_test_loss(gram: Tensor, overlap: Tensor, alpha: float, eps: float) -> Tensor:
    n, form = len(gram), alpha * eps
    scale = (1 - form * gram.trace() / n).square() / 4
    misaligned = (form**2 * gram.square().sum() / n**2 - 2 * form * overlap.square().sum() / n + 1) / 2
    total: Tensor = scale + misaligned + alpha**2 * gram.mean()
    return total
