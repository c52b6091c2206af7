"""Any policy objective inside verl: its advantage and its loss in verl's two registries, or as the actor's whole loss."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynascope.rl.batch import PolicyBatch, per_token
from dynascope.rl.objective import PolicyObjective
from dynascope.rl.presets import preset
from dynascope.rl.tasks.rewards import Reward, guarded


def register(objective: PolicyObjective | str, name: str | None = None, *, loss: bool = True) -> PolicyObjective:
    """Make an objective known to verl, in every process that imports this call (verl's `trainer.external_lib` names a module).

    Then `algorithm.adv_estimator=NAME` takes its advantage and `actor_rollout_ref.actor.policy_loss.loss_mode=NAME` its loss.
    The objective's own clip and denominator count, not verl's; terms against a reference model and entropy bonuses are verl's
    (`actor.use_kl_loss`, `actor.entropy_coeff`), and so is the KL in the reward of reinforce_pp and stable_reinforce
    (`algorithm.use_kl_in_reward`, `algorithm.kl_ctrl.kl_coef`), which reaches them token by token. Right is a score above 0
    where verl hands scores to estimators, else a reward above 0, from which that KL has been taken. verl's weights against the
    rollout engine's drift are applied. A length limit in the denominator (dr_grpo) is `actor.loss_scale_factor`.

    verl's registered losses see no entropies and no other model's log-probabilities; for slots that read them register the
    advantage alone, with `loss=False`, and hand `actor_loss` to the actor.

    Returns the objective as it was registered. verl neither keeps the state of an estimator nor logs what it tells of a rollout:
    `state_dict`, `load_state_dict` and `rollout_metrics` of what is returned are for a trainer of yours.

    Raises ValueError without verl, for an objective without a name, and for one that needs what verl does not hand over.

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
    if getattr(chosen.advantage, "kl_coefficient", 0):
        own: Any = chosen.advantage
        chosen = chosen.having(advantage=replace(own, kl_coefficient=0.0))
    missing = sorted(chosen.rollout_needs - {"correct"})
    if missing:
        raise ValueError(f"verl's estimators do not see {', '.join(missing)}, which this objective's advantage needs")
    terms = _Terms(chosen)
    if loss:
        _check_loss(chosen, frozenset({"behaviour_log_probs"}))
        register_policy_loss(name)(terms.loss)
    register_adv_est(name)(terms.advantages)
    return chosen


def actor_loss(objective: PolicyObjective | str, *, max_length: int | None = None) -> "ActorLoss":
    """An objective as the whole loss of verl's actor, which sees entropies and other models where registered losses do not.

    In a trainer of verl's 0.9 (`register_trainer`, named by `trainer.v1.trainer_mode`), beside `register(…, loss=False)`:

    >>> class Trainer(PPOTrainerSync):
    ...     def on_init_end(self):
    ...         self.actor_rollout_wg.set_loss_fn(actor_loss("hapo"))

    Entropies come with `actor.calculate_entropy=true`, the start model with `actor.use_kl_loss=true` and a teacher with
    `distillation.enabled=true` and an estimator for `loss_mode`; verl's own coefficients no longer count. `max_length` is the
    limit of completions, where it is in the denominator. Right is what verl's reward manager scores above 0.

    Raises ValueError for an objective that needs more than that: logits, hidden states, groups or the step within the loss.
    """
    chosen = preset(objective) if isinstance(objective, str) else objective
    _check_loss(chosen, frozenset({"behaviour_log_probs", "correct", *_WHERE}))
    return ActorLoss(chosen, max_length)


def _check_loss(objective: PolicyObjective, given: frozenset[str]) -> None:
    missing = objective.loss_needs - given
    if missing:
        elsewhere = "" if missing - set(_WHERE) - {"correct"} else "; actor_loss has it"
        raise ValueError(
            f"verl's losses do not see {', '.join(sorted(missing))}, which this objective needs{elsewhere}"
        )
    if objective.aggregation == "group-token-mean":
        raise ValueError(
            "verl's losses do not see which completions share a prompt, as aggregation='group-token-mean' must"
        )
    if any(term.norm == "kept" and term.keep is not None for term in objective.kl):
        raise ValueError(
            "verl's micro-batches do not know how many tokens the whole step keeps: leave norm='all', or mean over kept tokens "
            "would grow with their number"
        )
    if any(callable(term.coefficient) for term in objective.kl):
        raise ValueError(
            "verl's losses do not see the step, so a coefficient with a schedule would never move: give a number"
        )


def verl_score(reward: Reward, column: str = "answer") -> Callable[..., list[float]]:
    """A reward of the loop and of TRL as the function that verl's reward manager `batch` calls with a whole batch.

    The reward gets `completions`, the ground truths as `column`, and verl's `data_source` and `extra_info`; whoever says nothing
    of a completion (None) gives it 0. As with `guarded`, what raises or is not finite ends training in one line. In a module of
    yours, which verl's `custom_reward_function.path` and `.name` name:

    >>> compute_score = verl_score(JudgeReward(ConsistencyReward(referee)), column="label")
    """
    checked = guarded(reward)

    def compute_score(
        data_sources: Iterable[Any],
        solution_strs: Iterable[str],
        ground_truths: Iterable[Any],
        extra_infos: Iterable[Any],
        **more: Any,
    ) -> list[float]:
        columns = {column: list(ground_truths), "data_source": list(data_sources), "extra_info": list(extra_infos)}
        values = checked(completions=list(solution_strs), **columns, **more)
        return [0.0 if value is None else value for value in values]

    return compute_score


class _Terms:
    """An objective in the signatures of verl's registries."""

    def __init__(self, objective: PolicyObjective) -> None:
        self.objective = objective

    def advantages(
        self,
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Any = None,
        config: Any = None,
        token_level_scores: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """(advantages, returns), each (N, T)."""
        mask = response_mask.bool()
        rewards = token_level_rewards.sum(-1)
        scores = rewards if token_level_scores is None else token_level_scores.sum(-1)
        groups = np.arange(len(rewards)) if index is None else np.unique(index, return_inverse=True)[1]
        group_ids = torch.as_tensor(groups, device=mask.device)
        batch = PolicyBatch(
            mask=mask,
            rewards=rewards,
            group_ids=group_ids,
            token_rewards=token_level_rewards,
            correct=scores > 0,
            max_length=mask.shape[1],
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
        given = {
            "response_mask": response_mask,
            "old_log_probs": old_log_prob,
            "advantages": advantages,
            "rollout_is_weights": rollout_is_weights,
        }
        return _loss(self.objective, log_prob, given, whole, whole.get("loss_scale_factor"))


@dataclass(frozen=True)
class ActorLoss:
    """A policy objective as a loss of verl's engines: `actor_loss` makes it."""

    objective: PolicyObjective
    max_length: int | None = None

    def __call__(
        self, model_output: Mapping[str, Any], data: Mapping[str, Any], dp_group: Any = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """(loss, metrics) of a micro-batch, as verl's own `ppo_loss`; ValueError where verl's settings leave out a field."""
        from verl.utils.metric import AggregationType, Metric
        from verl.workers.utils.padding import no_padding_2_padding

        needs = self.objective.loss_needs
        log_probs, more = no_padding_2_padding(model_output["log_probs"], data), {}
        for name in sorted(needs & set(_WHERE)):
            source, key, setting = _WHERE[name]
            value = (model_output if source == "model" else data).get(key, None)
            if value is None:
                raise ValueError(f"this objective needs {name}, which verl works out with {setting}")
            more[name] = _padded(value) if source == "response" else no_padding_2_padding(value, data)
        if "teacher_log_probs" in more:  # one token is listed at each place
            more["teacher_log_probs"] = more["teacher_log_probs"].squeeze(-1)
        if "correct" in needs:
            more["correct"] = _padded(data["rm_scores"]).sum(-1) > 0
        names = ("response_mask", "old_log_probs", "advantages", "rollout_is_weights")
        given = {name: None if (value := data.get(name, None)) is None else _padded(value) for name in names}
        whole = {name: data[name] for name in ("dp_size", "batch_num_tokens", "global_batch_size")}
        loss, told = _loss(self.objective, log_probs, given, whole, self.max_length, **more)
        metrics = {name: Metric(value=value, aggregation=AggregationType.MEAN) for name, value in told.items()}
        # Micro-batches add up to the whole step's loss.
        return loss, metrics | {"actor/pg_loss": Metric(value=loss, aggregation=AggregationType.SUM)}


_WHERE = {
    "entropy": ("model", "entropy", "actor.calculate_entropy=true"),
    "ref_log_probs": ("response", "ref_log_prob", "actor.use_kl_loss=true"),
    "teacher_log_probs": (
        "sequence",
        "teacher_logprobs",
        "distillation.enabled=true and an estimator for its loss_mode",
    ),
}
"""What verl's actor may know: from the model's pass, or of responses or whole sequences in the batch; its name; its setting."""


def _padded(values: Tensor) -> Tensor:
    return values.to_padded_tensor(0) if values.is_nested else values


def _loss(
    objective: PolicyObjective,
    log_probs: Tensor,
    given: Mapping[str, Tensor | None],
    whole: Mapping[str, Any],
    max_length: int | None,
    **more: Any,
) -> tuple[Tensor, dict[str, float]]:
    """The loss and its metrics as numbers, `given` by verl's names; `whole` counts the step's tokens and completions."""
    if objective.aggregation == "max-length" and max_length is None:
        raise ValueError(
            "this objective divides by the length limit, which verl's batches do not say: set actor.loss_scale_factor, or "
            "max_length of actor_loss, to data.max_response_length"
        )
    ranks = whole.get("dp_size") or 1
    tokens, completions = (whole.get(one) for one in ("batch_num_tokens", "global_batch_size"))
    mask, advantages, weights = given["response_mask"], given["advantages"], given["rollout_is_weights"]
    assert mask is not None
    assert advantages is not None
    batch = PolicyBatch(
        mask=mask.bool(),
        rewards=advantages.new_zeros(len(mask)),
        group_ids=torch.arange(len(mask), device=mask.device),
        advantage=advantages if weights is None else advantages * weights,
        log_probs=log_probs,
        behaviour_log_probs=given["old_log_probs"],
        max_length=max_length,
        num_tokens=None if tokens is None else torch.as_tensor(tokens / ranks),
        num_completions=None if completions is None else torch.as_tensor(completions / ranks),
        **more,
    )
    loss, metrics = objective.loss(batch)
    told = torch.stack([one.float() for one in metrics.values()]).tolist()
    return loss, {f"actor/{name}": value for name, value in zip(metrics, told, strict=True)}
