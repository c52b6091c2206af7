"""What a record holds: series, events and findings, as plain values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["info", "warning", "critical"]


class RecordError(Exception):
    """A record cannot be written or read; the message names the file and says how to mend it."""


@dataclass(frozen=True)
class Series:
    """The declaration of one named quantity over steps.

    `dims` names the axes of one measurement (the step axis comes on top of them); `coords` may label the
    positions along an axis, and an axis without labels is numbered from 0.

    >>> Series("attention/entropy", dims=("layer", "head"), unit="nats", description="Mean over rows.")
    """

    name: str
    dims: tuple[str, ...] = ()
    unit: str = ""
    description: str = ""
    coords: Mapping[str, Sequence[str | int | float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """Something that happened in a run: the start, a probe switched off, an exception, a note of the user's.

    `time` is in seconds since the epoch; `step` is None for what belongs to no step.
    """

    kind: str
    message: str
    step: int | None
    time: float
    rank: int = 0
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """What a detector concluded from a record.

    `id` is the detector's name; `step` is the first step at which the evidence holds; `evidence` are the
    numbers that prove it; `message` is one sentence for a tired reader; `remedy` is a line of code that
    helps if pasted; `source` says where the threshold comes from (an arXiv id, or "convention"); `where`
    names the place (layer 3, head 1; a parameter), if there is one; `series` names the series that it was
    read from.
    """

    id: str
    severity: Severity
    step: int
    message: str
    evidence: Mapping[str, Any]
    remedy: str
    source: str
    series: str = ""
    where: str = ""
