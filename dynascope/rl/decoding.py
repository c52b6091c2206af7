"""One new token at a time through a causal language model: what a sampler asks of it, whatever the model.

A small model spends most of a decoding step around its arithmetic, and a cache that grows by concatenation copies itself at
every token. `LayerDecoder` does the arithmetic of the Llama family on memory laid out beforehand; `Decoder` asks any model.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

_FAMILIES = {"llama", "mistral", "qwen2", "qwen3"}
_PLAIN = ("transformers.models.", "transformers.activations", "torch.nn.modules.")
"""Where the classes of a model come from that nothing was put into."""
_BLOCK = 256
"""Tokens that memory grows by."""


class Decoder:
    """Every model of Hugging Face's interface that has a key-value cache. Prompts run through it here, once each.

    `logits` (N, vocabulary) predict the first token of each of N = prompts x `num_samples` completions.

    >>> decoder = Decoder(model, prompts, None, num_samples=8)
    >>> logits = decoder.step(decoder.logits.argmax(-1, keepdim=True))
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Int[Tensor, "prompts P"],
        prompt_mask: Bool[Tensor, "prompts P"] | None,
        num_samples: int,
    ) -> None:
        self.model = model
        output = model(**with_positions(prompts, prompt_mask), use_cache=True, **last_logits(model, 1))
        self.logits: Tensor = output.logits[:, -1].repeat_interleave(num_samples, 0)
        self.seen = None if prompt_mask is None else prompt_mask.repeat_interleave(num_samples, 0)
        self._keep(output.past_key_values, prompts.shape[1], num_samples)

    def _keep(self, cache: Any, length: int, num_samples: int) -> None:
        if num_samples > 1:
            cache.batch_repeat_interleave(num_samples)
        self.cache = cache

    def step(self, tokens: Int[Tensor, "N 1"]) -> Float[Tensor, "N vocabulary"]:
        """The logits behind one more token of every completion."""
        inputs: dict[str, Tensor] = {"input_ids": tokens}
        if self.seen is not None:
            self.seen = F.pad(self.seen, (0, 1), value=True)
            inputs |= {"attention_mask": self.seen.long(), "position_ids": self.seen.sum(1, keepdim=True) - 1}
        logits: Tensor = self.model(**inputs, past_key_values=self.cache, use_cache=True).logits
        return logits[:, -1]


class LayerDecoder(Decoder):
    """The Llama family (Llama, Mistral, Qwen2, Qwen3), layer by layer: the same logits up to rounding, in less time.

    For models that `is_layered` knows; embeddings and unembedding are called as modules, so that hooks there are heard.
    """

    def _keep(self, cache: Any, length: int, num_samples: int) -> None:
        self.length = length
        self.keys = [_roomy(layer.keys, num_samples) for layer in cache.layers]
        self.values = [_roomy(layer.values, num_samples) for layer in cache.layers]
        self.padding = 0 if self.seen is None else (~self.seen).sum(1)
        self._lay_out()

    def _lay_out(self) -> None:
        """What else goes with the memory: rotary angles, and which of its places may be attended to."""
        size, body = self.keys[0].shape[2], self._body
        places = torch.arange(size, device=self.logits.device)[None]
        self.cos, self.sin = (one[0] for one in body.rotary_emb(body.embed_tokens.weight[:1, None], places))
        if self.seen is not None:
            self.seen = F.pad(self.seen, (0, size - self.seen.shape[1]), value=True)

    @property
    def _body(self) -> Any:
        return self.model.model

    def step(self, tokens: Int[Tensor, "N 1"]) -> Float[Tensor, "N vocabulary"]:
        """See `Decoder`."""
        body, place = self._body, self.length
        if place == self.keys[0].shape[2]:
            self.keys, self.values = ([_roomy(one) for one in memory] for memory in (self.keys, self.values))
            self._lay_out()
        cos, sin = (one[place - self.padding].unsqueeze(-2) for one in (self.cos, self.sin))
        mask = None if self.seen is None else self.seen[:, None, None, : place + 1]
        hidden = body.embed_tokens(tokens)[:, 0]
        for layer, keys, values in zip(body.layers, self.keys, self.values, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            normed = _norm(layer.input_layernorm, hidden)
            query, key, value = (
                _project(one, normed).unflatten(-1, (-1, attention.head_dim))
                for one in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            if hasattr(attention, "q_norm"):
                query, key = _norm(attention.q_norm, query), _norm(attention.k_norm, key)
            num_heads, num_kept = query.shape[1], key.shape[1]
            query, key = _rotate(torch.cat([query, key], 1), cos, sin).split([num_heads, num_kept], 1)
            keys[:, :, place], values[:, :, place] = key, value
            seen = F.scaled_dot_product_attention(
                query[:, :, None],
                keys[:, :, : place + 1],
                values[:, :, : place + 1],
                attn_mask=mask,
                scale=attention.scaling,
                enable_gqa=num_heads != num_kept,
            )
            hidden = hidden + _project(attention.o_proj, seen.flatten(1))
            normed = _norm(layer.post_attention_layernorm, hidden)
            inner = mlp.act_fn(_project(mlp.gate_proj, normed)) * _project(mlp.up_proj, normed)
            hidden = hidden + _project(mlp.down_proj, inner)
        self.length += 1
        logits: Tensor = self.model.lm_head(_norm(body.norm, hidden)[:, None])  # type: ignore[operator]
        return logits[:, -1]


def open_decoder(
    model: nn.Module,
    prompts: Int[Tensor, "prompts P"],
    prompt_mask: Bool[Tensor, "prompts P"] | None,
    num_samples: int,
) -> Decoder:
    """The quickest decoder that knows the model.

    >>> decoder = open_decoder(model, prompts, None, num_samples=8)
    """
    kind = LayerDecoder if is_layered(model) else Decoder
    return kind(model, prompts, prompt_mask, num_samples)


def is_layered(model: nn.Module) -> bool:
    """Whether the model is one of the Llama family as Hugging Face has it, with nothing put into it.

    Adapters, quantized or parametrized layers, sliding windows, sharding, compilation, and hooks within its layers each make
    it another model, which is left to its own forward.

    >>> is_layered(LlamaForCausalLM(config))
    True
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in _FAMILIES or not type(model).__module__.startswith(_PLAIN):
        return False
    body: Any = getattr(model, "model", None)
    windows = config.sliding_window if config.model_type == "mistral" else None
    if windows is not None or set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        return False
    if config._attn_implementation not in ("sdpa", "eager") or getattr(body.rotary_emb, "rope_type", "") != "default":
        return False
    layers = [module for layer in body.layers for module in layer.modules()]
    return not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        for module in (body, body.norm, *layers)
    ) and all(type(module).__module__.startswith(_PLAIN) for module in (body, *layers))


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
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _roomy(memory: Tensor, num_samples: int = 1) -> Tensor:
    """Memory (N, heads, T, width) with room for more tokens, its rows repeated."""
    num, num_heads, length, width = memory.shape
    room = memory.new_empty(num * num_samples, num_heads, length + _BLOCK, width)
    room[:, :, :length] = memory.repeat_interleave(num_samples, 0)
    return room


def _norm(module: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def _project(linear: Any, x: Float[Tensor, "N width"]) -> Tensor:
    """`linear(x)`. For few rows on a CPU, weights on the left are multiplied up to a third faster."""
    weight, bias = linear.weight, linear.bias
    if x.device.type != "cpu" or len(x) >= weight.shape[1]:
        return F.linear(x, weight, bias)
    out: Tensor = (weight @ x.T).T
    return out if bias is None else out + bias


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
