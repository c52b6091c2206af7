"""The Llama family layer by layer: one pass for whoever has ways of his own with keys and values.

A small model spends most of a pass around its arithmetic. Here projections of one input are one product, and nothing else is
done than what the logits need.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

_FAMILIES = {"llama", "mistral", "qwen2", "qwen3"}
_PLAIN = ("transformers.models.", "transformers.activations", "torch.nn.modules.")
"""Where the classes of a model come from that nothing was put into."""
_LARGE = 1 << 17
"""Weights of a product."""

Attend: TypeAlias = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""A layer's number, its queries, keys and values (n, heads, width of a head), rotated, to what is read (n, heads x width)."""


class _Linear:
    """Linear modules of one input as one."""

    def __init__(self, *modules: Any) -> None:
        weights, biases = [one.weight for one in modules], [one.bias for one in modules]
        self.weight: Tensor = weights[0] if len(modules) == 1 else torch.cat(weights)
        self.bias: Tensor | None = biases[0] if len(modules) == 1 or biases[0] is None else torch.cat(biases)
        self.is_large = self.weight.device.type == "cpu" and self.weight.numel() >= _LARGE

    def __call__(self, x: Float[Tensor, "n width"]) -> Tensor:
        """For few rows and large weights on a CPU, weights on the left are multiplied up to twice as fast."""
        if not self.is_large or x.shape[0] >= self.weight.shape[1]:
            return F.linear(x, self.weight, self.bias)
        out: Tensor = (self.weight @ x.T).T
        return out if self.bias is None else out + self.bias


class _Norm:
    """A norm as its numbers, for an attribute of a module is looked up slowly."""

    def __init__(self, module: Any) -> None:
        self.weight, self.shape, self.eps = module.weight, module.weight.shape, module.variance_epsilon

    def __call__(self, x: Float[Tensor, "*n width"]) -> Float[Tensor, "*n width"]:
        return F.rms_norm(x, self.shape, self.weight, self.eps)


class _Layer:
    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.before_attention, self.before_mlp = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self.query_key_value = _Linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = _Linear(attention.o_proj)
        self.gate_up, self.down, self.activation = (
            _Linear(mlp.gate_proj, mlp.up_proj),
            _Linear(mlp.down_proj),
            mlp.act_fn,
        )
        has_norms = hasattr(attention, "q_norm")
        self.head_norms = (_Norm(attention.q_norm), _Norm(attention.k_norm)) if has_norms else None


class Layers:
    """What is between a model's tokens and its logits, for models that `is_layered` knows.

    It holds joined copies of weights, so it is of the moment: make it anew once weights have changed. Gradients reach the
    model's parameters. Embeddings are called as a module, so that hooks there are heard.

    >>> layers = Layers(model)
    >>> cos, sin = layers.angles(tokens.shape[1])
    """

    def __init__(self, model: nn.Module) -> None:
        body: Any = model.model
        self.embed, self.rotary = body.embed_tokens, body.rotary_emb
        self.layers = [_Layer(one) for one in body.layers]
        self.normed = _Norm(body.norm)
        """What the unembedding is given, of hidden states."""
        attention = body.layers[0].self_attn
        self.scale: float = attention.scaling
        self.head_dim: int = attention.head_dim
        self.num_heads: int = body.config.num_attention_heads
        self.num_key_heads: int = body.config.num_key_value_heads

    @torch.no_grad()
    def angles(self, size: int) -> tuple[Float[Tensor, "size head_dim"], Float[Tensor, "size head_dim"]]:
        """Cosines and sines of the first `size` positions."""
        like = self.embed.weight[:1, None]
        cos, sin = self.rotary(like, torch.arange(size, device=like.device)[None])
        return cos[0], sin[0]

    def __call__(
        self,
        tokens: Int[Tensor, " n"],
        cos: Float[Tensor, "#n head_dim"],
        sin: Float[Tensor, "#n head_dim"],
        attend: Attend,
    ) -> Float[Tensor, "n width"]:
        """Hidden states behind the last layer, before the last norm (`normed`)."""
        hidden: Tensor = self.embed(tokens)
        cos, sin = cos[:, None], sin[:, None]
        num_rotated = self.num_heads + self.num_key_heads
        for number, layer in enumerate(self.layers):
            heads = layer.query_key_value(layer.before_attention(hidden)).view(
                len(tokens), num_rotated + self.num_key_heads, self.head_dim
            )
            rotated = heads[:, :num_rotated]
            if layer.head_norms is not None:
                parts = rotated[:, : self.num_heads], rotated[:, self.num_heads :]
                rotated = torch.cat([norm(part) for norm, part in zip(layer.head_norms, parts, strict=True)], 1)
            rotated = _rotate(rotated, cos, sin)
            read = attend(number, rotated[:, : self.num_heads], rotated[:, self.num_heads :], heads[:, num_rotated:])
            hidden = hidden + layer.out(read)
            gate, up = layer.gate_up(layer.before_mlp(hidden)).chunk(2, -1)
            hidden = hidden + layer.down(layer.activation(gate) * up)
        return hidden

    def attention(
        self,
        query: Float[Tensor, "N heads T head_dim"],
        key: Float[Tensor, "N key_heads S head_dim"],
        value: Float[Tensor, "N key_heads S head_dim"],
        mask: Tensor | None,
    ) -> Float[Tensor, "N heads T head_dim"]:
        """What queries read: all that `mask` lets them; without one, of as many keys those that are not behind them."""
        read: Tensor = F.scaled_dot_product_attention(
            query,
            key,
            value,
            mask,
            is_causal=mask is None and 1 < query.shape[2] == key.shape[2],
            scale=self.scale,
            enable_gqa=self.num_heads != self.num_key_heads,
        )
        return read


def causal(seen: Bool[Tensor, "N S"]) -> tuple[Bool[Tensor, "N 1 S S"] | None, Int[Tensor, "#N S"]]:
    """What each token may attend to behind padding on the left, and its position; no mask where nothing is padding.

    >>> mask, places = causal(prompt_mask)
    """
    columns = torch.arange(seen.shape[1], device=seen.device)
    if seen.device.type == "cpu" and bool(seen.all()):
        return None, columns[None]
    # Padding sees itself, for a row that saw nothing would be NaN.
    sees = (columns[:, None] >= columns) & seen[:, None] | (columns[:, None] == columns)
    return sees[:, None], (columns - (~seen).sum(1, keepdim=True)).clamp(min=0)


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


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
