"""Finding attention in the operations a model runs, whichever way the model writes it.

Fused attention (`scaled_dot_product_attention` on every backend) arrives as one operation with its query, key and
value. Eager attention (HF "eager", `nn.MultiheadAttention` with weights, hand-written matmul–softmax–matmul) arrives as
batched product, scale, mask, softmax and product; following the storages through these names the same operands. ReLU
over the number of keys, and sigmoid with an added bias or mask, are followed in the softmax's place; without that number
or bias they would be an MLP's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dynascope.probes.views import AttentionCall

aten = torch.ops.aten

_FUSED = {
    getattr(aten, name)
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
        "_scaled_dot_product_attention_math_for_mps",
    )
    if hasattr(aten, name)
}
_PRODUCT = {aten.bmm, aten.baddbmm}
_SOFTMAX = {aten._softmax, aten._safe_softmax}
_UNNORMALIZED = {aten.relu: "relu", aten.sigmoid: "sigmoid"}
_SCALE = {aten.mul, aten.mul_, aten.div, aten.div_}
_MASK = {aten.add, aten.add_, aten.masked_fill, aten.masked_fill_, aten.where}
_PASS = {aten._to_copy, aten.clone, aten.native_dropout, aten.dropout, aten.contiguous}


@dataclass(frozen=True)
class _Product:
    """A batched matrix product on its way to a softmax: left (N, Tq, d), right (N, d, Tk), what multiplied it since."""

    left: Tensor
    right: Tensor
    scale: float = 1.0
    mask: Tensor | None = None


@dataclass(frozen=True)
class _Weights:
    """Softmax, ReLU or sigmoid of a product, with the shape that it had there."""

    product: _Product
    shape: tuple[int, ...]
    kind: str = "softmax"
    is_counted: bool = False
    """Divided by a number a row since."""

    @property
    def is_attention(self) -> bool:
        return self.kind == "softmax" or (self.is_counted if self.kind == "relu" else self.product.mask is not None)


class AttentionTap:
    """Sees every operation of a pass and hands each attention call to `on_call`.

    `place` tells where the model is: the innermost module's name, and its number of heads if it states one (needed
    where the model has merged rows and heads into one axis). `tokens` are the ids that the model was called with.
    """

    def __init__(
        self,
        on_call: Callable[[AttentionCall], None],
        place: Callable[[], tuple[str, int | None]],
        tokens: Tensor | None = None,
    ) -> None:
        self._on_call = on_call
        self._place = place
        self._tokens = tokens
        # Keyed by storage address. An address is forgotten as soon as a new tensor is born at it.
        self._followed: dict[int, _Product | _Weights] = {}

    def see(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """Look at one operation after it has run."""
        packet = func.overloadpacket
        if packet in _FUSED:
            self._see_fused(func, args, kwargs)
            return
        first_output = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(first_output, Tensor):
            return
        inputs = [argument for argument in args if isinstance(argument, Tensor)]
        address = _address(first_output)
        if any(_address(tensor) == address for tensor in inputs) and packet not in _SCALE | _MASK:
            return  # a view, or in place: what is known of the storage stays true
        known = [(tensor, self._followed.get(_address(tensor))) for tensor in inputs]
        born = self._derive(packet, args, kwargs, known, first_output)
        if born is None:
            self._followed.pop(address, None)
        else:
            self._followed[address] = born

    def _derive(
        self,
        packet: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        known: list[tuple[Tensor, _Product | _Weights | None]],
        output: Tensor,
    ) -> _Product | _Weights | None:
        if packet in _PRODUCT:
            left, right = args[-2], args[-1]
            attended = self._followed.get(_address(left))
            if isinstance(attended, _Weights) and attended.is_attention and attended.shape[-1] == right.shape[-2]:
                self._see_eager(attended, right)
            mask = args[0] if packet is aten.baddbmm and kwargs.get("beta", 1) != 0 else None
            return _Product(left, right, float(kwargs.get("alpha", 1)), mask)
        source = next((value for _, value in known if value is not None), None)
        if source is None:
            return None
        if packet in _PASS:
            return source
        if isinstance(source, _Weights):
            if packet not in _SCALE or output.shape != known[0][0].shape:
                return None
            return replace(source, is_counted=packet is aten.div and known[-1][0].shape == (*output.shape[:-1], 1))
        if packet in _UNNORMALIZED:
            return _Weights(source, tuple(output.shape), _UNNORMALIZED[packet])
        if packet in _SOFTMAX:
            return _Weights(source, tuple(output.shape)) if args[1] in (-1, output.ndim - 1) else None
        if packet in _SCALE:
            factor = _number(args[1])
            if factor is None or known[0][1] is None:
                return None
            return replace(source, scale=source.scale * (1 / factor if packet in {aten.div, aten.div_} else factor))
        if packet in _MASK:
            mask = _mask_of(packet, args, self._followed)
            return None if mask is None else replace(source, mask=_combine(source.mask, mask, output))
        return None

    def _see_fused(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        query = given["query"]
        if query.ndim != 4:
            return
        scale = given.get("scale")
        mask = given.get("attn_mask", given.get("attn_bias"))
        self._on_call(
            AttentionCall(
                name=self._place()[0],
                query=query,
                key=given["key"],
                value=given["value"],
                scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale,
                is_causal=bool(given.get("is_causal", False)),
                mask=_four_dims(mask),
                tokens=self._tokens_of(query),
            )
        )

    def _tokens_of(self, query: Tensor) -> Tensor | None:
        """The ids of the model's tokens, where its attention is over them, row by row."""
        tokens = self._tokens
        return tokens if tokens is not None and tokens.shape == (query.shape[0], query.shape[2]) else None

    def _see_eager(self, weights: _Weights, value: Tensor) -> None:
        name, num_heads = self._place()
        product = weights.product
        count, num_queries, head_dim = product.left.shape
        if len(weights.shape) == 4:
            rows, heads = weights.shape[:2]
        else:
            heads = num_heads if num_heads is not None and count % num_heads == 0 else count
            rows = count // heads
        if rows * heads != count or product.right.shape[0] != count or value.shape[0] != count:
            return
        mask = product.mask
        if mask is not None and mask.ndim == 3 and len(weights.shape) == 3:
            mask = mask.expand(count, *mask.shape[1:]).reshape(rows, heads, *mask.shape[1:])
        query = product.left.reshape(rows, heads, num_queries, head_dim)
        self._on_call(
            AttentionCall(
                name=name,
                query=query,
                key=product.right.transpose(1, 2).reshape(rows, heads, -1, head_dim),
                value=value.reshape(rows, heads, value.shape[-2], value.shape[-1]),
                scale=product.scale,
                mask=_four_dims(mask),
                tokens=self._tokens_of(query),
                kind=weights.kind,
            )
        )


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _number(value: Any) -> float | None:
    if isinstance(value, (int, float)):
        return float(value)
    return float(value) if isinstance(value, Tensor) and value.ndim == 0 and value.device.type == "cpu" else None


def _mask_of(packet: Any, args: Sequence[Any], followed: Mapping[int, Any]) -> Tensor | None:
    """What a masking operation hides, as a bool mask (True = visible) or as something added to the logits."""
    if packet in {aten.masked_fill, aten.masked_fill_}:
        hidden: Tensor = args[1]
        return ~hidden
    if packet is aten.where:
        condition: Tensor = args[0]
        is_product_chosen = isinstance(args[1], Tensor) and _address(args[1]) in followed
        return condition if is_product_chosen else ~condition
    return next((a for a in args[:2] if isinstance(a, Tensor) and _address(a) not in followed), None)


def _combine(first: Tensor | None, second: Tensor, logits: Tensor) -> Tensor:
    """Two masks as one; a bool mask becomes an added one when it meets an added one."""
    if first is None:
        return second
    if first.dtype == torch.bool and second.dtype == torch.bool:
        return first & second
    added = [_as_added(mask, logits.device) for mask in (first, second)]
    return added[0] + added[1]


def _as_added(mask: Tensor, device: torch.device) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape, device=device).masked_fill(~mask, float("-inf"))


def _four_dims(mask: Tensor | None) -> Tensor | None:
    """A mask with the leading axes that broadcasting would give it."""
    return None if mask is None else mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
