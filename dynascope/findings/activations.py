"""Findings on activations."""

from collections.abc import Iterable, Mapping

from dynascope.findings.history import Streak
from dynascope.record import Finding, Piece


class DeadUnits:
    """Half of a layer's units, or more, answer to nothing any more."""

    reads = ("activations/dead_fraction",)
    share, looks = 0.5, 3

    def __init__(self) -> None:
        self._streaks: dict[str, Streak] = {}

    def feed(self, new: Mapping[str, Piece]) -> Iterable[Finding]:
        """One finding a layer."""
        series = new["activations/dead_fraction"]
        for name, column in zip(series.coords["activation"], series.values.T, strict=True):
            streak = self._streaks.setdefault(str(name), Streak(self.looks))
            for step, share in zip(series.steps, column, strict=True):
                since = streak.fires(bool(share >= self.share), int(step))
                if since is not None:
                    yield Finding(
                        id="dead-units",
                        severity="warning",
                        step=since,
                        message=f"{share:.0%} of the units behind {name} are zero for every input: they learn nothing.",
                        evidence={"dead_share": float(share), "looks": self.looks},
                        remedy="nn.init.kaiming_normal_(layer.weight, nonlinearity='relu')  # with a lower lr, or nn.GELU()",
                        source="convention: half of the units at 3 looks in a row",
                        series="activations/dead_fraction",
                        where=str(name),
                    )
