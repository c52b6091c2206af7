"""The empirical tangent kernel of any model, ⟨∂f_a(x)/∂θ, ∂f_b(x')/∂θ⟩ (1806.07572), without its Jacobian where that helps.

Of a linear layer's weight the kernel is (h·h')(g_a·g'_b), from the layer's inputs h and the outputs' gradients g at its
pre-activations: two small Gram matrices instead of (examples × outputs) × parameters numbers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves, tree_map

from dynascope.kernels.layerwise import Explicit, LayerTap, Outer, Use, called, frozen, functional, refuse_mixing, uses

Output: TypeAlias = Literal["full", "trace", "diag"]
Method: TypeAlias = Literal["auto", "jacobian", "vp"]
Readout: TypeAlias = Callable[[Any], Tensor]

_ALL = "all"
MAX_NUMBERS = 2**27
"""Numbers that the factors of one side, or one block of the kernel, may have."""


def ntk(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    params: Mapping[str, nn.Parameter] | None = None,
    output: Output = "full",
    method: Method = "auto",
    readout: Readout | None = None,
    chunk: int | None = None,
    dtype: torch.dtype | None = None,
    per_layer: bool = False,
) -> Any:
    """The tangent kernel between two sets of examples: Float[Tensor, "n m outputs outputs"] for `output="full"`.

    Args:
        x1: A tensor, or a tuple or mapping of tensors with which the model is called; examples along the first axis.
        x2: The other examples; None means `x1`, and gives an exactly symmetric kernel for little over half of the work.
        params: Parameters by name (default: all that are trained).
        output: "full" (n, m, outputs, outputs); "diag" (n, m, outputs), each output with itself; "trace" (n, m), the
            mean of "diag" over outputs.
        method: "auto" goes layer by layer through linear, convolution, embedding and normalization layers, also with
            shared weights, and takes the Jacobian of parameters that are used in another way; "jacobian" takes it of
            all; "vp" makes one kernel-vector product a column, for many outputs and cheap forward passes.
        readout: From what the model returns to (examples, outputs) or (examples,); for a language model, the loss or
            the label's logit of each sequence, say.
        chunk: Examples of each side at once; by default as many as keep what is held below 2²⁷ numbers.
        dtype: The type that inner products are summed in (default: the parameters', at least float32).
        per_layer: Return a dict with one kernel a parameter; they sum to the whole.

    Raises ValueError for batch normalization or dropout in training mode, under which examples have no gradient of
    their own, and for outputs that are not (examples, outputs).

    >>> ntk(nn.Linear(3, 2, bias=False), torch.eye(3), output="trace")
    tensor([[1., 0., 0.], ...
    """
    refuse_mixing(model)
    _refuse_dropout(model)
    if output not in ("full", "trace", "diag"):
        raise ValueError(f"output is full, trace or diag, not {output!r}")
    if method not in ("auto", "jacobian", "vp"):
        raise ValueError(f"method is auto, jacobian or vp, not {method!r}")
    chosen = dict(_trained(model) if params is None else params)
    if not chosen:
        raise ValueError("the model has no trained parameters, so it has no tangent kernel")
    if method == "vp" and per_layer:
        raise ValueError("kernel-vector products give the whole kernel; per_layer wants method auto or jacobian")
    kernel = _Kernel(model, chosen, readout or (lambda outputs: outputs), output, method, dtype, per_layer=per_layer)
    kernels = kernel.between(x1, x2, chunk)
    return kernels if per_layer else kernels[_ALL]


def examples_at_once(model: nn.Module, x: Any, *, readout: Readout | None = None) -> int:
    """How many of these examples `ntk` takes at once by default: its `chunk` where it is called again and again.

    Finding it costs a pass over one example, which for few examples is half of the work. Raises as `ntk`.

    >>> examples_at_once(nn.Linear(3, 2), torch.eye(3))
    3
    """
    refuse_mixing(model)
    _refuse_dropout(model)
    kernel = _Kernel(model, dict(_trained(model)), readout or (lambda outputs: outputs), "trace", "auto", None)
    return kernel._chunk(x, _count(x))


def ntk_vp(
    model: nn.Module,
    x1: Any,
    v: Float[Tensor, "m ..."],
    x2: Any = None,
    *,
    params: Mapping[str, nn.Parameter] | None = None,
    readout: Readout | None = None,
) -> Float[Tensor, "n ..."]:
    """The kernel's product with a vector, Θ(x1, x2) v, without the kernel: one backward and one forward-mode pass.

    `v` has the shape of the model's outputs on `x2`. For Lanczos, conjugate gradients and power iteration.

    >>> ntk_vp(model, images, torch.randn(len(images), 10))
    """
    refuse_mixing(model)
    _refuse_dropout(model)
    chosen = {name: one.detach() for name, one in (params or _trained(model)).items()}
    read, function = readout or (lambda outputs: outputs), functional(model, params or _trained(model))

    def outputs_on(inputs: Any) -> Callable[[Mapping[str, Tensor]], Tensor]:
        return lambda values: read(function(values, inputs))

    _, pullback, *_ = vjp(outputs_on(x1 if x2 is None else x2), chosen)
    (direction,) = pullback(v)
    product: Tensor = jvp(outputs_on(x1), (chosen,), (direction,))[1]
    return product


def ntk_trace(
    model: nn.Module, x: Any, *, params: Mapping[str, nn.Parameter] | None = None, readout: Readout | None = None
) -> Float[Tensor, " n"]:
    """Θ(x, x) of each example with itself, summed over outputs: the squared norm of its Jacobian.

    Sum it for the trace of the whole kernel, which is never formed.

    >>> ntk_trace(model, images).sum()
    """
    refuse_mixing(model)
    _refuse_dropout(model)
    chosen = dict(_trained(model) if params is None else params)
    kernel = _Kernel(model, chosen, readout or (lambda outputs: outputs), "trace", "auto", None)
    return kernel.own(x)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _refuse_dropout(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(f"{name} is dropout in training mode, which makes the kernel random; call model.eval()")


_Side: TypeAlias = dict[str, Use]
"""By parameter: gradients (examples, outputs, positions, width), or formed ones (examples, outputs, numbers)."""


class _Kernel:
    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        readout: Readout,
        output: Output,
        method: Method,
        dtype: torch.dtype | None,
        *,
        per_layer: bool = False,
    ) -> None:
        self.model, self.parameters, self.readout, self.output, self.method = (
            model,
            parameters,
            readout,
            output,
            method,
        )
        self.per_layer = per_layer
        own = next(iter(parameters.values())).dtype
        self.dtype = dtype or (own if own == torch.float64 else torch.float32)

    # Blocks

    def between(self, x1: Any, x2: Any, chunk: int | None) -> dict[str, Tensor]:
        """The kernel of each parameter by its name, or of all together."""
        if self.method == "vp":
            return {_ALL: self._by_products(x1, x1 if x2 is None else x2)}
        is_symmetric = x2 is None
        rows = _count(x1)
        columns = rows if is_symmetric else _count(x2)
        size = chunk or self._chunk(x1, max(rows, columns))
        sides = _Kept(lambda at: self._side(_part(x1, at, size)), MAX_NUMBERS)
        others = sides if is_symmetric else _Kept(lambda at: self._side(_part(x2, at, size)), MAX_NUMBERS)
        kernels: dict[str, Tensor] = {}
        for one in range(0, rows, size):
            for two in range(one if is_symmetric else 0, columns, size):
                side, other = sides[one], others[two]
                for key, names in {name: [name] for name in side}.items() if self.per_layer else [(_ALL, list(side))]:
                    block = self._block(side, other, names)
                    if key not in kernels:
                        kernels[key] = block.new_empty(rows, columns, *block.shape[2:])
                    kernels[key][one : one + size, two : two + size] = block
                    if is_symmetric:
                        mirrored = block.transpose(0, 1)
                        mirrored = mirrored.transpose(2, 3) if self.output == "full" else mirrored
                        both = (block + mirrored) / 2 if one == two else mirrored
                        kernels[key][two : two + size, one : one + size] = both
        return kernels

    def own(self, x: Any) -> Float[Tensor, " n"]:
        """Each example with itself, summed over outputs."""
        size = self._chunk(x, _count(x))
        sides = (self._side(_part(x, at, size)) for at in range(0, _count(x), size))
        return torch.cat([torch.stack([_own_square(of_one) for of_one in side.values()]).sum(0) for side in sides])

    def _chunk(self, x: Any, count: int) -> int:
        """As many of `count` examples as keep a side and a block within bounds, found from what a single one needs."""
        one = self._side(_part(x, 0, 1))
        numbers = sum(_numbers(use) for use in one.values())
        by_block = math.isqrt(MAX_NUMBERS // self._num_outputs**2)
        # Pieces spare half of a kernel that is symmetric, and cost a pass each.
        pieces = 1 if count < 64 else 2 if count < 256 else 4
        return max(1, min(-(-count // pieces), MAX_NUMBERS // max(1, numbers), by_block))

    # One side

    def _side(self, inputs: Any) -> _Side:
        unknown = set(self.parameters) if self.method == "jacobian" else set[str]()
        side: _Side = {}
        if self.method == "auto":
            side, unknown = self._layer_by_layer(inputs)
        if unknown:
            side |= self._jacobian(inputs, {name: self.parameters[name] for name in unknown})
        return side

    def _layer_by_layer(self, inputs: Any) -> tuple[_Side, set[str]]:
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        received: list[tuple[nn.Module, Tensor, Tensor]] = []
        tap = LayerTap(
            self.model,
            self.parameters.values(),
            _count(inputs),
            lambda module, incoming, gradient: received.append((module, incoming, gradient)),
        )
        per_output: list[dict[str, list[Use]]] = []
        # Trained ones that were not chosen too: the tap's anchor has to be the only leaf that gradients flow to.
        trained = [one for one in self.model.parameters() if one.requires_grad]
        with frozen([*self.parameters.values(), *trained]), torch.enable_grad():
            outputs = self._as_matrix(tap.forward(lambda: self.readout(called(self.model, inputs))), _count(inputs))
            for column in range(outputs.shape[1]):
                tap.backward(outputs[:, column].sum(), retain_graph=column + 1 < outputs.shape[1])
                with torch.no_grad():
                    of_output: dict[str, list[Use]] = {}
                    for module, incoming, gradient in received:
                        for name, use in uses(module, incoming, gradient):
                            if tap.knows(module._parameters[name]):
                                of_output.setdefault(names[id(module._parameters[name])], []).append(use)
                received.clear()
                per_output.append(of_output)
        self._num_outputs = outputs.shape[1]
        known = {names[one] for one in tap.shapes if one not in tap.unknown}
        # An output that does not depend on a layer never reaches its hooks; then positions in the lists do not match.
        counts = [{name: len(of_output.get(name, ())) for name in known} for of_output in per_output]
        complete = {name for name in known if len({count[name] for count in counts}) == 1 and counts[0][name]}
        side = {
            name: _formed_where_smaller(
                [_stacked(use) for use in zip(*(of_output[name] for of_output in per_output), strict=True)],
                self.parameters[name].shape,
            )
            for name in complete
        }
        if not self.per_layer:
            self._fold_biases(side, {names[one] for one, count in tap.num_uses.items() if count == 1})
        return side, set(self.parameters) - complete

    def _fold_biases(self, side: _Side, used_once: set[str]) -> None:
        """A bias is a weight whose input is 1: where a layer has one position, it costs a column instead of a product."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        for module in self.model.modules():
            weight, bias = (names.get(id(module._parameters.get(one)), "") for one in ("weight", "bias"))
            use = side.get(weight)
            if (
                {weight, bias} <= used_once & side.keys()
                and use is not None
                and _is_dense(use)
                and not use.is_input_first
            ) and use.inputs.shape[1] == 1:
                ones = use.inputs.new_full((len(use.inputs), 1, 1), float(getattr(module, "bias_scale", 1.0)))
                side[weight] = Outer(torch.cat([use.inputs, ones], dim=2), use.gradients)
                del side[bias]

    def _jacobian(self, inputs: Any, parameters: Mapping[str, nn.Parameter]) -> _Side:
        function = functional(self.model, parameters)

        def outputs(values: Mapping[str, Tensor], one: Any) -> Tensor:
            return self._as_matrix(self.readout(function(values, tree_map(lambda leaf: leaf[None], one))), 1)[0]

        detached = {name: parameter.detach() for name, parameter in parameters.items()}
        each = vmap(jacrev(outputs), in_dims=(None, 0))(detached, inputs)
        self._num_outputs = next(iter(each.values())).shape[1]
        return {name: Explicit(one.flatten(2)) for name, one in each.items()}

    def _by_products(self, x1: Any, x2: Any) -> Tensor:
        with torch.no_grad():
            like = self.readout(called(self.model, x2))
        shape = self._as_matrix(like, _count(x2)).shape

        def column(flat: Tensor) -> Tensor:
            product = ntk_vp(self.model, x1, flat.view(like.shape), x2, params=self.parameters, readout=self.readout)
            return self._as_matrix(product, _count(x1))

        basis = torch.eye(shape.numel(), dtype=like.dtype, device=like.device)
        columns = vmap(column, chunk_size=max(1, MAX_NUMBERS // max(1, 64 * shape.numel())))(basis)
        kernel = columns.view(*shape, _count(x1), shape[1]).permute(2, 0, 3, 1)
        if self.output == "full":
            return kernel
        diagonal = kernel.diagonal(dim1=2, dim2=3)
        return diagonal if self.output == "diag" else diagonal.mean(-1)

    def _as_matrix(self, outputs: Any, count: int) -> Tensor:
        if not isinstance(outputs, Tensor) or outputs.ndim not in (1, 2) or len(outputs) != count:
            told = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(
                f"the kernel wants outputs (examples, outputs) or (examples,), not {told}; "
                "give a readout, as in readout=lambda out: out.logits[:, -1]"
            )
        return outputs if outputs.ndim == 2 else outputs[:, None]

    # One block of one parameter

    def _block(self, side: _Side, other: _Side, names: Sequence[str]) -> Tensor:
        pairs = [(side[name], other[name]) for name in names]
        formed = [
            _as_numbers(side[name], other[name], self.parameters[name].shape)
            for name in names
            if not (_is_dense(side[name]) and _is_dense(other[name]))
        ]
        block: Tensor | None = None
        if formed:
            left = torch.cat([one for one, _ in formed], dim=2).to(self.dtype)
            right = left if side is other else torch.cat([two for _, two in formed], dim=2).to(self.dtype)
            block = self._contract(left, right)
        for one, two in pairs:
            if _is_dense(one) and _is_dense(two):
                product = self._product(one, two)
                block = product if block is None else block.add_(product)
        assert block is not None
        return block

    def _product(self, one: Outer, two: Outer) -> Tensor:
        """The block of one layer, from Gram matrices."""
        inputs, other_inputs = one.inputs.to(self.dtype), two.inputs.to(self.dtype)
        gradients, other_gradients = one.gradients.to(self.dtype), two.gradients.to(self.dtype)
        if inputs.shape[1] == 1:
            gram = inputs[:, 0] @ other_inputs[:, 0].T
            block = self._contract(gradients[:, :, 0], other_gradients[:, :, 0])
            return block.mul_(gram.view(*gram.shape, *(1,) * (block.ndim - 2)))
        gram = torch.einsum("isk,jtk->ijst", inputs, other_inputs)
        pulled = {"full": "ijst,iasw,jbtw->ijab", "diag": "ijst,iasw,jatw->ija", "trace": "ijst,iasw,jatw->ij"}
        block = torch.einsum(pulled[self.output], gram, gradients, other_gradients)
        return block / gradients.shape[1] if self.output == "trace" else block

    def _contract(self, one: Float[Tensor, "n outputs numbers"], other: Float[Tensor, "m outputs numbers"]) -> Tensor:
        """Inner products of gradients, of the pairs of outputs that are asked for."""
        rows, columns, num_outputs = len(one), len(other), one.shape[1]
        if self.output == "full":
            product = one.flatten(0, 1) @ other.flatten(0, 1).T
            return product.view(rows, num_outputs, columns, num_outputs).transpose(1, 2).contiguous()
        if self.output == "trace":
            return one.flatten(1) @ other.flatten(1).T / num_outputs
        return (one.transpose(0, 1) @ other.permute(1, 2, 0)).permute(1, 2, 0).contiguous()


class _Kept:
    """Sides by their first example: computed when asked for, and kept while they fit."""

    def __init__(self, make: Callable[[int], _Side], limit: int) -> None:
        self._make, self._room = make, limit
        self._kept: dict[int, _Side] = {}

    def __getitem__(self, at: int) -> _Side:
        if at in self._kept:
            return self._kept[at]
        side = self._make(at)
        size = sum(_numbers(use) for use in side.values())
        if size <= self._room:
            self._room -= size
            self._kept[at] = side
        return side


def _count(inputs: Any) -> int:
    return len(tree_leaves(dict(inputs) if isinstance(inputs, Mapping) else inputs)[0])


def _part(inputs: Any, at: int, size: int) -> Any:
    inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
    return tree_map(lambda leaf: leaf[at : at + size], inputs)


def _numbers(use: Use) -> int:
    return use.gradients.numel() + (use.inputs.numel() if isinstance(use, Outer) else 0)


def _stacked(over_outputs: tuple[Use, ...]) -> Use:
    """One use of a parameter seen from every output: gradients with an axis of outputs after the examples."""
    gradients = torch.stack([use.gradients for use in over_outputs], dim=1)
    first = over_outputs[0]
    if isinstance(first, Outer):
        return Outer(first.inputs, gradients, first.is_input_first)
    return Explicit(gradients.flatten(2))


def _is_dense(use: Use) -> TypeGuard[Outer]:
    return isinstance(use, Outer) and not use.is_lookup


def _formed_where_smaller(of_one: Sequence[Use], shape: torch.Size) -> Use:
    """A parameter's uses as one: factors as they are, or the gradients formed where that is less.

    They are formed where layers share a weight, so that their sum comes before the products, and where positions
    outnumber what the factors save. A single lookup waits until the other side's rows are known.
    """
    use = of_one[0]
    if len(of_one) == 1 and isinstance(use, Outer):
        length, width = use.inputs.shape[1], use.inputs.shape[-1]
        if use.is_lookup or length == 1 or length**2 * (use.gradients.shape[-1] + width) <= shape.numel():
            return use
    formed = [_formed(one, shape) for one in of_one]
    return Explicit(formed[0] if len(formed) == 1 else torch.stack(formed).sum(0))


def _formed(use: Use, shape: torch.Size) -> Float[Tensor, "examples outputs numbers"]:
    if isinstance(use, Explicit):
        return use.gradients
    if use.is_lookup:
        num_outputs = use.gradients.shape[1]
        rows = use.inputs.repeat_interleave(num_outputs, dim=0)
        flat = Outer(rows, use.gradients.flatten(0, 1), is_input_first=True).explicit(shape)
        return flat.view(len(use.inputs), num_outputs, -1)
    product = "isk,iasw->iakw" if use.is_input_first else "iasw,isk->iawk"
    factors = (use.inputs, use.gradients) if use.is_input_first else (use.gradients, use.inputs)
    return torch.einsum(product, *factors).flatten(2)


def _as_numbers(one: Use, two: Use, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Both sides' gradients as numbers; of a lookup only the rows that were looked up in either."""
    if isinstance(one, Outer) and isinstance(two, Outer) and one.is_lookup:
        rows, places = torch.unique(torch.cat([one.inputs.flatten(), two.inputs.flatten()]), return_inverse=True)
        shape = torch.Size([len(rows), one.gradients.shape[-1]])
        here, there = places.split([one.inputs.numel(), two.inputs.numel()])
        one, two = (
            Outer(place.view_as(use.inputs), use.gradients, is_input_first=True)
            for place, use in ((here, one), (there, two))
        )
    return _formed(one, shape), _formed(two, shape)


def _own_square(use: Use) -> Float[Tensor, " examples"]:
    """Squared norm of each example's gradients, summed over outputs."""
    if isinstance(use, Explicit):
        return use.gradients.square().sum((1, 2))
    gram = use.inputs @ use.inputs.mT if not use.is_lookup else use.inputs[:, :, None] == use.inputs[:, None]
    return torch.einsum("ist,iasw,iatw->i", gram.to(use.gradients.dtype), use.gradients, use.gradients)
