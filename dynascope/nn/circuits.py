"""An attention layer's algorithm in two products a head: what it compares (KQ), and what it passes on (OV).

With tokens as columns, a head's logit between a key token z and a query token q is zᵀ KQ q, and what it adds to the
output for attending to z is OV z. These two products are all that a head does; its query, key, value and output matrices
are not determined by it one by one. Here they are read off whatever layer holds them.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

_SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
)
_FUSED = ("c_attn", "qkv_proj", "qkv", "Wqkv")
_OUT = ("o_proj", "out_proj", "c_proj", "to_out", "wo", "proj", "dense", "out")
# One fused projection whose rows are grouped head by head, each with its query, key and value.
_BY_HEAD = ("GPTNeoXAttention",)
_UNSCALED = ("GPTNeoSelfAttention",)
_HEADS = ("num_heads", "n_head", "n_heads", "num_attention_heads", "heads")
_HEAD_WIDTH = ("head_dim", "head_size", "attention_head_size")


@dataclass(frozen=True)
class Circuits:
    """The two products of every head: logit = zᵀ KQ q for key token z and query token q, output = Σ_heads OV z.

    KQ contains the attention's scale. `left_out` names what acts beside them: "rotary" (KQ is then that of a token and
    itself; at other distances it is turned), "bias", "query-key norm", "logit cap".
    """

    kq: Float[Tensor, "*stack heads key_width query_width"]
    ov: Float[Tensor, "*stack heads out value_width"]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class AttentionWeights:
    """One attention layer's matrices by head, grouped-query heads repeated, however the layer stores them.

    A product of two of them has the head's width as its rank, so much can be told of KQ and OV without forming them.
    """

    query: Float[Tensor, "*stack heads rank query_width"]
    key: Float[Tensor, "*stack heads rank key_width"]
    value: Float[Tensor, "*stack heads value_rank value_width"]
    out: Float[Tensor, "*stack heads out value_rank"]
    scale: float
    left_out: tuple[str, ...] = ()

    def circuits(self) -> Circuits:
        """KQ and OV of every head."""
        return Circuits(self.key.mT @ (self.query * self.scale), self.out @ self.value, self.left_out)


@runtime_checkable
class HasAttentionWeights(Protocol):
    """A module that says itself what its heads' matrices are."""

    def attention_weights(self) -> AttentionWeights:
        """The matrices of every head."""


def kq_ov_circuits(module: nn.Module, *, num_heads: int | None = None) -> Circuits:
    """KQ and OV of every head of an attention layer.

    Reads our own models, `nn.MultiheadAttention`, and layers with separate or fused projections under the usual names:
    GPT-2 (Conv1D), Llama, Mistral and Qwen (grouped queries), Phi-3, OPT, GPT-Neo, GPT-NeoX, BERT, ViT, nanoGPT.
    `num_heads` is for a layer that does not say it. Circuits are differentiable functions of the weights; biases, rotary
    positions and norms of queries and keys are no part of them, and `left_out` says which of these the layer has.

    Memory: heads × width² numbers for each of the two; `attention_weights` keeps the factors.
    Raises ValueError for a module that is no attention layer, or whose number of heads is not to be found.
    Source: 2503.12734, section 3; Elhage et al. 2021, A mathematical framework for transformer circuits.

    >>> kq_ov_circuits(nn.MultiheadAttention(16, 4)).kq.shape
    torch.Size([4, 16, 16])
    """
    return attention_weights(module, num_heads=num_heads).circuits()


def attention_weights(module: nn.Module, *, num_heads: int | None = None) -> AttentionWeights:
    """The query, key, value and output matrices of every head of an attention layer; see `kq_ov_circuits`.

    >>> attention_weights(nn.MultiheadAttention(16, 4)).query.shape
    torch.Size([4, 4, 16])
    """
    if isinstance(module, HasAttentionWeights):
        return module.attention_weights()
    found = _projections(module)
    if found is None:
        raise ValueError(f"{type(module).__name__} has no query, key, value and output projections that are known")
    query, key, value, out = found
    heads = num_heads if num_heads is not None else _num_heads(module, query.shape[0])
    if heads is None or heads < 1 or query.shape[0] % heads:
        raise ValueError(
            f"{heads} heads do not divide the {query.shape[0]} rows of {type(module).__name__}'s query projection; "
            "give num_heads"
        )
    if type(module).__name__ in _BY_HEAD:
        rows = torch.cat([query, key, value]).unflatten(0, (heads, 3, -1))
        query, key, value = (part.flatten(0, 1) for part in rows.unbind(1))
    width = query.shape[0] // heads
    groups = heads // (key.shape[0] // width)
    key, value = (part.unflatten(0, (heads // groups, -1)).repeat_interleave(groups, dim=0) for part in (key, value))
    return AttentionWeights(
        query.unflatten(0, (heads, width)),
        key,
        value,
        out.unflatten(1, (heads, -1)).movedim(1, 0),
        _scale(module, width),
        _left_out(module),
    )


def find_attention(model: nn.Module) -> dict[str, nn.Module]:
    """Every attention layer of a model that can be read, by name, from the first to the last.

    >>> list(find_attention(nn.TransformerEncoderLayer(16, 4)))
    ['self_attn']
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") or outer == "" for outer in found):
            continue
        projections = None if isinstance(module, HasAttentionWeights) else _projections(module)
        rows = 0 if projections is None else projections[0].shape[0]
        heads = _num_heads(module, rows) if rows else None
        if isinstance(module, HasAttentionWeights) or (heads and rows % heads == 0):
            found[name] = module
    return found


def _projections(module: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Query, key, value (rows × width) and output (out × rows) of a layer, if it has such."""
    if isinstance(module, nn.MultiheadAttention):
        # The fused weight is None where keys or values have a width of their own.
        packed = module._parameters["in_proj_weight"]
        separate = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        query, key, value = packed.chunk(3) if packed is not None else separate
        return query, key, value, module.out_proj.weight
    # BERT keeps its projections in a module called self, and the output beside it.
    inner = getattr(module, "self", None)
    place = inner if isinstance(inner, nn.Module) else module
    out = _weight(module, _OUT)
    if out is None:
        out = _weight(getattr(module, "output", None), ("dense",))
    if out is None:
        return None
    for names in _SEPARATE:
        three = [_weight(place, (name,)) for name in names]
        if all(one is not None and one.shape[1] > 0 for one in three):
            query, key, value = (one for one in three if one is not None)
            return (query, key, value, out) if query.shape[0] == out.shape[1] else None
    fused = _weight(place, (*_FUSED, "query_key_value") if type(module).__name__ in _BY_HEAD else _FUSED)
    if fused is None:
        return None
    # What is left beside the queries belongs to keys and values in equal parts, fewer where heads share them.
    rows = out.shape[1]
    rest = fused.shape[0] - rows
    if rest < 2 or rest % 2:
        return None
    query, key, value = fused.split([rows, rest // 2, rest // 2])
    return query, key, value, out


def _weight(module: object, names: Sequence[str]) -> Tensor | None:
    """The matrix, out × in, of the first of these linear maps that the module has."""
    for name in names:
        part = getattr(module, name, None)
        if isinstance(part, (nn.ModuleList, nn.Sequential)) and len(part):
            part = part[0]
        weight = getattr(part, "weight", None) if isinstance(part, nn.Module) else None
        if isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(part, nn.Embedding):
            return weight.T if type(part).__name__ == "Conv1D" else weight
    return None


def _stated(module: nn.Module, names: Sequence[str], kind: type | tuple[type, ...]) -> float | None:
    """The first of these attributes that the layer, the layer inside it or its configuration states."""
    for place in (module, getattr(module, "self", None), getattr(module, "config", None)):
        for name in names:
            value = getattr(place, name, None)
            if isinstance(value, kind) and not isinstance(value, bool):
                return float(value)  # type: ignore[arg-type]
    return None


def _num_heads(module: nn.Module, rows: int) -> int | None:
    width = _stated(module, _HEAD_WIDTH, int)
    if width:
        return rows // int(width)
    heads = _stated(module, _HEADS, int)
    return None if heads is None else int(heads)


def _scale(module: nn.Module, width: int) -> float:
    stated = _stated(module, ("scaling", "softmax_scale", "scale"), float)
    if stated is not None:
        return stated
    is_unscaled = type(module).__name__ in _UNSCALED or getattr(module, "scale_attn_weights", True) is False
    return 1.0 if is_unscaled else width**-0.5


def _left_out(module: nn.Module) -> tuple[str, ...]:
    """What acts on this layer's logits or values beside its matrices."""
    parts = dict(module.named_modules())
    names = {name.rpartition(".")[2] for name in parts}
    arguments = inspect.signature(module.forward).parameters
    left_out = []
    if "position_embeddings" in arguments or any(
        name.startswith(("rotary", "rope")) for name in names | {*vars(module)}
    ):
        left_out.append("rotary")
    if any(
        part._parameters.get(name) is not None for part in parts.values() for name in ("bias", "in_proj_bias", "bias_k")
    ):
        left_out.append("bias")
    norms = ("q_norm", "k_norm", "query_norm", "key_norm", "q_layernorm", "k_layernorm")
    if any(
        isinstance(getattr(module, name, None), nn.Module) and type(getattr(module, name)) is not nn.Identity
        for name in norms
    ):
        left_out.append("query-key norm")
    if getattr(module, "attn_logit_softcapping", None) is not None:
        left_out.append("logit cap")
    return tuple(left_out)
