"""Real text that every machine has, as bytes."""

import sysconfig
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor


def python_sources(num_bytes: int = 1_000_000) -> UInt8[Tensor, " bytes"]:
    """The Python standard library's own sources, in the order of their names, cut to `num_bytes`.

    Raises ValueError when the library has fewer.

    >>> len(python_sources(2000))
    2000
    """
    text = bytearray()
    for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += source.read_bytes()
        if len(text) >= num_bytes:
            return torch.frombuffer(text[:num_bytes], dtype=torch.uint8)
    raise ValueError(f"this machine's standard library has {len(text):,} bytes of sources; ask for no more")


def read_text(path: str | Path) -> UInt8[Tensor, " bytes"]:
    """A file's bytes. Raises ValueError when it does not exist or is empty.

    >>> read_text("shakespeare.txt")[:5]
    """
    try:
        text = bytearray(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if not text:
        raise ValueError(f"{path} is empty")
    return torch.frombuffer(text, dtype=torch.uint8)
