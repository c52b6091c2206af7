"""Real text that every machine has, as bytes and as words."""

import re
import sysconfig
from collections import Counter
from pathlib import Path

import torch
from jaxtyping import Int64, UInt8
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


def word_ids(text: UInt8[Tensor, " bytes"], vocab: int) -> tuple[Int64[Tensor, " words"], list[str]]:
    """A text's words and punctuation marks in lower case as numbers, most frequent first, and what they stand for.

    Number 0 is every word beyond the `vocab` − 1 most frequent ones. Raises ValueError for a vocabulary below 2.

    >>> word_ids(torch.tensor(list(b"to be or not to be"), dtype=torch.uint8), vocab=3)
    (tensor([1, 2, 0, 0, 1, 2]), ['', 'to', 'be'])
    """
    if vocab < 2:
        raise ValueError(f"vocab={vocab} must be at least 2")
    words = re.findall(r"\w+|[^\w\s]", bytes(text.tolist()).decode("utf-8", errors="replace").lower())
    names = ["", *(word for word, _ in Counter(words).most_common(vocab - 1))]
    number = {word: place for place, word in enumerate(names)}
    return torch.tensor([number.get(word, 0) for word in words]), names
