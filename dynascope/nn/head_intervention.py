"""Changing what single attention heads do, for as long as a block lasts: which heads does a model need, and for what?

Works on `ToyTransformer` and on Hugging Face models whose attention goes through Transformers' AttentionInterface.
What enters and leaves a layer's attention or MLP as a whole is reached by PyTorch's own hooks on `attention_layers(model)` and
`residual_layers(model)`. Source: 2410.13835, sections 2 and 4 (interventions on heads and on the state of the first token).
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dynascope.nn.relu_attention import masked_logits, softmax_weights
from dynascope.nn.toy_transformer import WEIGHTS, CausalAttention


@dataclass(frozen=True)
class HeadState:
    """What one layer's heads are about to do with a batch; an edit gives another one.

    `logits` are -inf where a key is hidden. `sink` is each row's first key that its last query sees: 0, unless the row is
    padded on the left. A key or value that several heads share is there for each of them. `to_weights` is the model's own way
    from logits to weights.
    """

    query: Float[Tensor, "rows heads queries head_dim"]
    key: Float[Tensor, "rows heads keys head_dim"]
    logits: Float[Tensor, "rows heads queries keys"]
    weights: Float[Tensor, "rows heads queries keys"]
    value: Float[Tensor, "rows heads keys value_dim"]
    sink: Int[Tensor, " rows"]
    scale: float
    to_weights: Callable[[Tensor], Tensor]

    def at_sink(self) -> Bool[Tensor, "rows 1 1 keys"]:
        """True at each row's sink."""
        position = torch.arange(self.logits.shape[-1], device=self.sink.device)
        return (position == self.sink[:, None])[:, None, None]

    def attending(
        self,
        query: Float[Tensor, "rows heads queries head_dim"] | None = None,
        key: Float[Tensor, "rows heads keys head_dim"] | None = None,
    ) -> "HeadState":
        """The same with other queries or keys, and the logits and weights that come of them; what is hidden stays hidden.

        >>> HeadIntervention(model, [(0, 1)], lambda state: state.attending(query=state.query.flip(0)))
        """
        query, key = self.query if query is None else query, self.key if key is None else key
        logits = self.logits + (query @ key.mT - self.query @ self.key.mT) * self.scale
        return replace(self, query=query, key=key, logits=logits, weights=self.to_weights(logits))

    def output(self) -> Float[Tensor, "rows heads queries value_dim"]:
        """What the heads give."""
        return self.weights @ self.value


Edit = Callable[[HeadState], HeadState]


def zero(state: HeadState) -> HeadState:
    """Attend to nothing: the heads give 0."""
    return replace(state, weights=torch.zeros_like(state.weights))


def to_sink(state: HeadState) -> HeadState:
    """Attend to the sink alone, with all that was attended."""
    total = state.weights.sum(-1, keepdim=True)
    return replace(state, weights=torch.where(state.at_sink(), total, 0.0))


def zero_first(state: HeadState) -> HeadState:
    """The sink attends to nothing: its own entry A[0, 0] is 0, every other stays."""
    at_sink = state.at_sink()
    return replace(state, weights=state.weights.masked_fill(at_sink & at_sink.transpose(-2, -1), 0.0))


def zero_value(state: HeadState) -> HeadState:
    """The sink's value is 0; attention stays."""
    return replace(state, value=state.value.masked_fill(state.at_sink().transpose(-2, -1), 0.0))


def zero_logit(state: HeadState) -> HeadState:
    """Every query's logit for the sink is 0, where it sees it."""
    hidden = state.at_sink() & torch.isfinite(state.logits)
    logits = state.logits.masked_fill(hidden, 0.0)
    return replace(state, logits=logits, weights=state.to_weights(logits))


def diagonal(state: HeadState) -> HeadState:
    """Every token attends to itself alone."""
    queries, keys = state.weights.shape[-2:]
    own = torch.ones(queries, keys, dtype=torch.bool, device=state.weights.device)
    own = own.tril(keys - queries).triu(keys - queries)
    return replace(state, weights=own.to(state.weights).expand_as(state.weights))


EDITS: Mapping[str, Edit] = {
    "zero": zero,
    "to_sink": to_sink,
    "zero_first": zero_first,
    "zero_value": zero_value,
    "zero_logit": zero_logit,
    "diagonal": diagonal,
}


def clean_pattern(is_trigger: Bool[Tensor, "rows positions"]) -> Edit:
    """The pattern that solves Bigram-Backcopy: triggers attend to the token before them, all others to the sink.

    >>> HeadIntervention(model, [(0, 0)], clean_pattern(task.trigger_mask(inputs)))
    """

    def edit(state: HeadState) -> HeadState:
        before = torch.ones_like(state.weights[0, 0, 0, :-1]).diag(-1)
        pattern = torch.where(is_trigger[:, None, :, None], before, state.at_sink().to(state.weights))
        return replace(state, weights=pattern.expand_as(state.weights))

    return edit


class HeadIntervention:
    """While the block lasts, the named heads do something else; after it the model is as it was, bit for bit.

    Args:
        model: A `ToyTransformer`, or a Hugging Face model whose attention goes through the AttentionInterface.
        heads: Pairs (layer, head); None means all.
        edit: One of `EDITS` by name, or a function from `HeadState` to `HeadState` (it may also just look).

    Outputs that the edit leaves as they were keep the model's own bits, whatever kernel made them; gradients flow through
    what it changes. Blocks can be nested: the inner edit sees what the outer one left. Memory in the block: one map of
    queries × keys of a layer.

    Raises ValueError for an unknown edit, heads that do not exist, or a model whose attention cannot be reached.

    >>> with HeadIntervention(model, [(16, 25)], "zero"):
    ...     loss = model(tokens, labels=tokens).loss
    """

    def __init__(self, model: nn.Module, heads: Iterable[tuple[int, int]] | None, edit: str | Edit) -> None:
        if isinstance(edit, str) and edit not in EDITS:
            raise ValueError(f"an edit is one of {', '.join(EDITS)}, or a function; not {edit!r}")
        self._edit = EDITS[edit] if isinstance(edit, str) else edit
        self._layers = attention_layers(model)
        wanted = None if heads is None else sorted(set(heads))
        for layer, head in wanted or ():
            if layer not in self._layers or not 0 <= head < num_heads(self._layers[layer]):
                raise ValueError(f"there is no head {head} in layer {layer}; layers with heads: {sorted(self._layers)}")
        self._heads = {
            layer: [head for other, head in wanted if other == layer]
            if wanted is not None
            else list(range(num_heads(module)))
            for layer, module in self._layers.items()
        }

    def __enter__(self) -> "HeadIntervention":
        for layer, module in self._layers.items():
            if self._heads[layer]:
                _INTERVENTIONS.setdefault(module, []).append((self._heads[layer], self._edit))
                _open(module)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer, module in self._layers.items():
            if self._heads[layer]:
                _INTERVENTIONS[module].pop()
                if not _INTERVENTIONS[module]:
                    _close(module)


@contextmanager
def zero_sink_state(model: nn.Module, layers: Iterable[int], position: int = 0) -> Iterator[None]:
    """While the block lasts, the residual state at one position is 0 after the named layers.

    Raises ValueError for layers that do not exist.

    >>> with zero_sink_state(model, [0]):
    ...     logits = model(tokens)
    """
    blocks = residual_layers(model)
    missing = set(layers) - set(blocks)
    if missing:
        raise ValueError(f"layers {sorted(missing)} do not exist; there are {sorted(blocks)}")

    def clear(module: nn.Module, args: Any, output: Any) -> Any:
        state = output[0] if isinstance(output, tuple) else output
        hidden = torch.arange(state.shape[1], device=state.device) == position
        cleared = state.masked_fill(hidden[:, None], 0.0)
        return (cleared, *output[1:]) if isinstance(output, tuple) else cleared

    handles = [blocks[layer].register_forward_hook(clear) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attention_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The modules that compute attention, by layer: of a `ToyTransformer`, or those of a Hugging Face model.

    Raises ValueError when there are none that can be reached.

    >>> attention_layers(LlamaForCausalLM(config))[0]
    """
    return {layer: attention for layer, (attention, _) in _layers(model).items()}


def residual_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The blocks around those attention modules, by layer (of a `ToyTransformer` every block)."""
    toy = getattr(model, "blocks", None)
    if isinstance(toy, nn.ModuleList) and any(isinstance(getattr(b, "attention", None), CausalAttention) for b in toy):
        return dict(enumerate(toy))
    return {layer: block for layer, (_, block) in _layers(model).items()}


def num_heads(attention: nn.Module) -> int:
    """How many query heads an attention module has."""
    if isinstance(attention, CausalAttention):
        return attention.num_heads
    return int(attention.config.num_attention_heads)  # type: ignore[union-attr,arg-type]


def _layers(model: nn.Module) -> dict[int, tuple[nn.Module, nn.Module]]:
    """Attention module and block by layer."""
    found: dict[int, tuple[nn.Module, nn.Module]] = {}
    if isinstance(blocks := getattr(model, "blocks", None), nn.ModuleList):
        for layer, block in enumerate(blocks):
            if isinstance(attention := getattr(block, "attention", None), CausalAttention):
                found[layer] = attention, block
    for block in model.modules() if not found else ():
        for name, child in block.named_children():
            number = getattr(child, "layer_idx", None)
            is_attention = "attn" in name or "attention" in name
            if (
                isinstance(number, int)
                and is_attention
                and hasattr(getattr(child, "config", None), "_attn_implementation")
            ):
                found.setdefault(number, (child, block))
    if not found:
        raise ValueError(
            f"no attention of {type(model).__name__} can be reached: give a ToyTransformer or a Hugging Face model whose "
            "attention goes through the AttentionInterface (transformers 4.51 or later)"
        )
    return dict(sorted(found.items()))


# Standing in the way of attention

_INTERVENTIONS: "WeakKeyDictionary[nn.Module, list[tuple[list[int], Edit]]]" = WeakKeyDictionary()
_PREFIX = "dynascope-heads:"


def _open(module: nn.Module) -> None:
    if isinstance(module, CausalAttention):
        module.attend = lambda query, key, value: _toy(module, query, key, value)  # type: ignore[method-assign]
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    config: Any = module.config
    own = config._attn_implementation or "eager"
    if not own.startswith(_PREFIX):
        AttentionInterface.register(_PREFIX + own, _transformers)
        if own in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(_PREFIX + own, ALL_MASK_ATTENTION_FUNCTIONS[own])
        config._attn_implementation_internal = _PREFIX + own


def _close(module: nn.Module) -> None:
    del _INTERVENTIONS[module]
    if isinstance(module, CausalAttention):
        del module.__dict__["attend"]
        return
    config: Any = module.config
    is_shared = any(getattr(other, "config", None) is config for other in _INTERVENTIONS)
    if not is_shared:
        config._attn_implementation_internal = config._attn_implementation.removeprefix(_PREFIX)


def _toy(module: CausalAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    own = CausalAttention.attend(module, query, key, value)
    return _edited(module, own, query, key, value, WEIGHTS[module.kind], is_causal=True)


def _transformers(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, Any]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = module.config._attn_implementation.removeprefix(_PREFIX)  # type: ignore[union-attr,operator]
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attention = ALL_ATTENTION_FUNCTIONS.get(name, eager)
    out, weights = attention(module, query, key, value, attention_mask, **settings)
    if module not in _INTERVENTIONS:
        return out, weights
    is_causal = settings.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    groups = query.shape[1] // value.shape[1]
    key, value = (one.float().repeat_interleave(groups, dim=1) for one in (key, value))
    edited = _edited(
        module,
        out.transpose(1, 2),
        query.float(),
        key,
        value,
        WEIGHTS.get(name, softmax_weights),
        is_causal=bool(is_causal) and attention_mask is None and query.shape[2] > 1,
        mask=None if attention_mask is None else attention_mask[..., : key.shape[2]],
        scale=settings.get("scaling"),
    )
    return edited.transpose(1, 2).contiguous(), weights


def _edited(
    module: nn.Module,
    own: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    to_weights: Callable[[Tensor], Tensor],
    *,
    is_causal: bool,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The module's own output with that of edited heads in its place, wherever the edit makes a difference."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = masked_logits(query, key, is_causal=is_causal, mask=mask, scale=scale)
    sink = torch.isfinite(logits[:, 0, -1]).to(torch.uint8).argmax(-1)
    before = now = HeadState(query, key, logits, to_weights(logits), value, sink, scale, to_weights)
    for heads, edit in _INTERVENTIONS[module]:
        now = _in_heads(now, edit, heads)
    plain, edited = before.output(), now.output()
    return torch.where(plain == edited, own, edited.to(own.dtype))


def _in_heads(state: HeadState, edit: Edit, heads: Sequence[int]) -> HeadState:
    """The state with the edit done in some heads only."""
    if len(heads) == state.logits.shape[1]:
        return edit(state)
    index = torch.tensor(heads, device=state.logits.device)
    by_head = ("query", "key", "logits", "weights", "value")
    taken: dict[str, Any] = {name: getattr(state, name).index_select(1, index) for name in by_head}
    done = edit(replace(state, **taken))
    put: dict[str, Any] = {name: getattr(state, name).index_copy(1, index, getattr(done, name)) for name in by_head}
    return replace(state, **put)
