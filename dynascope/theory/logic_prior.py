"""When rewards for right answers raise the chance of right reasoning: the Logic Prior (2506.14245, section 4).

p_c is the chance that a chain of thought is right, α that the answer is right after a right chain, β after a wrong one.
The theorem speaks of one prompt whose policy is free to move; parameters shared with other prompts may undo it. Read it
as a condition on the data, not as a promise about a run.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

Std = Literal["population", "sample", "none"]
Baseline = Literal["mean", "loo"]
Chance = float | Float[Tensor, "..."]


@dataclass(frozen=True, eq=False)
class AdvantageTheory:
    """The expected advantages of a right and of a wrong chain, κ between them, and mean and deviation of the reward."""

    given_right: Float[Tensor, "..."]
    given_wrong: Float[Tensor, "..."]
    kappa: Float[Tensor, "..."]
    mean: Float[Tensor, "..."]
    std: Float[Tensor, "..."]


def grpo_advantage_theory(
    p_c: Chance,
    alpha: Chance,
    beta: Chance,
    group_size: int | None = None,
    *,
    std: Std = "population",
    baseline: Baseline = "mean",
) -> AdvantageTheory:
    """The expected advantage given that the chain is right, κ(1 − p_c)(α − β), and wrong, −κ p_c (α − β); exact.

    The signs follow from α > β for every group size; only κ > 0 depends on it. `group_size=None` is the limit of large
    groups, κ = 1/σ, the paper's Theorem 1. Without the division κ = (G − 1)/G, and with the mean of the others as the
    baseline ("loo") κ = 1. Groups with equal rewards count as advantage 0. The chances are broadcast; float64.
    Raises ValueError for a chance outside [0, 1] and fewer than two completions.

    >>> grpo_advantage_theory(0.2, 0.9, 0.3, group_size=8).given_right
    tensor(0.8987, dtype=torch.float64)
    """
    right, paid, lucky = torch.broadcast_tensors(_chance("p_c", p_c), _chance("alpha", alpha), _chance("beta", beta))
    mean = right * paid + (1 - right) * lucky
    deviation = (mean * (1 - mean)).sqrt()
    kappa = advantage_gap(mean, group_size, std=std, baseline=baseline)
    gain = kappa * (paid - lucky)
    return AdvantageTheory((1 - right) * gain, -right * gain, kappa, mean, deviation)


def advantage_gap(
    mean: Chance, group_size: int | None = None, *, std: Std = "population", baseline: Baseline = "mean"
) -> Float[Tensor, "..."]:
    """κ: by how much the expected advantage of reward 1 exceeds that of reward 0, where rewards have this mean.

    A sum over how many of the other G − 1 completions are right. The limit of large groups is 1/σ, and 0 where σ = 0.
    Raises as `grpo_advantage_theory` does.

    >>> advantage_gap(0.5, 2)
    tensor(1., dtype=torch.float64)
    """
    mu = _chance("mean", mean)
    if std not in ("population", "sample", "none"):
        raise ValueError(f"std is population, sample or none, not {std!r}")
    if baseline not in ("mean", "loo"):
        raise ValueError(f"baseline is mean or loo, not {baseline!r}")
    if group_size is None:
        if std == "none":
            return torch.ones_like(mu)
        deviation = (mu * (1 - mu)).sqrt()
        return torch.where(deviation > 0, 1 / deviation, 0.0)
    if group_size < 2:
        raise ValueError(f"group_size={group_size}: there is nothing to compare with; it must be at least 2")
    others = torch.arange(group_size, dtype=torch.float64, device=mu.device)
    weight = torch.from_numpy(
        np.asarray(stats.binom.pmf(others.cpu().numpy(), group_size - 1, mu[..., None].cpu().numpy()))
    ).to(mu.device)
    gap = _advantage(1, others, group_size, std, baseline) - _advantage(0, others, group_size, std, baseline)
    return weight @ gap


def _advantage(reward: int, others: Tensor, size: int, std: Std, baseline: Baseline) -> Tensor:
    share = (others + reward) / size
    away = reward - share
    if baseline == "loo":
        away = away * size / (size - 1)
    if std == "none":
        return away
    deviation = (share * (1 - share)).sqrt()
    if std == "sample":
        deviation = deviation * math.sqrt(size / (size - 1))
    return torch.where(deviation > 0, away / deviation, 0.0)


def simulate_policy(
    p_c: float,
    alpha: float,
    beta: float,
    *,
    group_size: int = 8,
    groups: int = 16,
    lr: float = 0.3,
    steps: int = 300,
    runs: int = 1,
    std: Std = "population",
    baseline: Baseline = "mean",
    generator: torch.Generator | None = None,
) -> Float[Tensor, "runs steps"]:
    """p_c over training of a policy that only chooses between right and wrong reasoning and is paid for answers alone.

    The policy is sigmoid(θ), updated by REINFORCE with group advantages; the first column is the start, so there are
    `steps` + 1. Raises ValueError for a start outside (0, 1), and as `grpo_advantage_theory` does.

    >>> simulate_policy(0.2, 0.9, 0.3, runs=5)[:, -1]  # near 1: right reasoning pays
    """
    grpo_advantage_theory(p_c, alpha, beta, group_size, std=std, baseline=baseline)
    if not 0 < p_c < 1:
        raise ValueError(
            f"p_c={p_c}: a policy that never or always reasons rightly cannot learn; start between 0 and 1"
        )
    theta = torch.full((runs,), math.log(p_c / (1 - p_c)), dtype=torch.float64)
    # The advantage of each reward by the number of right answers among the others, looked up rather than recomputed.
    others = torch.arange(group_size, dtype=torch.float64)
    table = torch.stack([_advantage(reward, others, group_size, std, baseline) for reward in (0, 1)])
    path = [theta.sigmoid()]
    for _ in range(steps):
        now = path[-1][:, None, None]
        drawn = torch.rand(2, runs, groups, group_size, dtype=torch.float64, generator=generator)
        is_right = drawn[0] < now
        reward = (drawn[1] < torch.where(is_right, alpha, beta)).long()
        advantage = table[reward, reward.sum(2, keepdim=True) - reward]
        theta = theta + lr * (advantage * (is_right.double() - now)).mean((1, 2))
        path.append(theta.sigmoid())
    return torch.stack(path, 1)


@dataclass(frozen=True, eq=False)
class Estimates:
    """Shares and the ends of their Wilson intervals; NaN where nothing was seen to estimate from."""

    value: Float[Tensor, "..."]
    low: Float[Tensor, "..."]
    high: Float[Tensor, "..."]


@dataclass(frozen=True, eq=False)
class LogicPrior:
    """p_c, α and β over all prompts and of each, and the tests of α > β.

    `p_value` is that of a one-sided Cochran–Mantel–Haenszel test, which compares within prompts: pooling prompts of
    different difficulty would show α > β where no prompt has it. `prompt_p_value` is each prompt's exact one-sided Fisher
    test. `difference` is α − β over all prompts, its interval a bootstrap over prompts (NaN for one prompt).
    """

    p_c: Estimates
    alpha: Estimates
    beta: Estimates
    prompt_p_c: Estimates
    prompt_alpha: Estimates
    prompt_beta: Estimates
    difference: Estimates
    p_value: float
    prompt_p_value: Float[Tensor, " prompts"]


def estimate_logic_prior(
    chain_correct: Bool[Tensor, "prompts answers"],
    answer_correct: Bool[Tensor, "prompts answers"],
    judged: Bool[Tensor, "prompts answers"] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    generator: torch.Generator | None = None,
) -> LogicPrior:
    """p_c, α and β from judged chains of thought; those of wrong answers must be judged too, or a sample of them.

    Where `judged` leaves chains out, right and wrong answers must each have been sampled at random; their chains are
    weighted by how many they stand for, and intervals use the effective number of chains. Raises ValueError when the
    chains of right answers, or of wrong ones, have not been judged at all.

    >>> estimate_logic_prior(chain_correct, answer_correct).p_value  # small: α > β
    """
    seen = torch.ones_like(answer_correct) if judged is None else judged
    weight = torch.zeros(answer_correct.shape, dtype=torch.float64, device=answer_correct.device)
    for name, stratum in (("right", answer_correct), ("wrong", ~answer_correct)):
        num, num_seen = int(stratum.sum()), int((stratum & seen).sum())
        if num and not num_seen:
            raise ValueError(f"no chain of a {name} answer was judged; judge a random sample of them too")
        weight[stratum & seen] = num / max(num_seen, 1)
    is_right = chain_correct & seen
    # Columns: all, right chains, right chains with right answers, wrong chains with right answers.
    parts = torch.stack([seen, is_right, is_right & answer_correct, seen & ~is_right & answer_correct])
    sums, squares = ((parts * power).sum(2).T for power in (weight, weight.square()))
    p_c, alpha, beta = _estimated(sums.sum(0), squares.sum(0), confidence)
    of_prompts = _estimated(sums, squares, confidence)
    value = alpha.value - beta.value
    low, high = _difference_interval(sums, resamples, confidence, generator)
    p_value, each = _tests(parts.sum(2).T.cpu().numpy(), (seen & answer_correct).sum(1).cpu().numpy())
    return LogicPrior(
        p_c, alpha, beta, *of_prompts, Estimates(value, low, high), p_value, torch.from_numpy(each).to(value.device)
    )


def _estimated(sums: Tensor, squares: Tensor, confidence: float) -> tuple[Estimates, Estimates, Estimates]:
    all_, right, right_right, wrong_right = sums.unbind(-1)
    square, right_square = squares[..., 0], squares[..., 1]
    return (
        _wilson(right, all_, square, confidence),
        _wilson(right_right, right, right_square, confidence),
        _wilson(wrong_right, all_ - right, square - right_square, confidence),
    )


def _wilson(hits: Tensor, total: Tensor, squares: Tensor, confidence: float) -> Estimates:
    z = float(stats.norm.ppf((1 + confidence) / 2))
    share = hits / total
    count = total.square() / squares  # effective, after Kish; the number itself where all weights are the same
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    reach = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count.square())).sqrt()
    return Estimates(share, (middle - reach).clamp(min=0), (middle + reach).clamp(max=1))


def _difference_interval(
    sums: Tensor, resamples: int, confidence: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    if len(sums) < 2 or not resamples:
        nan = sums.new_tensor(math.nan)
        return nan, nan
    differences = []
    for _ in range(resamples):
        drawn = torch.randint(len(sums), (len(sums),), generator=generator, device=sums.device)
        all_, right, right_right, wrong_right = sums[drawn].sum(0)
        differences.append(right_right / right - wrong_right / (all_ - right))
    edges = sums.new_tensor([(1 - confidence) / 2, (1 + confidence) / 2])
    low, high = torch.stack(differences).nanquantile(edges)
    return low, high


def _tests(counts: np.ndarray, answers: np.ndarray) -> tuple[float, np.ndarray]:
    # Given both margins of a prompt's table, the number of right chains with right answers is hypergeometric if α = β; that
    # stays so where right and wrong answers were sampled for judging at different rates.
    total, chains, both = counts[:, 0], counts[:, 1], counts[:, 2]
    expected = chains * answers / np.maximum(total, 1)
    variance = expected * (total - chains) * (total - answers) / np.maximum(total * (total - 1), 1)
    each = np.asarray(stats.hypergeom.sf(both - 1, total, chains, answers), dtype=np.float64)
    if not variance.any():
        return math.nan, each
    return float(stats.norm.sf((both - expected).sum() / math.sqrt(variance.sum()))), each


def _chance(name: str, value: Chance) -> Tensor:
    chance: Tensor = torch.as_tensor(value, dtype=torch.float64)
    if bool(((chance < 0) | (chance > 1)).any()) or bool(chance.isnan().any()):
        raise ValueError(f"{name} is a chance: it must lie between 0 and 1")
    return chance
