"""What an engineer looks at during RL, out of what a rollout already holds: nothing is generated for it."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dynascope.rl.advantages import Groups
from dynascope.rl.batch import per_token
from dynascope.rl.reasoning.behaviours import REPETITIVE, BehaviourLabeller, compression_ratio, num_reflections
from dynascope.rl.reasoning.pass_at_k import pass_at_k
from dynascope.rl.rollout import Rollout
from dynascope.rl.tasks.rewards import name_of, texts_of


def watch_rollout(
    rollout: Rollout, rewards: Float[Tensor, " N"], correct: Bool[Tensor, " N"]
) -> dict[str, Float[Tensor, ""]]:
    """The health of a rollout as numbers on the device, NaN where there is nothing to take a mean of.

    What `watch_responses` tells, and beside it

    - `rollout/surprise`: mean −log π of the sampled tokens, in nats: an unbiased estimate of the entropy.
    - `rollout/off_policy`: mean log-ratio of the distribution drawn from to the behaviour policy, in nats.

    >>> told = watch_rollout(rollout, rewards, rewards > 0)
    """
    count = rollout.mask.sum().clamp(min=1)
    drift = rollout.sampling_log_probs - rollout.behaviour_log_probs
    return {
        **watch_responses(rollout.lengths, rollout.is_truncated, correct, rollout.group_ids, rewards=rewards),
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
    by_token = per_token(advantage).expand(rollout.mask.shape)
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


def watch_responses(
    lengths: Int[Tensor, " N"],
    is_truncated: Bool[Tensor, " N"],
    correct: Bool[Tensor, " N"],
    group_ids: Int[Tensor, " N"] | None = None,
    *,
    rewards: Float[Tensor, " N"] | None = None,
    formatted: Bool[Tensor, " N"] | None = None,
    texts: Sequence[str] | None = None,
    labeller: BehaviourLabeller | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """The monitors of zero RL (2503.18892, appendix C) from plain tensors; NaN where there is nothing to take a mean of.

    - `rollout/correct`: share of right answers. `rollout/reward`, with `rewards`: their mean, NaN being none.
    - `rollout/length`, `rollout/length_min`, `rollout/length_max`: tokens.
    - `rollout/length_right`, `rollout/length_wrong`, `rollout/length_stopped`: mean tokens of right ones, of wrong ones, and
      of those that ended by themselves (the paper's average stopped length).
    - `rollout/truncated`: share cut off at the length limit: the paper's clip ratio, which is not PPO's `policy/clip/…`;
      healthy below 0.05. `rollout/stopped`: the others.
    - `rollout/learnable`, `rollout/solved`, `rollout/unsolved`, with `group_ids`: shares of prompts with some, with only,
      and without right answers. `rollout/avg_at_n`: mean over prompts of the share of right answers; `rollout/pass_at_k/K`, of
      groups of two and more: Pass@K at powers of 2 up to the smallest group; `rollout/pass_at_k/gap`: its largest K over K = 1.
    - `rollout/formatted`, with `formatted`: share of answers in the format (boxed); `rollout/unformatted`: share of prompts
      without any such answer, with `group_ids`.
    - `rollout/reflections` (words a response) and `rollout/repetitive` (share whose text compresses to a third), with
      `texts`; `rollout/behaviours` (share with at least one) and `behaviours/NAME` (shares), with a `labeller` too.

    Give the finish reason where there is one: a response that ends by itself exactly at the limit is not truncated.

    >>> watch_responses(lengths, lengths == 8192, correct)["rollout/truncated"]
    """
    sizes = lengths.float()
    some = sizes if len(sizes) else sizes.new_full((1,), torch.nan)
    told = {
        "rollout/correct": correct.float().mean(),
        "rollout/length": sizes.mean(),
        "rollout/length_min": some.amin(),
        "rollout/length_max": some.amax(),
        "rollout/length_right": sizes[correct].mean(),
        "rollout/length_wrong": sizes[~correct].mean(),
        "rollout/length_stopped": sizes[~is_truncated].mean(),
        "rollout/truncated": is_truncated.float().mean(),
        "rollout/stopped": 1 - is_truncated.float().mean(),
    }
    if rewards is not None:
        told["rollout/reward"] = rewards.nanmean()
    if group_ids is not None:
        counts = group_ids.bincount()
        right = group_ids.bincount(correct.float())[counts > 0]
        whole = counts[counts > 0]
        told |= {
            "rollout/learnable": ((right > 0) & (right < whole)).float().mean(),
            "rollout/solved": (right == whole).float().mean(),
            "rollout/unsolved": (right == 0).float().mean(),
            "rollout/avg_at_n": (right / whole).float().mean(),
        }
        fewest = int(whole.min()) if len(whole) else 1
        if fewest > 1:
            ks = [2**power for power in range(fewest.bit_length())]
            curve = pass_at_k(whole, right.long(), ks).mean(0).float()
            told |= {f"rollout/pass_at_k/{k}": curve[place] for place, k in enumerate(ks)}
            told["rollout/pass_at_k/gap"] = curve[-1] - curve[0]
        if formatted is not None:
            with_format = group_ids.bincount(formatted.float())[counts > 0]
            told["rollout/unformatted"] = (with_format == 0).float().mean()
    if formatted is not None:
        told["rollout/formatted"] = formatted.float().mean()
    if texts is not None:
        told["rollout/reflections"] = torch.tensor([float(num_reflections(text)) for text in texts]).mean()
        repetitive = [compression_ratio(text) >= REPETITIVE for text in texts]
        told["rollout/repetitive"] = torch.tensor(repetitive).float().mean()
        if labeller is not None:
            labels = labeller(texts)
            labels = labels[getattr(labeller, "known", torch.ones(len(texts), dtype=torch.bool))].float()
            told["rollout/behaviours"] = (labels.amax(1) if len(labels) else labels.sum(1)).mean()
            told |= {f"behaviours/{name}": labels[:, place].mean() for place, name in enumerate(labeller.behaviours)}
    return told


def watch_verl(batch: Mapping[str, Any], *, threshold: float = 0.0) -> dict[str, Float[Tensor, ""]]:
    """The same monitors from a batch of verl: `responses`, `attention_mask` and `token_level_scores`.

    It keeps no finish reason, so a response that fills its space counts as truncated, as in verl's own metric. The sum of
    scores is the reward, and above the threshold a right answer; `uid`, where it is there, groups them.

    >>> watch_verl({**data.batch, **data.non_tensor_batch})
    """
    width = batch["responses"].shape[1]
    lengths = batch["attention_mask"][:, -width:].sum(1)
    rewards = batch["token_level_scores"].sum(1)
    groups = None
    if "uid" in batch:
        places = {uid: place for place, uid in enumerate(dict.fromkeys(batch["uid"]))}
        groups = torch.tensor([places[uid] for uid in batch["uid"]], device=lengths.device)
    return watch_responses(lengths, lengths == width, rewards > threshold, groups, rewards=rewards.float())


def monitored(
    reward: Callable[..., Sequence[float | None]],
    *,
    stop_tokens: Sequence[int],
    max_length: int,
    is_formatted: Callable[[str], bool] | None = None,
    labeller: BehaviourLabeller | None = None,
) -> Callable[..., Sequence[float | None]]:
    """A reward for TRL's GRPOTrainer that logs the monitors of its completions by the way; values above 0 are right answers.

    Lengths and finish reasons come from the tokens that TRL hands to rewards (a completion is truncated when it fills
    `max_length` and does not end with a stop token), groups from equal prompts that follow each other. Monitors that fail are
    told of once, and never end training.

    >>> GRPOTrainer(model, reward_funcs=monitored(reward, stop_tokens=[tokenizer.eos_token_id], max_length=512), args=args)
    """

    def both(prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any, **more: Any) -> Any:
        values = list(reward(prompts=prompts, completions=completions, completion_ids=completion_ids, **more))
        with undisturbed():
            tell(prompts, completions, completion_ids, values, more["log_metric"])
        return values

    undisturbed = Undisturbed(f"monitors of the reward {name_of(reward)!r}")

    def tell(prompts: Any, completions: Any, completion_ids: Any, values: Any, log_metric: Any) -> None:
        texts = texts_of(completions)
        truncated = [len(ids) >= max_length and ids[-1] not in stop_tokens for ids in completion_ids]
        changes = [place > 0 and prompts[place] != prompts[place - 1] for place in range(len(prompts))]
        told = watch_responses(
            torch.tensor([len(ids) for ids in completion_ids]),
            torch.tensor(truncated),
            torch.tensor([value is not None and value > 0 for value in values]),
            torch.tensor(changes).cumsum(0),
            rewards=torch.tensor([torch.nan if value is None else float(value) for value in values]),
            formatted=None if is_formatted is None else torch.tensor([is_formatted(text) for text in texts]),
            texts=texts,
            labeller=labeller,
        )
        for name, value in told.items():
            if not bool(value.isnan()):  # TRL averages over processes, and one without such responses has no mean
                log_metric(name, float(value))

    both.__name__ = name_of(reward)
    return both


class Undisturbed:
    """What looks on at training without ending it: an error within is told once as a warning, and swallowed.

    >>> undisturbed = Undisturbed("my monitors")
    >>> with undisturbed(): look()
    """

    def __init__(self, name: str) -> None:
        self._name, self._has_told = name, False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 whatever fails here, training goes on
            if not self._has_told:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                warnings.warn(f"{self._name} failed, and training goes on without: {reason}", stacklevel=3)
            self._has_told = True


def pass_at_k_gap(correct: Bool[Tensor, "prompts samples"], k: int = 8) -> float:
    """pass@k − pass@1: what a policy can do beyond what it does by itself. It widens in the paper's healthy runs.

    >>> pass_at_k_gap(torch.tensor([[True, False], [False, False]]), k=2)
    0.25
    """
    at_k, at_one = (pass_at_k(correct.shape[1], correct.sum(1), one).mean() for one in (k, 1))
    return float(at_k - at_one)


def learnable_groups(rewards: Float[Tensor, " N"], group_ids: Int[Tensor, " N"]) -> Bool[Tensor, " N"]:
    """Which completions belong to a prompt whose rewards differ: what DAPO's dynamic sampling keeps (2503.14476).

    >>> learnable_groups(torch.tensor([1.0, 0, 1, 1]), torch.tensor([0, 0, 1, 1]))
    tensor([ True,  True, False, False])
    """
    return ~Groups.of(group_ids).is_uniform(rewards)
