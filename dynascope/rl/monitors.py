"""What an engineer looks at during RL, out of what a rollout already holds: nothing is generated for it."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dynascope.rl.advantages import Groups
from dynascope.rl.rollout import Rollout


def watch_rollout(
    rollout: Rollout, rewards: Float[Tensor, " N"], correct: Bool[Tensor, " N"]
) -> dict[str, Float[Tensor, ""]]:
    """The health of a rollout as numbers on the device, NaN where there is nothing to take a mean of.

    - `rollout/reward`, `rollout/correct`: means over completions.
    - `rollout/length`, `rollout/length_right`, `rollout/length_wrong`, `rollout/length_stopped`: mean tokens of all, of
      right, of wrong, and of completions that ended by themselves.
    - `rollout/truncated`: share at the length limit (2503.18892, appendix C; healthy below 0.05).
    - `rollout/learnable`, `rollout/solved`, `rollout/unsolved`: shares of prompts with some, with only, and without
      right completions.
    - `rollout/surprise`: mean −log π of the sampled tokens, in nats: an unbiased estimate of the entropy.
    - `rollout/off_policy`: mean log-ratio of the distribution drawn from to the behaviour policy, in nats.

    >>> told = watch_rollout(rollout, rewards, rewards > 0)
    """
    lengths, is_right = rollout.lengths.float(), correct.float()
    count = rollout.mask.sum().clamp(min=1)
    sizes = rollout.group_ids.bincount().float()
    sizes = sizes[sizes > 0]
    right = rollout.group_ids.bincount(is_right)[rollout.group_ids.bincount() > 0]
    learnable = (right > 0) & (right < sizes)
    drift = rollout.sampling_log_probs - rollout.behaviour_log_probs
    return {
        "rollout/reward": rewards.mean(),
        "rollout/correct": is_right.mean(),
        "rollout/length": lengths.mean(),
        "rollout/length_right": lengths[correct].mean(),
        "rollout/length_wrong": lengths[~correct].mean(),
        "rollout/length_stopped": lengths[~rollout.is_truncated].mean(),
        "rollout/truncated": rollout.is_truncated.float().mean(),
        "rollout/learnable": learnable.float().mean(),
        "rollout/solved": (right == sizes).float().mean(),
        "rollout/unsolved": (right == 0).float().mean(),
        "rollout/surprise": -rollout.behaviour_log_probs.sum() / count,
        "rollout/off_policy": drift.sum() / count,
    }


def watch_advantages(
    rollout: Rollout, advantage: Float[Tensor, " N"] | Float[Tensor, "N T"]
) -> dict[str, Float[Tensor, ""]]:
    """Which way an objective pushes the sampled tokens, before any update.

    - `advantage/pushed_up`, `advantage/pushed_down`: shares of tokens with a positive and a negative advantage.
    - `advantage/rms`: root mean square over tokens; at one learning rate it says how large updates are.
    - `advantage/entropy_covariance`: `entropy_covariance` over tokens.

    >>> told = watch_advantages(rollout, objective.advantages(batch))
    """
    by_token = advantage if advantage.ndim == 2 else advantage[:, None].expand(rollout.mask.shape)
    by_token, count = by_token * rollout.mask, rollout.mask.sum().clamp(min=1)
    return {
        "advantage/pushed_up": (by_token > 0).sum() / count,
        "advantage/pushed_down": (by_token < 0).sum() / count,
        "advantage/rms": (by_token.square().sum() / count).sqrt(),
        "advantage/entropy_covariance": entropy_covariance(rollout.behaviour_log_probs, by_token, rollout.mask),
    }


def entropy_covariance(
    log_probs: Float[Tensor, "*shape"], advantage: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | None = None
) -> Float[Tensor, ""]:
    """Cov(log π, A) over sampled actions: tokens, or whole completions; entropy falls at its rate where it is positive.

    Exact for a step of natural gradient on the logits of one softmax (2510.00911, proposition 1;
    `dynascope.theory.riskpo.entropy_rate`), an indicator for a language model.

    >>> entropy_covariance(torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 0.0]))
    tensor(0.2500)
    """
    weight = torch.ones_like(log_probs) if mask is None else mask.to(log_probs.dtype)
    count = weight.sum().clamp(min=1)
    kept, pushed = log_probs.where(weight > 0, 0.0), advantage.where(weight > 0, 0.0)
    away = (kept - kept.sum() / count) * weight
    return (away * pushed).sum() / count


def learnable_groups(rewards: Float[Tensor, " N"], group_ids: Int[Tensor, " N"]) -> Bool[Tensor, " N"]:
    """Which completions belong to a prompt whose rewards differ: what DAPO's dynamic sampling keeps (2503.14476).

    >>> learnable_groups(torch.tensor([1.0, 0, 1, 1]), torch.tensor([0, 0, 1, 1]))
    tensor([ True,  True, False, False])
    """
    return ~Groups.of(group_ids).is_uniform(rewards)
