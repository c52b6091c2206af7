"""The logits that predict completions: of any model, and in less time of a small one whose completions share prompts."""

from functools import wraps
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from dynascope.rl.decoding import last_logits, with_positions
from dynascope.rl.layers import Layers, causal, is_layered

_WORTHWHILE = 1 / 8
"""The share of tokens that prompts worked out once have to save, below which masks cost more (measured on CPUs)."""


def completion_logits(
    model: nn.Module,
    prompts: Int[Tensor, "N P"],
    prompt_mask: Bool[Tensor, "N P"],
    completions: Int[Tensor, "N T"],
) -> Float[Tensor, "N T vocabulary"]:
    """The logits that predict each token of completions, padded on the right, behind prompts padded on the left.

    >>> log_probs = completion_logits(model, prompts, prompt_mask, completions).log_softmax(-1)
    """
    width = completions.shape[1]
    inputs = completion_inputs(prompts, prompt_mask, completions)
    logits: Tensor = model(**inputs, use_cache=False, **last_logits(model, width)).logits
    return logits[:, logits.shape[1] - width :]


def group_logits(
    model: nn.Module,
    prompts: Int[Tensor, "N P"],
    prompt_mask: Bool[Tensor, "N P"],
    completions: Int[Tensor, "N T"],
    group_ids: Int[Tensor, " N"],
) -> Float[Tensor, "N T vocabulary"]:
    """`completion_logits` of completions whose prompts are those of their groups, up to rounding; so are the gradients.

    On a CPU, a model of the Llama family that `is_layered` knows goes layer by layer, and where it saves enough each prompt
    once for all of its completions. The model is called as ever, so whoever stands at its entrance sees the batch.

    >>> logits = group_logits(model, rollout.prompts, rollout.prompt_mask, rollout.tokens, rollout.group_ids)
    """
    if prompts.device.type != "cpu" or not _goes_by_layers(model):
        return completion_logits(model, prompts, prompt_mask, completions)
    plain = model.forward

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        # A probe may run the model on other tokens meanwhile.
        if kwargs.get("input_ids") is not inputs["input_ids"]:
            return plain(*args, **kwargs)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return CausalLMOutputWithPast(logits=_by_layers(model, prompts, prompt_mask, completions, group_ids))

    inputs = completion_inputs(prompts, prompt_mask, completions)
    settings = last_logits(model, completions.shape[1])
    vars(model)["forward"] = forward
    try:
        logits: Tensor = model(**inputs, use_cache=False, **settings).logits
    finally:
        del vars(model)["forward"]
    return logits


def completion_inputs(
    prompts: Int[Tensor, "N P"], prompt_mask: Bool[Tensor, "N P"], completions: Int[Tensor, "N T"]
) -> dict[str, Int[Tensor, "N S"]]:
    """A model's inputs, by name: prompts and the completions behind them, but for the last token, of which nothing is asked.

    >>> model(**completion_inputs(prompts, prompt_mask, completions), use_cache=False)
    """
    is_padded = not bool(prompt_mask.all()) if prompts.device.type == "cpu" else True
    before = completions[:, :-1]
    seen = torch.cat([prompt_mask, torch.ones_like(before).bool()], 1) if is_padded else None
    return with_positions(torch.cat([prompts, before], 1), seen)


def _goes_by_layers(model: Any) -> bool:
    if not is_layered(model) or "forward" in vars(model):
        return False
    if any(getattr(one, "gradient_checkpointing", False) for one in (model.model, *model.model.layers)):
        return False
    embedding = model.get_input_embeddings()
    is_heard = embedding._forward_hooks or embedding._forward_pre_hooks
    return not is_heard and not (model.training and model.config.attention_dropout)


def _by_layers(model: Any, prompts: Tensor, prompt_mask: Tensor, completions: Tensor, group_ids: Tensor) -> Tensor:
    layers, before = Layers(model), completions[:, :-1]
    found = _shared(prompts, prompt_mask, before, group_ids)
    if found is None:
        tokens, seen = torch.cat([prompts, before], 1), pad(prompt_mask, (0, before.shape[1]), value=True)
        hidden = _alone(layers, tokens, seen)[:, -completions.shape[1] :]
    else:
        first, group_of = found
        hidden = _together(layers, prompts[first], prompt_mask[first], before, group_of)
    logits: Tensor = model.lm_head(layers.normed(hidden))
    return logits


def _shared(
    prompts: Tensor, prompt_mask: Tensor, before: Tensor, group_ids: Tensor
) -> tuple[Int[Tensor, " groups"], Int[Tensor, " N"]] | None:
    """A completion of each group, and each one's group counted from 0; None where working prompts out once does not pay."""
    groups, group_of = group_ids.unique(return_inverse=True)
    saved = (len(prompts) - len(groups)) * prompts.shape[1]
    if saved < _WORTHWHILE * (prompts.numel() + before.numel()):
        return None
    first = torch.empty_like(groups).scatter_(0, group_of, torch.arange(len(prompts)))
    is_one = all(torch.equal(one[first][group_of], one) for one in (prompts, prompt_mask))
    return (first, group_of) if is_one else None


def _alone(layers: Layers, tokens: Tensor, seen: Tensor) -> Float[Tensor, "N S width"]:
    """Hidden states of whole sequences."""
    mask, places = causal(seen)
    cos, sin = (one[places.expand(tokens.shape).flatten()] for one in layers.angles(tokens.shape[1]))

    def attend(number: int, *heads: Tensor) -> Tensor:
        query, key, value = (one.unflatten(0, tokens.shape).transpose(1, 2) for one in heads)
        return layers.attention(query, key, value, mask).transpose(1, 2).reshape(tokens.numel(), -1)

    hidden: Tensor = layers(tokens.flatten(), cos, sin, attend).unflatten(0, tokens.shape)
    return hidden


def _together(
    layers: Layers, prompts: Tensor, prompt_mask: Tensor, before: Tensor, group_of: Tensor
) -> Float[Tensor, "N T width"]:
    """Hidden states of each prompt's last token and of what is behind it in each completion, every prompt worked out once."""
    (num_groups, length), width = prompts.shape, before.shape[1]
    mask, places = causal(prompt_mask)
    columns = torch.arange(length + width)
    behind = columns <= columns[length:, None]
    if mask is not None:
        behind = behind & pad(prompt_mask, (0, width), value=True)[group_of][:, None, None]
    ends = places[:, -1:].expand(num_groups, 1)[group_of] + 1
    every = torch.cat([places.expand(prompts.shape).flatten(), (ends + columns[:width]).flatten()])
    cos, sin = (one[every] for one in layers.angles(length + width))

    def attend(number: int, *heads: Tensor) -> Tensor:
        query, key, value = (one[: prompts.numel()].unflatten(0, prompts.shape).transpose(1, 2) for one in heads)
        own, own_key, own_value = (one[prompts.numel() :].unflatten(0, before.shape).transpose(1, 2) for one in heads)
        keys, values = torch.cat([key[group_of], own_key], 2), torch.cat([value[group_of], own_value], 2)
        read = layers.attention(query, key, value, mask), layers.attention(own, keys, values, behind)
        return torch.cat([one.transpose(1, 2).flatten(0, 1) for one in read]).flatten(1)

    hidden = layers(torch.cat([prompts.flatten(), before.flatten()]), cos, sin, attend)
    last = hidden[: prompts.numel()].unflatten(0, prompts.shape)[:, -1:]
    return torch.cat([last[group_of], hidden[prompts.numel() :].unflatten(0, before.shape)], 1)
