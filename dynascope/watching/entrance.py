"""Standing at a model's entrance: seeing what its outermost call is given and returns.

The call is intercepted on the class (`type(model).__call__`), not by a hook on the instance: copies, pickles and saved
models stay clean, and a compiled module is met outside its compiled code.
"""

import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, eq=False)
class Visitor:
    """Who wants to know: `arrive(entrance, args, kwargs)` before the call, `leave(entrance, output)` after it."""

    arrive: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
    leave: Callable[[nn.Module, Any], None]


_depth = threading.local()
_visitors: dict[int, tuple["weakref.ref[nn.Module]", Visitor]] = {}
_patched: dict[type[nn.Module], Any] = {}


def stand_at(entrances: Iterable[nn.Module], visitor: Visitor) -> None:
    """Tell `visitor` of every outermost call of one of `entrances`."""
    for module in entrances:
        _visitors[id(module)] = weakref.ref(module), visitor
        _patch(type(module))


def step_away(visitor: Visitor) -> None:
    """Tell `visitor` nothing more; once nobody stands anywhere, every class is as it was."""
    for key in [key for key, (module, who) in _visitors.items() if who is visitor or module() is None]:
        del _visitors[key]
    if not _visitors:
        for cls in list(_patched):
            _restore(cls)


def _patch(cls: type[nn.Module]) -> None:
    if getattr(cls.__call__, "is_entrance", False):
        return
    original = cls.__call__

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        # The compiler evaluates this while it traces, and keeps only the plain call.
        if torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        module, visitor = _visitors.get(id(self), (None, None))
        if visitor is None or module is None or module() is not self or getattr(_depth, "inside", False):
            return original(self, *args, **kwargs)
        _depth.inside = True
        try:
            visitor.arrive(self, args, kwargs)
            output = original(self, *args, **kwargs)
            visitor.leave(self, output)
            return output
        finally:
            _depth.inside = False

    __call__.is_entrance = True  # type: ignore[attr-defined]
    _patched[cls] = cls.__dict__.get("__call__")
    cls.__call__ = __call__  # type: ignore[method-assign]


def _restore(cls: type[nn.Module]) -> None:
    own = _patched.pop(cls)
    if own is None:
        del cls.__call__
    else:
        cls.__call__ = own  # type: ignore[method-assign]
