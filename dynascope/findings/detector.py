"""What a detector is, and how a record is fed to all of them, each piece once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from dynascope.record import Finding, Piece, Record


@runtime_checkable
class Detector(Protocol):
    """Reads some series as they grow and says what it concludes.

    `reads` names the series, without the prefix of a second optimizer. `feed` is given what is new in each of them
    (a series that has nothing new is missing); every measurement is given exactly once, in the order of steps. A
    detector keeps what it needs of the past, in bounded memory, and reports one finding for one condition, not one a
    step.
    """

    @property
    def reads(self) -> tuple[str, ...]:
        """The names of the series that it is fed."""

    def feed(self, new: Mapping[str, Piece]) -> Iterable[Finding]:
        """What follows from the new measurements."""


class Follower:
    """Feeds a record, finished or growing, to detectors.

    `detectors` makes one fresh set of them; each optimizer of the run gets its own.

    >>> follower = Follower(dynascope.open("runs/mine"), all_detectors)
    >>> follower.new_findings()
    """

    def __init__(self, record: Record, detectors: Callable[[], Sequence[Detector]]) -> None:
        self._record = record
        self._make = detectors
        self._detectors: dict[str, Sequence[Detector]] = {}
        self._seen: dict[str, int] = {}

    def new_findings(self) -> list[Finding]:
        """Findings from everything recorded since the last call, in the order of their steps."""
        new: dict[str, Piece] = {}
        for name in self._record.names():
            piece = self._record.piece(name, since=self._seen.get(name, -1) + 1)
            if len(piece):
                self._seen[name] = int(piece.steps[-1])
                new[name] = piece
        findings: list[Finding] = []
        for prefix in sorted({_prefix(name) for name in new}):
            detectors = self._detectors.setdefault(prefix, self._make())
            for detector in detectors:
                read = {name: new[prefix + name] for name in detector.reads if prefix + name in new}
                if read:
                    findings += detector.feed(read)
        return sorted(findings, key=lambda finding: finding.step)


def _prefix(name: str) -> str:
    head, slash, _ = name.partition("/")
    return head + slash if head.startswith("optimizer") and head.removeprefix("optimizer").isdigit() else ""
