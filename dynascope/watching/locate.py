"""Finding the model that an optimizer trains, and its outermost caller, among the living objects."""

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


@dataclass(frozen=True)
class Located:
    """A model and the ways into it.

    `model` is the plain module, free of compile and data-parallel wrappers. `entrances` are the modules whose call may
    be the outermost one that runs it: the model itself, its wrappers, modules that contain it, and what holds most of
    it (a Lightning module is never called itself, but the network inside is). What lies inside a compiled module is no
    entrance, so that nothing is changed where the compiler looks.
    """

    model: nn.Module
    entrances: tuple[nn.Module, ...]


def locate(parameters: Iterable[Tensor], hint: nn.Module | None = None) -> Located | None:
    """The module that owns most of `parameters` (by element count), or None when no module owns any.

    `hint` is the model that the user named; it is then taken, and only its wrappers are looked for.

    >>> locate(optimizer.param_groups[0]["params"]).model
    """
    wanted = {id(parameter): parameter.numel() for parameter in parameters}
    # By exact type: of some hundred thousand living objects, asking each what it descends from takes most of the time.
    types = _subclasses(nn.Module)
    modules = [thing for thing in gc.get_objects() if type(thing) in types]
    parents: dict[int, list[nn.Module]] = {}
    for module in modules:
        for child in module.__dict__.get("_modules", {}).values():
            if child is not None:
                parents.setdefault(id(child), []).append(module)

    def owned(module: nn.Module) -> int:
        return sum(wanted.get(id(parameter), 0) for parameter in module.parameters())

    if hint is None:
        roots = [module for module in modules if id(module) not in parents and "_parameters" in module.__dict__]
        top = max(roots, key=owned, default=None)
        if top is None or owned(top) == 0:
            return None
        model = _innermost_owner(top, owned, share=1.0)[-1]
        model = _plain([model, *_ancestors(model, parents)], model)
    else:
        model = hint
        while (inside := wrapped(model)) is not None:
            model = inside
    chain = [*_innermost_owner(model, owned, share=0.5), *_ancestors(model, parents)]
    compiled = [module for module in chain if _is_compiled(module)]
    if compiled:
        hidden = {id(inner) for module in compiled for inner in module.modules()} - {id(m) for m in compiled}
        chain = [module for module in chain if id(module) not in hidden]
    return Located(model, tuple(chain))


def wrapped(module: nn.Module) -> nn.Module | None:
    """What a compile or data-parallel wrapper holds, or None for any other module."""
    if _is_compiled(module):
        inner = module._modules["_orig_mod"]
    elif isinstance(module, (DistributedDataParallel, DataParallel)):
        inner = module.module
    else:
        return None
    return inner


def _subclasses(base: type) -> set[type]:
    found, waiting = {base}, [base]
    while waiting:
        new: set[type] = set(type.__subclasses__(waiting.pop())) - found
        found |= new
        waiting += new
    return found


def _innermost_owner(model: nn.Module, owned: Callable[[nn.Module], int], share: float) -> list[nn.Module]:
    """From `model` inwards: each module that still owns at least `share` of what `model` owns."""
    chain, least = [model], share * owned(model)
    while (inner := next((child for child in chain[-1].children() if owned(child) >= max(least, 1)), None)) is not None:
        chain.append(inner)
    return chain


def _plain(chain: Sequence[nn.Module], innermost: nn.Module) -> nn.Module:
    """The outermost of the modules that is no wrapper and is not hidden behind a trainer's own module.

    A model that only hands its call to one child (a language model around its trunk, say) is the more useful view, as
    long as no wrapper stands between the two.
    """
    model = innermost
    for module in chain[1:]:
        if wrapped(module) is not None:
            break
        model = module
    return model


def _ancestors(module: nn.Module, parents: dict[int, list[nn.Module]]) -> list[nn.Module]:
    found: list[nn.Module] = []
    waiting = [module]
    while waiting:
        for parent in parents.get(id(waiting.pop(0)), []):
            if all(parent is not other for other in found):
                found.append(parent)
                waiting.append(parent)
    return found


def _is_compiled(module: nn.Module) -> bool:
    # By name: importing the compiler to ask would cost every run over a second.
    return type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules
