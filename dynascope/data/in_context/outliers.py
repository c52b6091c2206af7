"""Prompts of examples, some of which carry an additive trigger and a wrong label (2510.00399, section 3)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Placement: TypeAlias = Literal["R", "FQ", "CQ"]
"""Where outliers stand: at random, farthest from the query (first), or closest to it (last)."""
Rule: TypeAlias = Literal["flip", "target", "random"] | Callable[[Tensor, torch.Generator], Tensor]
"""What an outlier's label becomes: the other one, +1, a coin's; or (true labels, generator) -> labels, both ±1."""
Cover: TypeAlias = Literal["all", "cyclic", "seen", "unseen"] | Sequence[tuple[int, int]]
"""Which tasks (a, b) there are: pattern a has label +1 and pattern b label -1."""

# Combinations of the three training triggers that the paper tests with.
PAPERS_LAMBDAS = ((0.7, 0.6, -0.4), (0.4, 0.7, -0.6), (-0.7, 0.5, 0.5))


@dataclass(frozen=True)
class OutlierPrompts:
    """A batch of prompts, and what is known of them."""

    prompts: Float[Tensor, "batch tokens width"]
    """(x; y) of each example; the query comes last, with 0 for its label."""
    labels: Float[Tensor, " batch"]
    """Of the query, ±1."""
    is_outlier: Bool[Tensor, "batch length"]
    patterns: Int[Tensor, "batch tokens"]
    """The relevant pattern in each example and in the query."""
    tasks: Int[Tensor, "batch 2"]
    """The patterns whose labels are +1 and -1."""


class OutlierICL:
    """In-context binary classification by orthogonal patterns, with poisoned examples in the context.

    An example is x = μ_j + κ ν_k, with one of `num_relevant` patterns μ, one of `num_irrelevant` ν and κ uniform in
    (-K, K); all have norm `beta`. A task (a, b) labels a prompt's examples: +1 for μ_a, -1 for μ_b, each half of the time.
    An outlier has κ_a times a trigger added to it, and another label. Triggers are orthogonal to everything, of norm
    `beta` or 1. `p_a` is the share of outliers in training. Source: 2510.00399, section 3.

    Args:
        task_cover: Training tasks: every ordered pair, the cyclic neighbours (a, a + 1), or a list.
        seed: Of the patterns, and of batches that are drawn without a generator of their own.

    Raises ValueError for patterns that do not fit into `dim`, tasks in which some pattern is not as often +1 as -1, and
    shares outside [0, 1].

    >>> OutlierICL().train_batch(256).prompts.shape
    torch.Size([256, 21, 31])
    """

    def __init__(
        self,
        dim: int = 30,
        num_relevant: int = 6,
        num_irrelevant: int = 10,
        num_triggers: int = 3,
        *,
        beta: float = 3.0,
        K: float = 0.5,
        kappa_a: float = 2.0,
        p_a: float = 0.6,
        length: int = 20,
        task_cover: Cover = "all",
        trigger_norm: Literal["beta", "unit"] = "beta",
        seed: int = 0,
    ) -> None:
        used = num_relevant + num_irrelevant + num_triggers
        if num_relevant < 2 or num_irrelevant < 1 or num_triggers < 1 or length < 0:
            raise ValueError(
                "there must be at least two relevant patterns, one irrelevant, one trigger, and no negative length"
            )
        if used > dim:
            raise ValueError(
                f"{used} orthogonal directions do not fit into dim={dim}; raise dim or have fewer patterns"
            )
        if beta <= 0:
            raise ValueError(f"beta={beta} must be above 0")
        _refuse_share("p_a", p_a)
        self.dim, self.length, self.beta, self.K, self.kappa_a, self.p_a = dim, length, beta, K, kappa_a, p_a
        self.generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(dim, dim, generator=self.generator, dtype=torch.float64)).Q.T.float()
        self.relevant, self.irrelevant, triggers, self.rest = basis.split(
            [num_relevant, num_irrelevant, num_triggers, dim - used]
        )
        self.relevant, self.irrelevant = beta * self.relevant, beta * self.irrelevant
        self.triggers = beta * triggers if trigger_norm == "beta" else triggers
        if task_cover in ("seen", "unseen"):
            raise ValueError(
                f"task_cover={task_cover!r} says nothing before there is training; use all, cyclic or a list"
            )
        self.training_tasks = self.tasks(task_cover)
        if not torch.equal(*(self.training_tasks[:, side].bincount(minlength=num_relevant) for side in (0, 1))):
            raise ValueError(
                "task_cover must have every pattern as often with label +1 as with -1; add the tasks (b, a)"
            )

    def tasks(self, cover: Cover) -> Int[Tensor, "tasks 2"]:
        """The tasks of a cover; "seen" are those of training, "unseen" all others. Raises ValueError if there are none."""
        num = len(self.relevant)
        every = [(a, b) for a in range(num) for b in range(num) if a != b]
        if not isinstance(cover, str):
            if not cover or any(task not in every for task in map(tuple, cover)):
                raise ValueError(
                    f"tasks are pairs of two different patterns below {num}, and there must be one at least"
                )
            return torch.tensor([list(task) for task in cover])
        if cover == "all":
            return torch.tensor(every)
        if cover == "cyclic":
            return torch.tensor([(a, (a + 1) % num) for a in range(num)])
        if cover == "seen":
            return self.training_tasks
        if cover != "unseen":
            raise ValueError(f"tasks are all, cyclic, seen, unseen or a list of pairs, not {cover!r}")
        seen = {tuple(task) for task in self.training_tasks.tolist()}
        unseen = [task for task in every if task not in seen]
        if not unseen:
            raise ValueError("training covers all tasks: none is unseen")
        return torch.tensor(unseen)

    def train_batch(self, count: int = 256, *, generator: torch.Generator | None = None) -> OutlierPrompts:
        """Fresh training prompts: each example is an outlier with probability p_a and then has a coin's label."""
        generator = generator or self.generator
        is_outlier = torch.rand(count, self.length, generator=generator) < self.p_a
        return self._assemble(
            self.training_tasks, is_outlier, self.triggers, "random", self.K, self.kappa_a, 0.0, generator
        )

    def test_batch(
        self,
        alpha: float,
        rule: Rule = "flip",
        placement: Placement = "R",
        *,
        count: int = 4000,
        cover: Cover = "all",
        lambdas: Sequence[Sequence[float]] | None = None,
        K: float | None = None,
        kappa_a: float | None = None,
        stray: float = 0.0,
        is_exact: bool = True,
        generator: torch.Generator | None = None,
    ) -> OutlierPrompts:
        """Test prompts with a share `alpha` of outliers, whose triggers are combinations Σ λ_i v_i + u of the known ones.

        `lambdas` defaults to the paper's three where there are three triggers, else to the triggers themselves; `stray` is
        the norm of u, orthogonal to everything. K and κ_a default to training's. The number of outliers is alpha · length
        rounded, or binomial (`is_exact=False`, placement R only).

        Raises ValueError for combinations that do not sum to more than 0, and for impossible shares and placements.

        >>> task.test_batch(0.6, "flip", "CQ").is_outlier.sum(1).unique()
        tensor([12])
        """
        _refuse_share("alpha", alpha)
        if placement not in ("R", "FQ", "CQ"):
            raise ValueError(f"placement is R, FQ or CQ, not {placement!r}")
        if not is_exact and placement != "R":
            raise ValueError("outliers are placed only where their number is exact; use placement R or is_exact=True")
        if not callable(rule) and rule not in ("flip", "target", "random"):
            raise ValueError(f"rule is flip, target, random or a function, not {rule!r}")
        if stray and not len(self.rest):
            raise ValueError("no direction is left for u; raise dim or leave stray at 0")
        generator = generator or self.generator
        order = torch.rand(count, self.length, generator=generator)
        if is_exact:
            if placement == "R":
                order = order.argsort(dim=1)
            else:
                order = torch.arange(self.length).expand(count, -1)
                order = order.flip(1) if placement == "CQ" else order
            is_outlier = order < round(alpha * self.length)
        else:
            is_outlier = order < alpha
        num = len(self.triggers)
        mixed = torch.tensor(
            lambdas if lambdas is not None else PAPERS_LAMBDAS if num == 3 else torch.eye(num).tolist()
        )
        if mixed.ndim != 2 or mixed.shape[1] != num or bool((mixed.sum(1) <= 0).any()):
            raise ValueError(f"each of lambdas must have {num} numbers, one a trigger, with a sum above 0")
        bounds = self.K if K is None else K, self.kappa_a if kappa_a is None else kappa_a
        return self._assemble(self.tasks(cover), is_outlier, mixed @ self.triggers, rule, *bounds, stray, generator)

    def _assemble(
        self,
        tasks: Tensor,
        is_outlier: Tensor,
        triggers: Tensor,
        rule: Rule,
        K: float,
        kappa_a: float,
        stray: float,
        generator: torch.Generator,
    ) -> OutlierPrompts:
        count, tokens = len(is_outlier), self.length + 1

        def draw(below: int, *shape: int) -> Tensor:
            return torch.randint(below, shape, generator=generator)

        task = tasks[draw(len(tasks), count)]
        side = draw(2, count, tokens)
        patterns, labels = task.gather(1, side), 1.0 - 2.0 * side
        kappa = K * (2 * torch.rand(count, tokens, 1, generator=generator) - 1)
        x = self.relevant[patterns] + kappa * self.irrelevant[draw(len(self.irrelevant), count, tokens)]
        added = triggers[draw(len(triggers), count, self.length)]
        if stray:
            aside = torch.randn(count, self.length, len(self.rest), generator=generator)
            added = added + stray * torch.nn.functional.normalize(aside, dim=2) @ self.rest
        x[:, :-1] += kappa_a * is_outlier[..., None] * added
        y = torch.where(is_outlier, relabelled(labels[:, :-1], rule, generator), labels[:, :-1])
        y = torch.cat([y, torch.zeros(count, 1)], dim=1)
        return OutlierPrompts(torch.cat([x, y[..., None]], dim=2), labels[:, -1], is_outlier, patterns, task)


def relabelled(
    labels: Float[Tensor, "batch length"], rule: Rule, generator: torch.Generator
) -> Float[Tensor, "batch length"]:
    """The labels that outliers get in place of their true ones, ±1.

    >>> relabelled(torch.tensor([[1.0, -1.0]]), "flip", generator)
    tensor([[-1.,  1.]])
    """
    if callable(rule):
        return rule(labels, generator)
    if rule == "flip":
        return -labels
    if rule == "target":
        return torch.ones_like(labels)
    return 2.0 * torch.randint(2, labels.shape, generator=generator) - 1


def _refuse_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{name}={share} must lie between 0 and 1")
