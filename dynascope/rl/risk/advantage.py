"""The advantage of RiskPO: what a risk measure of bundled rewards asks of each response (2510.00911)."""

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dynascope.rl.batch import PolicyBatch
from dynascope.rl.risk.bundles import Bundles, Credit, bundle, unbundle
from dynascope.rl.risk.measures import (
    cvar_advantage,
    mvar_advantage,
    quantile_integral,
    released_mvar_advantage,
    rvar_advantage,
    seeking_advantage,
)
from dynascope.rl.risk.quantiles import QuantileTracker
from dynascope.rl.risk.ranks import gathered

Measure = Literal["mvar", "rvar", "cvar", "mean", "seeking", "released", "released-plain"]
Levels = Literal["track", "batch", "mix"]

_FEWEST_IN_TAIL = 5
_MOST_LEFT_OUT = 0.2


class RiskAdvantage:
    """An advantage estimator with a state: quantiles of bundle scores, followed from rollout to rollout.

    Every rollout is bundled anew: questions in the order of their group ids, `bundle_size` a bundle, one response each.
    All tokens of a bundle's responses get the bundle's advantage, from the quantiles known *before* this rollout; then
    those are updated. The state is the object's, so it outlives the batch, and goes to checkpoints. Where questions have
    unequal numbers of responses, those beyond the fewest get 0 (`metrics["risk/dropped"]` counts them): filter whole
    questions rather than responses.

    Advantages of the averse measures are never positive, so they push down alone; `having(post=(center,))` has the same
    expected gradient, and `unit_rms` makes the sizes of steps comparable (`dynascope.rl.advantages`).

    Args:
        alpha: Level below which the tail begins.
        beta: Level above which a score asks for nothing; at 1, which no stream tells in time, its quantile is the highest
            score of the rollout, so that no score is left out.
        omega: How much more the tail weighs.
        bundle_size: Questions in a bundle; 1 leaves each response its own reward.
        measure: "mvar" is averse and the paper's, "mean" neutral, "seeking" its ablation; "rvar" and "cvar" leave out the
            lower tail, or all else. "released" is the code's form: other weights, and divided by the deviation of the G
            scores of a set, unless that is below 1e-6; "released-plain" the same without the natural baseline.
        credit: Among the members of a bundle, as in `unbundle`.
        quantiles: "track" follows the stream; "batch" takes those of the G scores of a set, into which the released
            trainer falls silently; "mix" their mean.
        uses_tracked_baseline: Take off the advantage's mean over the tracked quantiles.
        permutes, remainder: As in `bundle`.
        lr: Of the tracker, in units of scores.
        seed: Of the permutations, together with the number of rollouts seen.
        across_ranks: Of the tracker; False where every process sees the whole rollout.

    Raises ValueError for levels that are not 0 < alpha < beta <= 1 (below 1 for "seeking"), or another name.

    >>> riskpo = grpo.having(advantage=RiskAdvantage(), ratio="sequence")
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        alpha: float = 0.2,
        beta: float = 0.8,
        omega: float = 0.5,
        *,
        bundle_size: int = 5,
        measure: str = "mvar",
        credit: str = "uniform",
        quantiles: str = "track",
        uses_tracked_baseline: bool = False,
        permutes: bool = True,
        remainder: str = "normalize",
        lr: float = 0.1,
        seed: int = 0,
        across_ranks: bool = False,
    ) -> None:
        if not 0 < alpha < beta <= 1:
            raise ValueError(f"alpha={alpha} and beta={beta} must be 0 < alpha < beta <= 1")
        if measure == "seeking" and beta == 1:
            raise ValueError("measure='seeking' weighs what lies above beta, so beta must be below 1")
        self.alpha, self.beta, self.omega = alpha, beta, omega
        self.bundle_size, self.credit, self.permutes, self.remainder = bundle_size, credit, permutes, remainder
        self.measure, self.quantiles, self.uses_tracked_baseline = measure, quantiles, uses_tracked_baseline
        for name, value, known in (
            ("measure", measure, get_args(Measure)),
            ("credit", credit, get_args(Credit)),
            ("quantiles", quantiles, get_args(Levels)),
        ):
            if value not in known:
                raise ValueError(f"{name} is {', '.join(known)}, not {value!r}")
        grid = [round(0.05 * place, 2) for place in range(1, 20)]
        followed = [level for level in (alpha, beta) if level < 1]
        self.tracker = QuantileTracker([*grid, *followed], lr, across_ranks=across_ranks)
        self.seed, self.num_rollouts = seed, 0
        self.metrics: Mapping[str, Tensor] = {}
        """Of the last rollout: the two quantiles used, the shares of bundle scores below them (which come to alpha and beta
        on average if the tracker follows), measures of the scores, and the number of responses dropped."""

    def __call__(self, batch: PolicyBatch) -> Float[Tensor, " N"]:
        """The advantage of every completion. Warns once when a rollout has too few bundles for its lower tail."""
        rows = rows_by_question(batch.group_ids)
        rewards = batch.rewards[rows].float()
        bundles = bundle(
            rewards,
            self.bundle_size,
            generator=torch.Generator().manual_seed(self.seed + self.num_rollouts),
            permutes=self.permutes,
            remainder=self.remainder,
        )
        if not self.num_rollouts:
            self._warn_of_a_thin_tail(bundles)
        self.num_rollouts += 1
        is_first = self.tracker.values is None
        if is_first:
            self.tracker.update(bundles.scores)
        low, high = self._quantiles(bundles.scores)
        advantage = self._advantage(bundles.scores, low, high)
        if self.uses_tracked_baseline:
            advantage = advantage - self._tracked_mean(low, high)
        if self.measure.startswith("released") and bundles.scores.shape[1] > 1:
            deviation = bundles.scores.std(1, keepdim=True)
            # With tracked quantiles equal scores have an advantage, and 0 for a deviation.
            advantage = advantage / (deviation + 1e-6).where(deviation >= 1e-6, 1.0)
        if not is_first:
            self.tracker.update(bundles.scores)

        scores = bundles.scores.flatten()
        tail, middle = (quantile_integral(scores, *ends) for ends in ((0, self.alpha), (self.alpha, self.beta)))
        self.metrics = {
            "risk/quantile_low": low.mean(),
            "risk/quantile_high": high.mean(),
            "risk/below_low": (bundles.scores < low).float().mean(),
            "risk/below_high": (bundles.scores < high).float().mean(),
            "risk/mean": scores.mean(),
            "risk/cvar": tail / self.alpha,
            "risk/mvar": (1 + self.omega) * tail + middle,
            "risk/dropped": torch.tensor(float(len(batch) - rows.numel()), device=scores.device),
        }
        told = torch.zeros_like(batch.rewards, dtype=advantage.dtype)
        told[rows] = unbundle(advantage, bundles, rewards, self.credit)
        return told

    def _advantage(self, scores: Tensor, low: Tensor, high: Tensor) -> Tensor:
        alpha, beta, omega = self.alpha, self.beta, self.omega
        match self.measure:
            case "mvar":
                return mvar_advantage(scores, low, high, omega)
            case "rvar":
                return rvar_advantage(scores, low, high, alpha=alpha, beta=beta)
            case "cvar":
                return cvar_advantage(scores, low, alpha=alpha)
            case "seeking":
                return seeking_advantage(scores, low, high, omega, alpha=alpha, beta=beta)
            case "mean":
                return scores - scores.mean()
        has_baseline = self.measure == "released"
        return released_mvar_advantage(scores, low, high, omega, alpha=alpha, beta=beta, natural_baseline=has_baseline)

    def _quantiles(self, scores: Float[Tensor, "K G"]) -> tuple[Tensor, Tensor]:
        highest = gathered(scores.flatten()) if self.tracker.across_ranks else scores
        tracked = [
            self.tracker.value(level).to(scores) if level < 1 else highest.max() for level in (self.alpha, self.beta)
        ]
        if self.quantiles == "track":
            return tracked[0], tracked[1]
        own = [scores.quantile(level, dim=1, keepdim=True) for level in (self.alpha, self.beta)]
        if self.quantiles == "batch":
            return own[0], own[1]
        return (tracked[0] + own[0]) / 2, (tracked[1] + own[1]) / 2

    def _tracked_mean(self, low: Tensor, high: Tensor) -> Tensor:
        """E[A(R)] = ∫ A(F⁻¹(u)) du by the trapezoid rule over the tracked levels."""
        assert self.tracker.values is not None
        values = self.tracker.values.to(low)
        levels = torch.tensor(self.tracker.levels, dtype=low.dtype, device=low.device)
        at = self._advantage(values, low, high)
        return torch.trapezoid(at, levels, dim=-1)[..., None] / (levels[-1] - levels[0])

    def _warn_of_a_thin_tail(self, bundles: Bundles) -> None:
        in_tail = self.alpha * bundles.scores.numel()
        if in_tail < _FEWEST_IN_TAIL:
            warnings.warn(
                f"only {in_tail:.1f} of {bundles.scores.numel()} bundles lie below the quantile alpha={self.alpha}, so the "
                "lower tail is mostly noise; use more prompts or responses, smaller bundles, or a larger alpha",
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        """The tracked quantiles and the number of rollouts, for a checkpoint."""
        return {"tracker": self.tracker.state_dict(), "num_rollouts": self.num_rollouts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.tracker.load_state_dict(state["tracker"])
        self.num_rollouts = state["num_rollouts"]


def rows_by_question(group_ids: Int64[Tensor, " N"]) -> Int64[Tensor, "P G"]:
    """Row numbers of each question's responses, as many as the question with the fewest has, in any order of rows.

    Warns where that leaves out more than a fifth of the responses.

    >>> rows_by_question(torch.tensor([7, 3, 7, 3, 7]))
    tensor([[1, 3],
            [0, 2]])
    """
    _, counts = group_ids.unique(return_counts=True)
    starts, fewest = counts.cumsum(0) - counts, int(counts.min())
    left_out = len(group_ids) - fewest * len(counts)
    if left_out > _MOST_LEFT_OUT * len(group_ids):
        warnings.warn(
            f"{left_out} of {len(group_ids)} responses are in no bundle and have no advantage, since a question has only "
            f"{fewest}; drop whole questions rather than responses",
            stacklevel=3,
        )
    return group_ids.argsort(stable=True)[starts[:, None] + torch.arange(fewest, device=counts.device)]
