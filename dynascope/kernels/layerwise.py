"""What each layer adds to the gradients of single examples: its input, and the gradient at its output.

A linear layer's gradient for one example is a sum over positions of outer products, (gradient of the output) ⊗ (input).
Whoever wants norms or inner products of such gradients can have them from these two factors, without the gradients
themselves. Convolutions, embeddings and normalizations have factors of the same kind, or small explicit gradients.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CHANNELS_FIRST = (nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Outer:
    """A weight's gradients, one an example, as Σ_t (gradient at position t) ⊗ (input at position t).

    `inputs` (examples, positions, width) or, of a lookup, the rows that were looked up, (examples, positions) integers;
    `gradients` (examples, positions, width). `is_input_first` is True where the weight's first axis is the input's.
    """

    inputs: Tensor
    gradients: Tensor
    is_input_first: bool = False

    @property
    def is_lookup(self) -> bool:
        """Whether the layer is an embedding."""
        return not self.inputs.is_floating_point()

    def explicit(self, shape: torch.Size) -> Tensor:
        """The gradients themselves, (examples, *shape)."""
        if self.is_lookup:
            zeros = self.gradients.new_zeros(len(self.gradients), *shape)
            return zeros.scatter_add_(1, self.inputs[..., None].expand_as(self.gradients), self.gradients)
        left, right = (self.inputs, self.gradients) if self.is_input_first else (self.gradients, self.inputs)
        return (left.transpose(1, 2) @ right).view(-1, *shape)


@dataclass(frozen=True)
class Explicit:
    """A weight's gradients as they are, (examples, *weight)."""

    gradients: Tensor

    def explicit(self, shape: torch.Size) -> Tensor:
        """The gradients in the weight's shape."""
        return self.gradients.reshape(-1, *shape)


Use: TypeAlias = Outer | Explicit
Receive: TypeAlias = Callable[[nn.Module, Tensor, Tensor], None]
"""(layer, its input, the gradient at its output), called for each use of each known layer at each backward pass."""


def called(model: Callable[..., Any], inputs: Any) -> Any:
    """The model on its inputs, however many it has."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def logits_of(output: Any) -> Tensor:
    """What a model returned, or the logits in it, as Hugging Face's models have them."""
    logits: Tensor = getattr(output, "logits", output)
    return logits


def refuse_mixing(model: nn.Module) -> None:
    """Raises ValueError for batch normalization in training mode, under which examples have no gradient of their own."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ValueError(f"{name} is batch normalization in training mode, which mixes examples; call model.eval()")


def functional(model: nn.Module, parameters: Mapping[str, Tensor]) -> Callable[[Mapping[str, Tensor], Any], Any]:
    """The model as a function of the named parameters and its inputs; weights that are shared stay shared.

    `functional_call`'s own way of sharing leaves a module that is used twice with what was put into it.

    >>> functional(model, dict(model.named_parameters()))(other_values, inputs)
    """
    places = {
        f"{path}.{name}".lstrip("."): parameter
        for path, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    names = {id(parameter): name for name, parameter in parameters.items()}

    def function(chosen: Mapping[str, Tensor], inputs: Any) -> Any:
        values = {place: chosen.get(names.get(id(at), ""), at.detach()) for place, at in places.items()}
        return called(lambda *a, **k: functional_call(model, values, a, k, tie_weights=False), inputs)

    return function


class LayerTap:
    """One forward pass of a batch whose backward passes show each known layer's input and output gradient.

    `unknown` are the parameters, by id, that take part in another way, and `num_uses` how often each known one is used:
    both are complete after `forward`. Nothing is computed for the weights themselves.

    >>> with frozen(parameters), torch.enable_grad():
    ...     outputs = tap.forward(lambda: model(inputs))
    ...     tap.backward(outputs[:, 0].sum())
    """

    def __init__(
        self, model: nn.Module, parameters: Iterable[nn.Parameter], num_examples: int, receive: Receive
    ) -> None:
        self.shapes = {id(parameter): parameter.shape for parameter in parameters}
        self.num_uses: Counter[int] = Counter()
        self.unknown: set[int] = set()
        self._model, self._num_examples, self._receive = model, num_examples, receive
        device = next((parameter.device for parameter in model.parameters()), None)
        self._anchor = torch.zeros((), device=device, requires_grad=True)

    def forward(self, function: Callable[[], Tensor]) -> Tensor:
        """What `function` returns, with hooks in place that see every known layer's input now and gradient later."""
        with ExitStack() as stack:
            spy = stack.enter_context(_Spy(self.shapes))
            for module in self._model.modules():
                if is_known(module):
                    enter = module.register_forward_pre_hook(lambda module, args: spy.enter(module))
                    leave = module.register_forward_hook(self._hook(spy))
                    stack.callback(enter.remove)
                    stack.callback(leave.remove)
            result = function()
        self.unknown |= spy.seen | (self.shapes.keys() - self.num_uses.keys())
        return result

    def backward(self, scalar: Tensor, *, retain_graph: bool = False) -> None:
        """One backward pass from `scalar`."""
        if scalar.requires_grad:
            torch.autograd.grad(scalar, self._anchor, retain_graph=retain_graph, allow_unused=True)

    def knows(self, parameter: Tensor | None) -> bool:
        """Whether the parameter's gradients are complete in what was received."""
        return parameter is not None and id(parameter) in self.shapes and id(parameter) not in self.unknown

    def _hook(self, spy: "_Spy") -> Callable[..., Tensor]:
        def seen(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            spy.leave(module)
            own = [one for one in module._parameters.values() if id(one) in self.shapes]
            if not own:
                return output
            self.num_uses.update(id(one) for one in own)
            if args[0].shape[0] != self._num_examples:
                self.unknown |= {id(one) for one in own}
                return output
            if not output.requires_grad:
                output = output + self._anchor  # a first layer's output leads to nothing that is trained
            output.register_hook(lambda gradient: self._receive(module, args[0].detach(), gradient.detach()))
            return output

        return seen


class _Spy(TorchFunctionMode):
    """Sees parameters that take part in anything but the forward of a known layer that owns them."""

    def __init__(self, watched: Mapping[int, torch.Size]) -> None:
        super().__init__()
        self.watched, self.seen, self.inside = watched, set[int](), list[nn.Module]()

    def enter(self, module: nn.Module) -> None:
        """The forward of a known layer begins."""
        self.inside.append(module)

    def leave(self, module: nn.Module) -> None:
        """It ends."""
        self.inside.pop()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, (Tensor, tuple, list)) and not self.inside:
            used = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, nn.Parameter)}
            if used and any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
                self.seen |= used & self.watched.keys()
        return result


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """No gradients for the weights themselves, which would be a third of the work."""
    parameters = list(parameters)
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def is_known(module: nn.Module) -> bool:
    """Whether `uses` knows this kind of layer."""
    if module._parameters.get("weight") is None:
        return False  # without one, or reparametrized
    if isinstance(module, nn.Embedding):
        return not (module.scale_grad_by_freq or module.sparse or module.max_norm is not None)
    return (
        isinstance(module, (nn.Linear, *CONVOLUTIONS, *NORMS))
        or type(module).__name__ == "Conv1D"
        or _is_rms_norm(module)
    )


def _is_rms_norm(module: nn.Module) -> bool:
    """Other libraries' RMS norms: one weight, and a name that says so."""
    return type(module).__name__.endswith("RMSNorm") and list(dict(module.named_parameters())) == ["weight"]


def uses(module: nn.Module, inputs: Tensor, gradient: Tensor) -> Iterator[tuple[str, Use]]:
    """What one call of a layer adds to the gradients of each of its parameters, by the parameter's own name.

    A layer that scales its weights in its forward pass says so by `weight_scale` and `bias_scale`.

    >>> dict(uses(nn.Linear(3, 2), torch.ones(5, 3), torch.ones(5, 2)))["weight"].explicit(torch.Size([2, 3])).shape
    torch.Size([5, 2, 3])
    """
    if isinstance(module, nn.Embedding):
        rows, right = inputs.reshape(len(inputs), -1), gradient.reshape(len(inputs), -1, gradient.shape[-1])
        if module.padding_idx is not None:
            right = right * (rows != module.padding_idx)[..., None]
        yield "weight", Outer(rows, right, is_input_first=True)
        return
    if isinstance(module, (*NORMS,)) or _is_rms_norm(module):
        yield from _norm_uses(module, inputs, gradient)
        return
    if isinstance(module, CONVOLUTIONS):
        per_position = gradient.flatten(2).transpose(1, 2)
        yield "weight", _convolution_use(module, inputs, per_position)
    else:
        per_position = gradient.reshape(len(gradient), -1, gradient.shape[-1])
        incoming = _scaled(inputs.reshape(len(inputs), -1, inputs.shape[-1]), module, "weight")
        is_transposed = type(module).__name__ == "Conv1D"
        yield "weight", Outer(incoming, per_position, is_transposed)
    if module._parameters.get("bias") is not None:
        yield "bias", Explicit(_scaled(per_position.sum(1), module, "bias"))


def _scaled(tensor: Tensor, module: nn.Module, name: str) -> Tensor:
    scale = float(getattr(module, f"{name}_scale", 1.0))
    return tensor if scale == 1.0 else tensor * scale


def _convolution_use(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor, per_position: Tensor) -> Use:
    """A convolution is linear in the patches of its input, whose views are copied once."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    windows = F.pad(inputs, module._reversed_padding_repeated_twice, mode)
    for dim, (size, step, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        windows = windows.unfold(dim, dilation * (size - 1) + 1, step)[..., ::dilation]
    num_dims = len(module.kernel_size)
    order = (0, 1, *range(2 + num_dims, 2 + 2 * num_dims), *range(2, 2 + num_dims))
    patches = windows.permute(order).reshape(len(inputs), -1, per_position.shape[1])  # (examples, width, positions)
    patches = _scaled(patches, module, "weight")
    if module.groups == 1:
        return Outer(patches.mT, per_position)
    grouped = (part.unflatten(1, (module.groups, -1)) for part in (per_position.mT, patches))
    return Explicit(torch.einsum("egop,egip->egoi", *grouped))


def _norm_uses(module: nn.Module, inputs: Tensor, gradient: Tensor) -> Iterator[tuple[str, Use]]:
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    zeros = {name: torch.zeros_like(parameter) for name, parameter in own.items()}
    scaled = functional_call(module, {**zeros, "weight": torch.ones_like(zeros["weight"])}, inputs)
    if type(module) not in NORMS:  # a library's own may multiply by 1 + weight; affine in the weight it is
        scaled = scaled - functional_call(module, zeros, inputs)
    num_dims = own["weight"].ndim
    kept = (1,) if isinstance(module, CHANNELS_FIRST) else tuple(range(inputs.ndim - num_dims, inputs.ndim))
    summed = tuple(dim for dim in range(1, inputs.ndim) if dim not in kept)
    for name, product in (("weight", gradient * scaled), ("bias", gradient)):
        if name in own:
            yield name, Explicit(product.sum(summed) if summed else product)
