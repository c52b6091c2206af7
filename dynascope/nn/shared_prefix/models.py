"""Packed rows through models that know nothing of them: Hugging Face's by its attention interface, any other by intercepting
`F.scaled_dot_product_attention`. No model is copied or changed for good."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dynascope.nn.shared_prefix.attention import Backend, grouped_attention
from dynascope.nn.shared_prefix.layout import SharedPrefix
from dynascope.nn.shared_prefix.tree import PrefixTree

_NAME = "dynascope_shared_prefix"
_GROUPED_LAYERS = {"full_attention", "sliding_attention"}


class SharedPrefixMode(TorchFunctionMode):
    """Within it, every `F.scaled_dot_product_attention` over whole packed rows follows the rule of shared prompts.

    For models of your own: hand them `layout.pack(...)` and `layout.position_ids`. A boolean mask or `is_causal` that the model
    gives is put aside, as the layout holds both. Raises ValueError for a mask that is added to scores (ALiBi and other biases),
    and for attention dropout, which cannot be the same in both batches.

    >>> with SharedPrefixMode(layout):
    ...     output = model(layout.pack(prompt_ids, completion_ids), positions=layout.position_ids)
    """

    def __init__(self, layout: SharedPrefix | PrefixTree, backend: Backend = "auto") -> None:
        super().__init__()
        self.layout, self.backend = layout, backend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See the class."""
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        _refuse_dropout(given.get("dropout_p", 0.0))
        mask = given.get("attn_mask")
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(
                f"a mask of {mask.dtype} is added to scores, which packed rows do not know: make it boolean, or leave it out"
            )
        query, key, value = (given[name] for name in ("query", "key", "value"))
        return grouped_attention(query, key, value, self.layout, backend=self.backend, scale=given.get("scale"))


@dataclass(eq=False)
class _Sharing:
    """What travels as a keyword argument to every attention layer."""

    layout: SharedPrefix | PrefixTree
    backend: Backend
    has_arrived: list[bool] = field(default_factory=list)


def shared_prefix_forward(
    model: nn.Module,
    rows: Int[Tensor, "B T"],
    layout: SharedPrefix | PrefixTree,
    *,
    backend: Backend = "auto",
    cells: Int[Tensor, " cells"] | None = None,
    position_ids: Int[Tensor, "*axes B T"] | None = None,
    **more: Any,
) -> Any:
    """A causal language model of Hugging Face's on packed rows: its own output, as if every completion stood behind a prompt
    of its own.

    With `cells` (flat numbers of B · T, such as `layout.logit_positions`) the output head sees these alone, and logits are
    (1, cells, vocabulary). `position_ids` are for models whose positions have several axes (`layout.positions_behind`). With
    gradient checkpointing, wrap forward and backward in `prefix_sharing`.

    Dropout elsewhere than in attention falls differently in packed rows, so that both batches are equal in distribution alone:
    of that it warns. A compiled model is compiled anew for what `cells` asks of its head.

    Raises ValueError for a model whose attention cannot be reached: other kinds of layers (linear attention, state spaces), a
    model that does not pass keyword arguments on (those with ALiBi among them), attention dropout, a cache, the losses of a
    mixture's router, or a compiled model that does not let `cells` reach its head.

    >>> logits = shared_prefix_forward(model, layout.pack(prompt_ids, completion_ids), layout).logits
    """
    if more.get("past_key_values") is not None or more.get("use_cache"):
        raise ValueError("packed rows have no key-value cache: leave out past_key_values and use_cache")
    inner = unwrapped(model)
    text = inner.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - _GROUPED_LAYERS
    if kinds:
        raise ValueError(
            f"layers of kind {', '.join(sorted(kinds))} carry what they saw from one completion to the next"
        )
    if more.get("output_router_logits", getattr(text, "output_router_logits", False)):
        raise ValueError(
            "a router's balancing loss would count a shared prompt once: set output_router_logits=False, and add it yourself"
        )
    if not getattr(inner, "_supports_attention_backend", True) or getattr(text, "alibi", False):
        raise ValueError(_not_reached(inner))
    warn_of_dropout(inner)
    is_installed = text._attn_implementation == _NAME
    if _runs_layers_again(inner) and not is_installed:
        raise ValueError(
            "gradient checkpointing runs layers again in the backward pass: "
            "wrap forward and backward in `with prefix_sharing(model):`"
        )
    sharing = _Sharing(layout, backend)
    # Models take a mask of four dimensions as it is, and so make none from positions that start anew. Attention of any
    # other kind than ours would add it, and not go unnoticed.
    poison = torch.full((len(rows), 1, 1, 1), torch.nan, device=rows.device, dtype=inner.dtype)
    # What was compiled while the head had no hook must not be taken for what has one, nor the other way round. Where the
    # compiler was never loaded, which takes seconds, nothing is compiled.
    is_loaded = "torch._dynamo" in sys.modules
    with_hooks = torch._dynamo.config.patch(skip_nnmodule_hook_guards=False) if is_loaded else nullcontext()
    with _selected(inner, cells), prefix_sharing(inner), with_hooks:
        output = model(
            input_ids=rows,
            position_ids=layout.position_ids if position_ids is None else position_ids,
            attention_mask=poison,
            use_cache=False,
            shared_prefix=sharing,
            **more,
        )
    if not sharing.has_arrived:
        raise ValueError(_not_reached(inner))
    return output


@contextmanager
def prefix_sharing(model: nn.Module) -> Iterator[None]:
    """Within it, a Hugging Face model can be given packed rows; what is given otherwise runs through SDPA as always.

    Needed around forward and backward under gradient checkpointing alone; `shared_prefix_forward` opens it by itself.

    >>> with prefix_sharing(model):
    ...     shared_prefix_forward(model, rows, layout).logits.logsumexp(-1).sum().backward()
    """
    _register()
    inner = unwrapped(model)
    before = inner.config.get_text_config()._attn_implementation
    if before == _NAME:
        yield
        return
    inner.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        inner.set_attn_implementation(before)


def unwrapped(model: nn.Module) -> Any:
    """The model inside DistributedDataParallel, through which forward has to go so that gradients are reduced; else itself.

    >>> unwrapped(DistributedDataParallel(model)) is model
    True
    """
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    shared_prefix: _Sharing | None = None,
    **settings: Any,
) -> tuple[Float[Tensor, "B T H e"], None]:
    """Attention in the form that Hugging Face's interface wants."""
    if shared_prefix is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
        return output
    _refuse_dropout(settings.get("dropout", 0.0))
    shared_prefix.has_arrived[:] = [True]
    mixed = grouped_attention(
        query,
        key,
        value,
        shared_prefix.layout,
        backend=shared_prefix.backend,
        scale=settings.get("scaling"),
        window=settings.get("sliding_window"),
        soft_cap=settings.get("softcap"),
    )
    return mixed.transpose(1, 2).contiguous(), None


def _not_reached(model: nn.Module) -> str:
    return f"{type(model).__name__} does not hand keyword arguments to its attention, so prompts cannot be shared"


def warn_of_dropout(model: nn.Module) -> None:
    """Warn where layers drop at random, so that shared and repeated prompts are equal in distribution alone.

    >>> warn_of_dropout(model.train())
    """
    layers = [one for one in model.modules() if one.training]
    rates = [one.p for one in layers if isinstance(one, nn.Dropout)]
    # What Hugging Face's attention hands to its kernel; asked of the module itself, where nothing is looked for in vain.
    rates += [rate for one in layers if isinstance(rate := vars(one).get("attention_dropout"), float)]
    if max(rates, default=0.0) > 0:
        warnings.warn(
            f"dropout of {max(rates)} falls differently on shared prompts than on repeated ones: equal in distribution alone; "
            "set it to 0, or use model.eval()",
            stacklevel=3,
        )


def _runs_layers_again(model: nn.Module) -> bool:
    return model.training and any(getattr(one, "gradient_checkpointing", False) for one in model.modules())


def _refuse_dropout(rate: float) -> None:
    if rate:
        raise ValueError(
            f"attention dropout of {rate} falls differently in packed rows; set it to 0, or use model.eval()"
        )


@contextmanager
def _selected(model: nn.Module, cells: Tensor | None) -> Iterator[None]:
    """Let the output head see some cells alone."""
    if cells is None:
        yield
        return
    with before_head(model, lambda hidden: hidden.flatten(0, 1)[cells][None]):
        yield


def shared_prefix_hidden(
    model: nn.Module,
    rows: Int[Tensor, "B T"],
    layout: SharedPrefix | PrefixTree,
    cells: Int[Tensor, " cells"],
    **more: Any,
) -> Float[Tensor, "cells width"]:
    """What reaches the output head at some cells, so that whoever asks can apply it bit by bit; else as `shared_prefix_forward`.

    >>> hidden = shared_prefix_hidden(model, rows, layout, layout.logit_positions)
    """
    caught: list[Tensor] = []

    def catch(hidden: Tensor) -> Tensor:
        caught.append(hidden.flatten(0, 1)[cells])
        return hidden[:1, :1]

    with before_head(unwrapped(model), catch):
        shared_prefix_forward(model, rows, layout, **more)
    return caught[0]


@contextmanager
def before_head(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let the output head see what `change` makes of its input. Raises ValueError where the head was never called.

    >>> with before_head(model, lambda hidden: hidden[:, -1:]):
    ...     last = model(ids).logits
    """
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    reached: list[bool] = []

    def changed(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        reached.append(True)
        return change(args[0]), *args[1:]

    hook = head.register_forward_pre_hook(changed)
    try:
        yield
    finally:
        hook.remove()
    if not reached:
        raise ValueError(
            f"{type(model).__name__} never called its output head, so no cells can be chosen; if it was compiled before, call "
            "torch._dynamo.reset()"
        )
