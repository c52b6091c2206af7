"""One new token at a time through a causal language model: what a sampler asks of it, whatever the model.

A small model spends most of a decoding step around its arithmetic, and a cache that grows by concatenation copies itself at
every token. `LayerDecoder` does the arithmetic of the Llama family on memory laid out beforehand; `Decoder` asks any model.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dynascope.rl.layers import Layers, causal, is_layered

_BLOCK = 256
"""Tokens that memory grows by."""


class Decoder:
    """Every model of Hugging Face's interface that has a key-value cache. Prompts run through it here, once each.

    `logits` (N, vocabulary) predict the first token of each of N = prompts x `num_samples` completions. `num_tokens` is how
    many may follow.

    >>> decoder = Decoder(model, prompts, None, num_samples=8, num_tokens=32)
    >>> logits = decoder.step(decoder.logits.argmax(-1, keepdim=True))
    """

    logits: Float[Tensor, "N vocabulary"]

    def __init__(
        self,
        model: nn.Module,
        prompts: Int[Tensor, "prompts P"],
        prompt_mask: Bool[Tensor, "prompts P"] | None,
        num_samples: int,
        num_tokens: int,
    ) -> None:
        self.model, self.num_samples, self.num_tokens = model, num_samples, num_tokens
        self.seen = None if prompt_mask is None else prompt_mask.repeat_interleave(num_samples, 0)
        self.logits = self._begin(prompts, prompt_mask).repeat_interleave(num_samples, 0)

    def _begin(self, prompts: Tensor, prompt_mask: Tensor | None) -> Tensor:
        output = self.model(**with_positions(prompts, prompt_mask), use_cache=True, **last_logits(self.model, 1))
        self.cache = output.past_key_values
        if self.num_samples > 1:
            self.cache.batch_repeat_interleave(self.num_samples)
        logits: Tensor = output.logits[:, -1]
        return logits

    def step(self, tokens: Int[Tensor, "N 1"]) -> Float[Tensor, "N vocabulary"]:
        """The logits behind one more token of every completion."""
        inputs: dict[str, Tensor] = {"input_ids": tokens}
        if self.seen is not None:
            self.seen = F.pad(self.seen, (0, 1), value=True)
            inputs |= {"attention_mask": self.seen.long(), "position_ids": self.seen.sum(1, keepdim=True) - 1}
        logits: Tensor = self.model(**inputs, past_key_values=self.cache, use_cache=True).logits
        return logits[:, -1]

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with some of the completions, by numbers among those that are left."""
        self.cache.batch_select_indices(rows)
        self.seen = None if self.seen is None else self.seen[rows]


class LayerDecoder(Decoder):
    """The Llama family (Llama, Mistral, Qwen2, Qwen3), layer by layer: the same logits up to rounding, in less time.

    For models that `is_layered` knows; embeddings and unembedding are called as modules, so that hooks there are heard.
    """

    def _begin(self, prompts: Tensor, prompt_mask: Tensor | None) -> Tensor:
        self.layers = Layers(self.model)
        self.memory: list[tuple[Tensor, Tensor]] = []
        self.length = prompts.shape[1]
        mask, places = None, torch.arange(self.length, device=prompts.device)[None]
        if prompt_mask is not None:
            self.padding = (~prompt_mask).sum(1).repeat_interleave(self.num_samples)
            mask, places = causal(prompt_mask)
        places = places.expand(prompts.shape).flatten()
        cos, sin = self.layers.angles(self.length)

        def remember(number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            self.memory.append((key, value))
            return key, value

        logits = self._through(prompts, (cos[places], sin[places]), mask, remember)
        self._make_room(min(self.num_tokens, _BLOCK), self.num_samples)
        return logits

    def step(self, tokens: Int[Tensor, "N 1"]) -> Float[Tensor, "N vocabulary"]:
        """See `Decoder`."""
        place = self.length
        if place == self.memory[0][0].shape[2]:
            self._make_room(_BLOCK)
        self.length += 1
        cos, sin = self.angles
        if self.seen is None:
            mask, angles = None, (cos[place : self.length], sin[place : self.length])
        else:
            places = place - self.padding
            mask, angles = self.seen[:, None, None, : self.length], (cos[places], sin[places])

        def remember(number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = self.memory[number]
            keys[:, :, place : place + 1], values[:, :, place : place + 1] = key, value
            return keys[:, :, : place + 1], values[:, :, : place + 1]

        return self._through(tokens, angles, mask, remember)

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """See `Decoder`."""
        self.memory = [(key[rows], value[rows]) for key, value in self.memory]
        if self.seen is not None:
            self.seen, self.padding = self.seen[rows], self.padding[rows]

    def _through(
        self,
        tokens: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        remember: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """The last token's logits; `remember` is told a layer's new keys and values and answers with all of them."""
        num, width = tokens.shape

        def attend(number: int, *heads: Tensor) -> Tensor:
            query, key, value = (one.view(num, width, *one.shape[1:]).transpose(1, 2) for one in heads)
            read = self.layers.attention(query, *remember(number, key, value), mask)
            return read.transpose(1, 2).reshape(num * width, -1)

        hidden = self.layers(tokens.flatten(), *angles, attend).view(num, width, -1)[:, -1:]
        logits: Tensor = self.model.lm_head(self.layers.normed(hidden))  # type: ignore[operator]
        return logits[:, -1]

    def _make_room(self, room: int, num_samples: int = 1) -> None:
        """Memory for more tokens, and what goes with it: rotary angles, and which of its places may be attended to."""
        self.memory = [(_roomy(key, room, num_samples), _roomy(value, room, num_samples)) for key, value in self.memory]
        self.angles = self.layers.angles(self.length + room)
        if self.seen is not None:
            self.seen = F.pad(self.seen, (0, room), value=True)


def open_decoder(
    model: nn.Module,
    prompts: Int[Tensor, "prompts P"],
    prompt_mask: Bool[Tensor, "prompts P"] | None,
    num_samples: int,
    num_tokens: int,
) -> Decoder:
    """The quickest decoder that knows the model.

    >>> decoder = open_decoder(model, prompts, None, num_samples=8, num_tokens=32)
    """
    kind = LayerDecoder if is_layered(model) else Decoder
    return kind(model, prompts, prompt_mask, num_samples, num_tokens)


def with_positions(tokens: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"] | None) -> dict[str, Int[Tensor, "N T"]]:
    """A model's inputs: without padding, ids alone; padding on the left wants positions and a mask.

    >>> model(**with_positions(tokens, mask))
    """
    if mask is None:
        return {"input_ids": tokens}
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return {"input_ids": tokens, "attention_mask": mask.long(), "position_ids": positions}


def last_logits(model: nn.Module, count: int) -> dict[str, int]:
    """The argument by which a model unembeds its last positions only, where it knows one.

    >>> model(tokens, **last_logits(model, 1))
    """
    # A bound method would keep its model alive in the cache.
    forward = getattr(model.forward, "__func__", None)
    known = inspect.signature(model.forward).parameters if forward is None else _arguments(forward)
    return {"logits_to_keep": count} if "logits_to_keep" in known else {}


@cache
def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _roomy(memory: Tensor, room: int, num_samples: int) -> Tensor:
    """Memory (N, heads, T, width) with room for more tokens, its rows repeated."""
    num, num_heads, length, width = memory.shape
    roomy = memory.new_empty(num * num_samples, num_heads, length + room, width)
    roomy.view(num, num_samples, num_heads, length + room, width)[..., :length, :] = memory[:, None]
    return roomy
