"""Dynascope: see, explain and steer how a neural network trains.

>>> import dynascope
>>> with dynascope.watch(model, optimizer, run="runs/mine") as w:  # doctest: +SKIP
...     train(model, optimizer)
>>> dynascope.open("runs/mine")["attention/entropy"]  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynascope.record import Finding, Record, RecordWriter, Series
    from dynascope.record import open_record as open
    from dynascope.watching import watch

__version__ = "0.1.0"
__all__ = ["Finding", "Record", "RecordWriter", "Series", "__version__", "open", "watch"]

# Loaded on first use: `import dynascope` must cost next to nothing in a training script.
_HOMES = {
    "open": ("dynascope.record", "open_record"),
    "Record": ("dynascope.record", "Record"),
    "RecordWriter": ("dynascope.record", "RecordWriter"),
    "Series": ("dynascope.record", "Series"),
    "Finding": ("dynascope.record", "Finding"),
    "watch": ("dynascope.watching", "watch"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dynascope' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
