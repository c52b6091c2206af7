"""Any policy objective inside verl: its advantage and its loss in verl's two registries, on a cluster of verl's."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynascope.rl.batch import PolicyBatch, per_token
from dynascope.rl.objective import PolicyObjective
from dynascope.rl.presets import preset
from dynascope.rl.tasks.rewards import Reward


def register(objective: PolicyObjective | str, name: str | None = None) -> None:
    """Make an objective known to verl, in every process that imports this call (verl's `trainer.external_lib` names a module).

    Then `algorithm.adv_estimator=NAME` takes its advantage and `actor_rollout_ref.actor.policy_loss.loss_mode=NAME` its loss.
    The objective's own clip and denominator count, not verl's; terms against a reference model stay verl's
    (`actor.use_kl_loss`). verl's weights against the rollout engine's drift are applied.

    Raises ValueError without verl, for an objective without a name, and for one that needs what verl does not hand over:
    entropies, hidden states, another model's log-probabilities, values, groups within the loss.

    >>> register("dapo", "dynascope-dapo")
    """
    try:
        from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss
    except ImportError as error:
        raise ValueError(f"this needs verl (pip install verl), which cannot be imported: {error}") from None
    chosen = preset(objective) if isinstance(objective, str) else objective
    name = name or (objective if isinstance(objective, str) else None)
    if name is None:
        raise ValueError("an objective of your own needs a name: register(objective, 'mine')")
    missing = (chosen.rollout_needs - {"correct"}) | (chosen.loss_needs - {"behaviour_log_probs"})
    if missing:
        raise ValueError(f"verl does not give {', '.join(sorted(missing))}, which this objective needs")
    if chosen.aggregation == "group-token-mean":
        raise ValueError(
            "verl's losses do not see which completions share a prompt, as aggregation='group-token-mean' must"
        )
    terms = _Terms(chosen)
    register_adv_est(name)(terms.advantages)
    register_policy_loss(name)(terms.loss)


def verl_score(reward: Reward, column: str = "answer") -> Callable[..., list[float]]:
    """A reward of the loop and of TRL as the function that verl's reward manager `batch` calls with a whole batch.

    The reward gets `completions`, the ground truths as `column`, and verl's `data_source` and `extra_info`; whoever says nothing
    of a completion (None) gives it 0. In a module of yours, which verl's `custom_reward_function.path` and `.name` name:

    >>> compute_score = verl_score(JudgeReward(ConsistencyReward(referee)), column="label")
    """

    def compute_score(
        data_sources: Iterable[Any],
        solution_strs: Iterable[str],
        ground_truths: Iterable[Any],
        extra_infos: Iterable[Any],
        **more: Any,
    ) -> list[float]:
        columns = {column: list(ground_truths), "data_source": list(data_sources), "extra_info": list(extra_infos)}
        values = reward(completions=list(solution_strs), **columns, **more)
        return [0.0 if value is None else float(value) for value in values]

    return compute_score


class _Terms:
    """An objective in the signatures of verl's registries."""

    def __init__(self, objective: PolicyObjective) -> None:
        self.objective = objective

    def advantages(
        self, token_level_rewards: Tensor, response_mask: Tensor, index: Any = None, config: Any = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """(advantages, returns), each (N, T)."""
        mask = response_mask.bool()
        rewards = token_level_rewards.sum(-1)
        groups = np.arange(len(rewards)) if index is None else np.unique(index, return_inverse=True)[1]
        group_ids = torch.as_tensor(groups, device=mask.device)
        batch = PolicyBatch(
            mask=mask, rewards=rewards, group_ids=group_ids, correct=rewards > 0, max_length=mask.shape[1]
        )
        advantage = self.objective.advantages(batch)
        by_token = per_token(advantage) * mask
        return by_token, by_token

    def loss(
        self,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """(loss, metrics); the whole step's tokens and completions come from verl's own count of them."""
        whole = getattr(config, "global_batch_info", None) or {}
        ranks = whole.get("dp_size", 1)
        tokens, completions = (whole.get(one) for one in ("batch_num_tokens", "global_batch_size"))
        mask = response_mask.bool()
        batch = PolicyBatch(
            mask=mask,
            rewards=advantages.new_zeros(len(mask)),
            group_ids=torch.arange(len(mask), device=mask.device),
            advantage=advantages if rollout_is_weights is None else advantages * rollout_is_weights,
            log_probs=log_prob,
            behaviour_log_probs=old_log_prob,
            max_length=mask.shape[1],
            num_tokens=None if tokens is None else torch.as_tensor(tokens / ranks),
            num_completions=None if completions is None else torch.as_tensor(completions / ranks),
        )
        loss, metrics = self.objective.loss(batch)
        told = torch.stack([one.float() for one in metrics.values()]).tolist()
        return loss, {f"actor/{name}": value for name, value in zip(metrics, told, strict=True)}
