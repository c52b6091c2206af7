"""Text of every machine."""

from pathlib import Path

import pytest
import torch

from dynascope.data.text import python_sources, read_text


def test_sources_are_python_and_always_the_same() -> None:
    text = python_sources(50_000)
    assert torch.equal(text, python_sources(50_000))
    assert "def " in bytes(text).decode(errors="replace")
    assert torch.equal(text[:1000], python_sources(1000))


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(ValueError, match="bytes of sources"):
        python_sources(10**9)


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes(b"\x00\xffabc")
    assert read_text(file).tolist() == [0, 255, 97, 98, 99]
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        read_text(file)
    with pytest.raises(ValueError, match="cannot be read"):
        read_text(tmp_path / "nothing")
