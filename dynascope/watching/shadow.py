"""The shadow pass: a few rows of the batch go through the uncompiled model once more, watched by probes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dynascope.probes.probe import Need
from dynascope.probes.views import AttentionCall, ModuleOutput
from dynascope.watching.attention_tap import AttentionTap
from dynascope.watching.undisturbed import undisturbed

aten = torch.ops.aten

# The number of positions (rows × tokens) that one shadow pass looks at, and its most and fewest rows.
POSITIONS, MOST_ROWS, FEWEST_ROWS = 512, 256, 2

_ACTIVATIONS = {
    aten.relu: "relu",
    aten.relu_: "relu",
    aten.gelu: "gelu",
    aten.silu: "silu",
    aten.silu_: "silu",
    aten.threshold: "relu",
    aten.hardtanh: "relu6",
    aten.elu: "elu",
    aten.leaky_relu: "leaky_relu",
    aten.mish: "mish",
}
_CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)

# Called once for every place; answers whether the view was of use.
Observer = Callable[[Need, ModuleOutput | AttentionCall], None]


def shadow_pass(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    needs: frozenset[Need],
    observe: Observer,
    prefix: str = "",
) -> None:
    """Run `model` on the first rows of its arguments and show `observe` each place that some probe needs.

    Nothing is kept between places: memory is that of one evaluation forward pass on at most 512 positions, plus the
    largest view. The model runs in evaluation mode under the caller's autocast, without gradients. `prefix` stands
    before the names of modules, where `model` is a part of something larger.

    >>> shadow_pass(model, (tokens,), {}, frozenset({Need.ATTENTION}), lambda need, view: print(view.name))
    """
    tap(model, *first_rows(args, kwargs), needs, observe, prefix)


def tap(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    needs: frozenset[Need],
    observe: Observer,
    prefix: str = "",
) -> Any:
    """`shadow_pass` on all the rows that are given; returns what the model does."""
    tokens = next(
        (leaf for leaf in _tensors([kwargs.get("input_ids")], {}) + _tensors(args, kwargs) if is_tokens(leaf)), None
    )
    with undisturbed(model), torch.no_grad(), _Taps(model, needs, observe, prefix, tokens):
        return model(*args, **kwargs)


def first_rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A model's arguments cut to the rows that are looked at; what has no row a row of the batch stays whole.

    >>> first_rows((torch.zeros(64, 128, dtype=torch.long),), {})[0][0].shape
    torch.Size([4, 128])
    """
    flat = _tensors(args, kwargs)
    batch_size = flat[0].shape[0] if flat else 0
    rows = rows_for(flat[0]) if flat else 0

    def first(leaf: Any) -> Any:
        is_batched = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch_size
        return leaf[:rows] if is_batched else leaf

    cut: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(first, (tuple(args), dict(kwargs)))
    return cut


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    leaves = tree_leaves((tuple(args), dict(kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim > 0]


def is_tokens(tensor: Tensor) -> bool:
    """Whether it looks like token ids: integers by row and position."""
    return tensor.ndim == 2 and tensor.dtype in (torch.int64, torch.int32)


def rows_for(batch: Tensor) -> int:
    """How many rows of a batch are looked at, so that rows × positions is about 512.

    Integer (rows, tokens) and float (rows, tokens, features) count their tokens; anything else counts one position.

    >>> rows_for(torch.zeros(64, 128, dtype=torch.long))
    4
    """
    positions = batch.shape[1] if is_tokens(batch) or batch.ndim == 3 else 1
    wanted = POSITIONS // max(positions, 1)
    return min(batch.shape[0], MOST_ROWS, max(FEWEST_ROWS, wanted))


def residual_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a deep model: the list of two or more modules of one type that holds most parameters."""
    best: tuple[int, dict[str, nn.Module]] = (0, {})
    for name, container in model.named_modules():
        children = list(container.children())
        is_stack = isinstance(container, (nn.ModuleList, nn.Sequential)) and len(children) > 1
        if not is_stack or len({type(child) for child in children}) > 1 or not list(children[0].children()):
            continue
        size = sum(parameter.numel() for parameter in container.parameters())
        if size > best[0]:
            prefix = f"{name}." if name else ""
            best = size, {f"{prefix}{child_name}": child for child_name, child in container.named_children()}
    return best[1]


class _Taps(TorchDispatchMode):
    """Sees modules through global hooks and operations through dispatch, for the length of one pass."""

    def __init__(
        self, model: nn.Module, needs: frozenset[Need], observe: Observer, prefix: str, tokens: Tensor | None
    ) -> None:
        super().__init__()
        self._names = {id(module): f"{prefix}{name}".rstrip(".") for name, module in model.named_modules()}
        self._blocks = {id(block) for block in residual_blocks(model).values()}
        self._needs = needs
        self._observe = observe
        self._stack: list[nn.Module] = []
        self._seen: dict[str, int] = {}
        self._is_paused = False
        self._attention = AttentionTap(lambda call: self._show(Need.ATTENTION, call), self._place, tokens)

    def __enter__(self) -> "_Taps":
        self._handles = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        self._stack.append(module)

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack and self._stack[-1] is module:
            self._stack.pop()
        tensor = output[0] if isinstance(output, (tuple, list)) and output else output
        name = self._names.get(id(module))
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.ndim < 2 or name is None:
            return
        if id(module) in self._blocks:
            self._show(Need.BLOCKS, ModuleOutput(name, module, tensor.detach(), _is_image(module, tensor)))
        if next(module.children(), None) is None and next(module.parameters(recurse=False), None) is not None:
            self._show(Need.MODULES, ModuleOutput(name, module, tensor.detach(), _is_image(module, tensor)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self._is_paused:
            return output
        if Need.ATTENTION in self._needs:
            self._attention.see(func, args, kwargs, output)
        kind = _ACTIVATIONS.get(func.overloadpacket)
        if kind is not None and Need.ACTIVATIONS in self._needs and output.ndim >= 2:
            module = self._stack[-1] if self._stack else None
            self._show(Need.ACTIVATIONS, ModuleOutput(self._unique(kind), module, output, output.ndim >= 4, kind))
        return output

    def _show(self, need: Need, view: ModuleOutput | AttentionCall) -> None:
        if need not in self._needs:
            return
        # The probes' own operations run under these taps too and are not part of the model.
        was_paused, self._is_paused = self._is_paused, True
        try:
            self._observe(need, view)
        finally:
            self._is_paused = was_paused

    def _place(self) -> tuple[str, int | None]:
        """The innermost module's name, numbered when it computes attention more than once, and its number of heads."""
        module = self._stack[-1] if self._stack else None
        heads = getattr(module, "num_heads", None)
        return self._unique("attention"), heads if isinstance(heads, int) else None

    def _unique(self, kind: str) -> str:
        """A name for what happens at the current place: `blocks.0.mlp`, and `blocks.0.mlp#2` for the second time."""
        name = self._names.get(id(self._stack[-1]), "") if self._stack else ""
        key = f"{kind}@{name}"
        self._seen[key] = self._seen.get(key, 0) + 1
        shown = name or kind
        return shown if self._seen[key] == 1 else f"{shown}#{self._seen[key]}"


def _is_image(module: nn.Module, tensor: Tensor) -> bool:
    return tensor.ndim >= 4 or (tensor.ndim == 3 and isinstance(module, _CHANNELS_FIRST))
