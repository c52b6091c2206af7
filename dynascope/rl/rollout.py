"""Completions sampled from a model, and what is remembered of them; and what a model says of them later.

Works with every causal language model of Hugging Face's interface that has a key-value cache.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from dynascope.rl.batch import PolicyBatch
from dynascope.rl.decoding import open_decoder
from dynascope.rl.logits import group_logits
from dynascope.rl.token_entropy import entropy_of, token_entropy

_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""What configurations of Hugging Face's call a cap or a factor of logits."""
_Stretch: TypeAlias = tuple[Tensor, list[dict[str, Tensor]]]
"""Numbers of completions that are decoded together, and what is told of them at each place."""


@dataclass(frozen=True, eq=False)
class Rollout:
    """N completions: prompts padded on the left, completions on the right, those of one prompt beside each other."""

    prompts: Int[Tensor, "N P"]
    prompt_mask: Bool[Tensor, "N P"]
    tokens: Int[Tensor, "N T"]
    mask: Bool[Tensor, "N T"]
    """True at the completion's tokens, its stop token included."""
    behaviour_log_probs: Float[Tensor, "N T"]
    """At the sampling temperature, of the distribution before `process`."""
    sampling_log_probs: Float[Tensor, "N T"]
    """Of the distribution that was really drawn from; another one only where `process` changed it."""
    is_truncated: Bool[Tensor, " N"]
    """The finish reason: True for the length limit, False for the stop token."""
    group_ids: Int[Tensor, " N"]
    max_length: int
    temperature: float
    weights_version: int
    """Of the policy that sampled: how many updates it had seen."""
    hidden: Float[Tensor, "N T width"] | None = None
    """Inputs of the unembedding that each token was drawn from, where they were kept."""

    @classmethod
    def of_prompts(
        cls,
        prompts: Int[Tensor, "prompts P"],
        prompt_mask: Bool[Tensor, "prompts P"] | None,
        num_samples: int,
        *,
        mask: Bool[Tensor, "N T"],
        behaviour_log_probs: Float[Tensor, "N T"],
        sampling_log_probs: Float[Tensor, "N T"],
        temperature: float,
        **drawn: Any,
    ) -> "Rollout":
        """`num_samples` completions of each prompt; log-probabilities at padding become 0, and temperature 0 counts as 1.

        >>> Rollout.of_prompts(prompts, None, 8, tokens=tokens, mask=mask, …)
        """
        seen = torch.ones_like(prompts).bool() if prompt_mask is None else prompt_mask
        return cls(
            prompts=prompts.repeat_interleave(num_samples, 0),
            prompt_mask=seen.repeat_interleave(num_samples, 0),
            mask=mask,
            behaviour_log_probs=behaviour_log_probs.masked_fill(~mask, 0.0),
            sampling_log_probs=sampling_log_probs.masked_fill(~mask, 0.0),
            group_ids=torch.arange(len(prompts), device=prompts.device).repeat_interleave(num_samples),
            temperature=temperature or 1.0,
            **drawn,
        )

    @property
    def lengths(self) -> Int[Tensor, " N"]:
        """Tokens of each completion."""
        return self.mask.sum(1)

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, rows: Shaped[Tensor, " rows"]) -> "Rollout":
        """Some of the completions, by numbers or a boolean mask."""
        whole = {one.name: getattr(self, one.name) for one in fields(self)}
        kept: dict[str, Any] = {name: value[rows] for name, value in whole.items() if isinstance(value, Tensor)}
        return replace(self, **kept)

    def batch(self, rewards: Float[Tensor, " N"], **more: Any) -> PolicyBatch:
        """What an objective sees of it, with rewards and whatever else is known.

        >>> batch = rollout.batch(rewards, correct=rewards > 0)
        """
        known: dict[str, Any] = {
            "mask": self.mask,
            "rewards": rewards,
            "group_ids": self.group_ids,
            "behaviour_log_probs": self.behaviour_log_probs,
            "sampling_log_probs": self.sampling_log_probs,
            "tokens": self.tokens,
            "is_truncated": self.is_truncated,
            "max_length": self.max_length,
            "temperature": self.temperature,
        }
        return PolicyBatch(**(known | more))


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts: Int[Tensor, "prompts P"],
    prompt_mask: Bool[Tensor, "prompts P"] | None = None,
    *,
    num_samples: int,
    max_new_tokens: int,
    stop_token: int,
    pad_token: int = 0,
    temperature: float = 1.0,
    process: Callable[[Tensor, Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
    weights_version: int = 0,
    keeps_hidden: bool = False,
) -> Rollout:
    """`num_samples` completions of every prompt, each until its stop token or `max_new_tokens`.

    A prompt runs through the model once, whatever the number of its samples, and completions that have ended are left out
    of the work as soon as they are half of it. Temperature 0 takes the likeliest token, with log-probabilities at
    temperature 1. `process(tokens so far, logits)` has the signature of Hugging Face's logits processors, sees the
    completions that are still worked on, and changes what is drawn from, before the temperature as there. Draws come from
    `generator` alone, or on another device than its own from one there that it seeds; the model's mode is put back.
    `keeps_hidden` keeps what reached the unembedding, which saves a forward pass to whoever needs it.

    Raises ValueError for no samples, no tokens, a negative temperature, or a model whose logits are NaN.

    >>> rollout = sample(model, prompts, num_samples=8, max_new_tokens=32, stop_token=tokenizer.eos_token_id)
    """
    if num_samples < 1 or max_new_tokens < 1:
        raise ValueError(f"num_samples={num_samples} and max_new_tokens={max_new_tokens}: both must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must not be negative")
    num, device, scale = len(prompts) * num_samples, prompts.device, temperature or 1.0
    if generator is not None and generator.device.type != device.type:
        seed = torch.randint(2**62, (), generator=generator, device=generator.device)
        generator = torch.Generator(device).manual_seed(int(seed))
    # Of the completions that are still decoded: which they are, and whether they go on.
    rows, is_alive = torch.arange(num, device=device), torch.ones(num, dtype=torch.bool, device=device)
    stretches: list[_Stretch] = [(rows, [])]
    was_training = model.training
    model.eval()
    caught: list[Tensor] = []
    head: Any = model.get_output_embeddings() if keeps_hidden else None  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda _, args: caught.append(args[0][:, -1])) if keeps_hidden else None
    try:
        decoder = open_decoder(model, prompts, prompt_mask, num_samples, max_new_tokens)
        logits = decoder.logits
        if keeps_hidden:
            caught[0] = caught[0].repeat_interleave(num_samples, 0)
        history = prompts.repeat_interleave(num_samples, 0)
        for place in range(max_new_tokens):
            log_probs = (logits.float() / scale).log_softmax(-1)
            # The very same tensor where nothing is changed, so that the two records agree to the bit.
            draw_from = log_probs if process is None else (process(history, logits.float()) / scale).log_softmax(-1)
            token = draw_from.argmax(-1, keepdim=True) if temperature == 0 else _draw(draw_from.exp(), generator)
            drawn = token.masked_fill(~is_alive[:, None], pad_token)
            behaviour = log_probs.gather(1, token)[:, 0]
            told = {
                "tokens": drawn[:, 0],
                "mask": is_alive,
                "behaviour_log_probs": behaviour,
                "sampling_log_probs": behaviour if process is None else draw_from.gather(1, token)[:, 0],
            }
            stretches[-1][1].append(told | {"hidden": caught.pop()} if keeps_hidden else told)
            is_alive = is_alive & (token[:, 0] != stop_token)
            if place + 1 == max_new_tokens:
                break
            if process is not None:
                history = torch.cat([history, drawn], 1)
            # On an accelerator the question waits for the device, so it is asked seldom there.
            if device.type == "cpu" or place % 16 == 15:
                num_alive = int(is_alive.sum())
                if not num_alive:
                    break
                # What is kept of the half that has ended is not copied more often than it was made.
                if num_alive <= len(rows) // 2:
                    going = is_alive.nonzero().flatten()
                    decoder.keep(going)
                    rows, drawn, history, is_alive = rows[going], drawn[going], history[going], is_alive[going]
                    stretches.append((rows, []))
            logits = decoder.step(drawn)
    finally:
        model.train(was_training)
        if hook is not None:
            hook.remove()

    whole = _side_by_side(stretches, num, {"tokens": pad_token})
    if bool((whole["sampling_log_probs"].isnan() & whole["mask"]).any()):
        raise ValueError("the model's logits are NaN: go back to weights that are finite, and to a lower learning rate")
    width = int(whole["mask"].any(0).sum())
    return Rollout.of_prompts(
        prompts,
        prompt_mask,
        num_samples,
        is_truncated=torch.zeros_like(whole["mask"][:, 0]).index_copy(0, rows, is_alive),
        max_length=max_new_tokens,
        temperature=temperature,
        weights_version=weights_version,
        **{name: values[:, :width] for name, values in whole.items()},
    )


def _draw(weights: Float[Tensor, "N vocabulary"], generator: torch.Generator | None) -> Int[Tensor, "N 1"]:
    if weights.device.type != "cpu":
        return torch.multinomial(weights, 1, generator=generator)
    # One random number a row: multinomial wants one a token of the vocabulary.
    below = weights.cumsum(-1)
    # In (0, 1], so that what is found has itself a weight above 0.
    reached = below[:, -1:] * (1 - torch.rand(len(weights), 1, generator=generator))
    # Of NaN nothing is found; what was drawn then is told to be NaN in the end.
    return torch.searchsorted(below, reached).clamp(max=weights.shape[1] - 1)


def _side_by_side(stretches: Sequence[_Stretch], num: int, fills: Mapping[str, int]) -> dict[str, Tensor]:
    """What was told of some rows at each place, as columns of all `num` rows; 0 or its fill where nothing was."""

    def of_all(rows: Tensor, columns: Sequence[Tensor], fill: int) -> Tensor:
        values = torch.stack(list(columns), 1)
        return values.new_full((num, *values.shape[1:]), fill).index_copy(0, rows, values)

    return {
        name: torch.cat([of_all(rows, [one[name] for one in told], fills.get(name, 0)) for rows, told in stretches], 1)
        for name in stretches[0][1][0]
    }


def score(
    model: nn.Module,
    rollout: Rollout,
    also: Collection[str] = (),
    *,
    differentiable_entropy: bool = False,
) -> dict[str, Tensor]:
    """What the model says of a rollout's tokens now, as fields of a `PolicyBatch`: `log_probs`, and what is asked for.

    `also` may name "entropy", "logits", and "hidden" (which brings "unembedding"): what reaches the unembedding, caught
    at its input. Entropies carry no gradient unless `differentiable_entropy`.

    Raises ValueError for another name, and as `unembedding` does where that is asked for by name.

    >>> loss, metrics = objective.loss(batch.having(**score(model, rollout, {"entropy"})))
    """
    unknown = set(also) - {"entropy", "logits", "hidden", "unembedding"}
    if unknown:
        raise ValueError(f"score knows entropy, logits, hidden and unembedding, not {', '.join(sorted(unknown))}")
    width = rollout.tokens.shape[1]
    caught: list[Tensor] = []
    wants_hidden = not {"hidden", "unembedding"}.isdisjoint(also)
    head: Any = model.get_output_embeddings() if wants_hidden else None  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda _, args: caught.append(args[0])) if wants_hidden else None
    try:
        logits = group_logits(model, rollout.prompts, rollout.prompt_mask, rollout.tokens, rollout.group_ids).float()
    finally:
        if hook is not None:
            hook.remove()
    if rollout.temperature != 1.0:
        logits = logits / rollout.temperature
    told = {"log_probs": -nn.functional.cross_entropy(logits.mT, rollout.tokens, reduction="none")}
    if "entropy" in also:
        told["entropy"] = entropy_of(logits.log_softmax(-1)) if differentiable_entropy else token_entropy(logits)
    if "logits" in also:
        told["logits"] = logits
    if wants_hidden:
        weight = unembedding(model) if "unembedding" in also else head.weight
        told |= {"hidden": caught[0][:, -width:], "unembedding": weight}
    return told


def unembedding(model: nn.Module) -> Float[Tensor, "vocabulary width"]:
    """The table that turns hidden states into logits, for whoever works logits out of the two.

    Raises ValueError where they are not just the product: a head with a bias, capped or scaled logits.

    >>> logits = hidden @ unembedding(model).T
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    config = getattr(model, "config", None)
    changes = [name for name in _LOGIT_CHANGES if getattr(config, name, None) not in (None, 1.0)]
    if getattr(head, "bias", None) is not None:
        changes.append("a bias of the head")
    if changes:
        raise ValueError(
            f"this model's logits are not hidden states times the unembedding ({', '.join(changes)}); "
            "hand logits over instead: token_hidden_reward(..., logits=...)"
        )
    weight: Tensor = head.weight
    return weight
