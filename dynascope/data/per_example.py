"""The norm of every example's own gradient, without computing those gradients one by one.

A layer's gradient for one example is a sum over positions of outer products, (gradient of the output) ⊗ (input). The
norm of such a sum follows from two small Gram matrices, so one forward and one backward of the batch are enough.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

LossFunction: TypeAlias = Callable[[Any, Any], Tensor]
"""(what the model returns, targets) -> one loss an example, (examples,)."""

Method: TypeAlias = Literal["ghost", "vmap", "loop"]

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CHANNELS_FIRST = (nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
MAX_EXPLICIT = 2**26  # numbers of explicit gradients held at once


def per_example_gradient_norms(
    model: nn.Module, loss_fn: LossFunction, inputs: Any, targets: Any, *, method: Method = "ghost"
) -> Float[Tensor, " examples"]:
    """‖∇ of each example's loss‖ over all trained parameters together.

    Args:
        inputs: A tensor, or a tuple or mapping of tensors with which the model is called; examples along the first axis.
        loss_fn: One loss an example, from what the model returns and `targets`.
        method: "ghost" needs one forward and one backward; "vmap" (`torch.func`) and "loop" compute every gradient and
            are there to compare with. Ghost norms know linear, convolution, embedding and normalization layers, also
            with shared weights; parameters that are used in another way fall back to vmap, with a warning that names
            them.

    Raises ValueError for batch normalization in training mode, under which examples have no gradient of their own.

    >>> per_example_gradient_norms(model, partial(F.cross_entropy, reduction="none"), images, labels)
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ValueError(f"{name} is batch normalization in training mode, which mixes examples; call model.eval()")
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
    if method == "vmap":
        return _by_vmap(model, loss_fn, inputs, targets, parameters).sqrt()
    if method == "loop":
        return _by_loop(model, loss_fn, inputs, targets, parameters).sqrt()
    if method != "ghost":
        raise ValueError(f"method is ghost, vmap or loop, not {method!r}")
    squares, left_over = _Ghost(model, loss_fn, inputs, targets, parameters).squares()
    if left_over:
        names = ", ".join(left_over)
        warnings.warn(f"no ghost norms for {names}: these take an additional pass with torch.func.vmap", stacklevel=2)
        squares = squares + _by_vmap(model, loss_fn, inputs, targets, left_over)
    # Rounding can leave a sum of products that should be 0 a little below.
    return squares.clamp_min(0).sqrt()


def called(model: Callable[..., Any], inputs: Any) -> Any:
    """The model on its inputs, however many it has."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


# The naive ways


def _by_vmap(
    model: nn.Module, loss_fn: LossFunction, inputs: Any, targets: Any, parameters: Mapping[str, Tensor]
) -> Float[Tensor, " examples"]:
    # Each place where a parameter stands, once, so that shared weights stay shared; functional_call's own way of doing
    # that leaves a module that is used twice with what was put into it.
    places = {
        f"{path}.{name}".lstrip("."): parameter
        for path, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    names = {id(parameter): name for name, parameter in parameters.items()}

    def loss(chosen: Mapping[str, Tensor], one: Any, target: Any) -> Tensor:
        one, target = (tree_map(lambda leaf: leaf[None], part) for part in (one, target))
        values = {place: chosen.get(names.get(id(at), ""), at.detach()) for place, at in places.items()}
        return loss_fn(
            called(lambda *a, **k: functional_call(model, values, a, k, tie_weights=False), one), target
        ).sum()

    detached = {name: parameter.detach() for name, parameter in parameters.items()}
    num_numbers = sum(parameter.numel() for parameter in detached.values())
    gradients = vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=max(1, MAX_EXPLICIT // max(1, num_numbers)))
    each = gradients(detached, inputs, targets)
    return torch.stack([one.flatten(1).square().sum(1) for one in each.values()]).sum(0)


def _by_loop(
    model: nn.Module, loss_fn: LossFunction, inputs: Any, targets: Any, parameters: Mapping[str, Tensor]
) -> Float[Tensor, " examples"]:
    squares = []
    for index in range(len(tree_leaves(targets)[0])):
        one, target = (tree_map(lambda leaf: leaf[index : index + 1], part) for part in (inputs, targets))  # noqa: B023
        with torch.enable_grad():
            loss = loss_fn(called(model, one), target).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        squares.append(sum((one.square().sum() for one in gradients if one is not None), loss.new_zeros(())))
    return torch.stack(squares)


# Ghost norms


@dataclass
class _Outer:
    """A weight's gradients as Σ_t left_t ⊗ right_t; of an embedding, left are the rows that were looked up."""

    left: Tensor
    right: Tensor

    @property
    def is_lookup(self) -> bool:
        return not self.left.is_floating_point()


@dataclass
class _Explicit:
    """A weight's gradients, (examples, weight)."""

    gradients: Tensor


_Use: TypeAlias = _Outer | _Explicit


class _Ghost:
    """One batch: which layers use which parameter, and what each use adds to the squared norms."""

    def __init__(
        self, model: nn.Module, loss_fn: LossFunction, inputs: Any, targets: Any, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        self.model, self.loss_fn, self.inputs, self.targets, self.parameters = (
            model,
            loss_fn,
            inputs,
            targets,
            parameters,
        )
        self.num_examples = len(tree_leaves(targets)[0])
        self.num_uses: Counter[int] = Counter()
        self.waiting: dict[int, list[_Use]] = {}
        self.unknown: set[int] = set()
        self.sums: list[Tensor] = []
        self.shapes = {id(parameter): parameter.shape for parameter in parameters.values()}

    def squares(self) -> tuple[Float[Tensor, " examples"], dict[str, Tensor]]:
        """Squared norms over the parameters that are known, and the parameters that are not."""
        anchor = torch.zeros((), device=next(iter(self.parameters.values())).device, requires_grad=True)
        with _frozen(self.parameters.values()), torch.enable_grad():
            losses = self._forward(anchor)
            if losses.shape != (self.num_examples,):
                told = f"loss_fn gave shape {tuple(losses.shape)}"
                raise ValueError(f"{told}, not one loss for each of {self.num_examples} examples")
            if losses.requires_grad:
                torch.autograd.grad(losses.sum(), anchor)
        total = torch.stack(self.sums).sum(0) if self.sums else losses.detach().new_zeros(self.num_examples)
        for identity, uses in self.waiting.items():
            total = total + _square_of_sum(uses, self.shapes[identity])
        return total, {name: one for name, one in self.parameters.items() if id(one) in self.unknown}

    def _forward(self, anchor: Tensor) -> Tensor:
        """The losses, with hooks in place that see every known layer's input now and output gradient later."""
        with ExitStack() as stack:
            spy = stack.enter_context(_Spy(self.shapes))
            for module in self.model.modules():
                if _is_known(module):
                    enter = module.register_forward_pre_hook(lambda module, args: spy.enter(module))
                    leave = module.register_forward_hook(self._hook(anchor, spy))
                    stack.callback(enter.remove)
                    stack.callback(leave.remove)
            losses = self.loss_fn(called(self.model, self.inputs), self.targets)
        self.unknown |= spy.seen | (self.shapes.keys() - self.num_uses.keys())
        return losses

    def _hook(self, anchor: Tensor, spy: "_Spy") -> Callable[..., Tensor]:
        def seen(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            spy.leave(module)
            own = [one for one in module._parameters.values() if id(one) in self.shapes]
            if not own:
                return output
            self.num_uses.update(id(one) for one in own)
            if args[0].shape[0] != self.num_examples:
                self.unknown |= {id(one) for one in own}
                return output
            if not output.requires_grad:
                output = output + anchor  # a first layer's output leads to nothing that is trained
            output.register_hook(lambda gradient: self._receive(module, args[0].detach(), gradient))
            return output

        return seen

    @torch.no_grad()
    def _receive(self, module: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
        for name, use in _uses(module, inputs, gradient.detach()):
            identity = id(module._parameters[name])
            if identity not in self.shapes or identity in self.unknown:
                continue
            if self.num_uses[identity] == 1:
                self.sums.append(_square(use, self.shapes[identity]))
            else:
                self.waiting.setdefault(identity, []).append(use)


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
def _frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """No gradients for the weights themselves, which would be a third of the work."""
    parameters = list(parameters)
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _is_known(module: nn.Module) -> bool:
    if module._parameters.get("weight") is None:
        return False  # without one, or reparametrized
    if isinstance(module, nn.Embedding):
        return not (module.scale_grad_by_freq or module.sparse or module.max_norm is not None)
    if isinstance(module, CONVOLUTIONS):
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return isinstance(module, (nn.Linear, *NORMS)) or type(module).__name__ == "Conv1D" or _is_rms_norm(module)


def _is_rms_norm(module: nn.Module) -> bool:
    """Other libraries' RMS norms: one weight, and a name that says so."""
    return type(module).__name__.endswith("RMSNorm") and list(dict(module.named_parameters())) == ["weight"]


def _uses(module: nn.Module, inputs: Tensor, gradient: Tensor) -> Iterator[tuple[str, _Use]]:
    """What one call of a layer adds to the gradients of each of its parameters."""
    if isinstance(module, nn.Embedding):
        rows, right = inputs.reshape(len(inputs), -1), gradient.reshape(len(inputs), -1, gradient.shape[-1])
        if module.padding_idx is not None:
            right = right * (rows != module.padding_idx)[..., None]
        yield "weight", _Outer(rows, right)
        return
    if isinstance(module, (*NORMS,)) or _is_rms_norm(module):
        yield from _norm_uses(module, inputs, gradient)
        return
    if isinstance(module, CONVOLUTIONS):
        yield "weight", _convolution_use(module, inputs, gradient)
        per_position = gradient.flatten(2).transpose(1, 2)
    else:
        per_position = gradient.reshape(len(gradient), -1, gradient.shape[-1])
        incoming = inputs.reshape(len(inputs), -1, inputs.shape[-1])
        is_transposed = type(module).__name__ == "Conv1D"
        yield "weight", _Outer(*((incoming, per_position) if is_transposed else (per_position, incoming)))
    if module._parameters.get("bias") is not None:
        yield "bias", _Explicit(per_position.sum(1))


def _convolution_use(module: nn.Module, inputs: Tensor, gradient: Tensor) -> _Use:
    # One convolution of inputs by output gradients a group, with every example a group of its own, gives all weights'
    # gradients; unfolding is what makes the Gram form possible, and it only knows two dimensions.
    if isinstance(module, nn.Conv2d) and module.groups == 1:
        patches = F.unfold(inputs, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
        return _Outer(gradient.flatten(2).transpose(1, 2), patches.transpose(1, 2))
    assert isinstance(module, CONVOLUTIONS)

    def forward(weight: Tensor, one: Tensor) -> Tensor:
        return functional_call(module, {"weight": weight}, one[None])  # type: ignore[no-any-return]

    def one_gradient(one: Tensor, outgoing: Tensor) -> Tensor:
        _, pullback, *_ = torch.func.vjp(lambda weight: forward(weight, one), module.weight.detach())
        return pullback(outgoing[None])[0]  # type: ignore[no-any-return]

    return _Explicit(vmap(one_gradient)(inputs, gradient))


def _norm_uses(module: nn.Module, inputs: Tensor, gradient: Tensor) -> Iterator[tuple[str, _Use]]:
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    zeros = {name: torch.zeros_like(parameter) for name, parameter in own.items()}
    # The output is affine in the weight, also where a library multiplies by 1 + weight.
    ones = functional_call(module, {**zeros, "weight": torch.ones_like(zeros["weight"])}, inputs)
    scaled = ones - functional_call(module, zeros, inputs)
    num_dims = own["weight"].ndim
    kept = (1,) if isinstance(module, CHANNELS_FIRST) else tuple(range(inputs.ndim - num_dims, inputs.ndim))
    summed = tuple(dim for dim in range(1, inputs.ndim) if dim not in kept)
    for name, product in (("weight", gradient * scaled), ("bias", gradient)):
        if name in own:
            yield name, _Explicit(product.sum(summed) if summed else product)


# Squared norms of sums of outer products


def _square(use: _Use, shape: torch.Size) -> Float[Tensor, " examples"]:
    if isinstance(use, _Explicit):
        return use.gradients.flatten(1).square().sum(1)
    length = use.right.shape[1]
    if length == 1 and not use.is_lookup:
        return use.left.square().sum((1, 2)) * use.right.square().sum((1, 2))
    if use.is_lookup or length**2 <= shape[0] * shape[1:].numel():
        return _inner(use, use)
    return _explicit_square(use)


def _explicit_square(use: _Outer) -> Float[Tensor, " examples"]:
    """By the gradients themselves, some examples at a time; the better way for more positions than weights."""
    size = max(1, MAX_EXPLICIT // (use.left.shape[-1] * use.right.shape[-1]))
    parts = zip(use.left.split(size), use.right.split(size), strict=True)
    return torch.cat([(left.transpose(1, 2) @ right).square().sum((1, 2)) for left, right in parts])


def _inner(one: _Outer, two: _Outer) -> Float[Tensor, " examples"]:
    """⟨Σ_t left_t ⊗ right_t, Σ_s left'_s ⊗ right'_s⟩ = Σ_ts ⟨left_t, left'_s⟩ ⟨right_t, right'_s⟩."""
    if one.is_lookup and two.is_lookup:
        lefts = (one.left[:, :, None] == two.left[:, None]).to(one.right.dtype)
    elif one.is_lookup:
        rows = one.left[:, None].expand(-1, two.left.shape[1], -1)
        lefts = two.left.gather(2, rows).transpose(1, 2)
    elif two.is_lookup:
        return _inner(two, one)
    else:
        lefts = one.left @ two.left.transpose(1, 2)
    return (lefts * (one.right @ two.right.transpose(1, 2))).sum((1, 2))


def _square_of_sum(uses: list[_Use], shape: torch.Size) -> Float[Tensor, " examples"]:
    """A weight that several layers share: its gradient is the sum over them, so their cross terms count."""
    outer = [use for use in uses if isinstance(use, _Outer)]
    if len(outer) < len(uses):
        return torch.stack([_as_explicit(use, shape) for use in uses]).sum(0).flatten(1).square().sum(1)
    total = torch.stack([_square(use, shape) for use in outer]).sum(0)
    for index, one in enumerate(outer):
        for two in outer[index + 1 :]:
            total = total + 2 * _inner(one, two)
    return total


def _as_explicit(use: _Use, shape: torch.Size) -> Tensor:
    if isinstance(use, _Explicit):
        return use.gradients.view(-1, *shape)
    assert not use.is_lookup, "embeddings share their weight with linear layers only"
    return (use.left.transpose(1, 2) @ use.right).view(-1, *shape)
