"""Feeding detectors what a run would have recorded."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pytest
import xarray as xr

from dynascope.findings import Detector
from dynascope.record import Finding, Piece

DIMS = {
    "attention/entropy_normalized": ("layer", "head"),
    "attention/sink_mass": ("layer", "head", "position"),
    "scan/entropy": ("layer", "head"),
    "circuits/omega": ("layer", "head"),
    "circuits/mu": ("layer", "head"),
    "circuits/off_diagonal": ("layer", "head"),
    "attention/value_norm": ("layer", "head", "position"),
    "residual/peak": ("block",),
    "gradients/norm": ("parameter",),
    "updates/ratio": ("parameter",),
    "adam/update_rms": ("parameter",),
    "activations/dead_fraction": ("activation",),
    "learning_rate": ("group",),
    "reasoning/pass_at_k": ("k",),
    "reasoning/cot_pass_at_k": ("k",),
}


def as_series(name: str, values: Sequence[float] | np.ndarray, every: int = 1) -> xr.DataArray:
    array = np.asarray(values, np.float64)
    dims = ("step", *DIMS.get(name, ()))
    coords = {dim: [f"{dim} {n}" for n in range(size)] for dim, size in zip(dims[1:], array.shape[1:], strict=True)}
    return xr.DataArray(array, dims=dims, coords={"step": every * np.arange(len(array)), **coords}, name=name)


def cut(series: Mapping[str, xr.DataArray], cuts: Iterable[int]) -> Iterable[dict[str, Piece]]:
    """Pieces of all series between these steps, as a growing record gives them."""
    edges = [-1, *sorted(cuts), 10**9]
    for first, last in itertools.pairwise(edges):
        pieces = {name: Piece.of(one[(one.step > first) & (one.step <= last)]) for name, one in series.items()}
        yield {name: piece for name, piece in pieces.items() if len(piece)}


Told = Callable[..., list[Finding]]


@pytest.fixture
def told() -> Told:
    """What a fresh detector tells of series by name, fed at once and in pieces, which has to be the same."""

    def feed(
        kind: type[Detector], values: Mapping[str, Sequence[float] | np.ndarray], every: Mapping[str, int] | None = None
    ) -> list[Finding]:
        series = {name: as_series(name, one, (every or {}).get(name, 1)) for name, one in values.items()}
        last = max(int(one.step[-1]) for one in series.values())
        random = np.random.default_rng(0)
        findings = []
        for cuts in ([], list(range(0, last, 7)), sorted(random.integers(0, last + 1, 5).tolist()), list(range(last))):
            detector = kind()
            pieces = [piece for piece in cut(series, cuts) if set(piece) & set(detector.reads)]
            findings.append([finding for piece in pieces for finding in detector.feed(piece)])
        assert all(one == findings[0] for one in findings[1:]), "pieces tell another story than the whole"
        return findings[0]

    return feed
