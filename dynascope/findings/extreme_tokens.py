"""Findings on extreme tokens: attention sinks, the values that they drain, the residual peaks on top, and their order."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from dynascope.findings.history import Streak, log_slope
from dynascope.record import Finding, Piece, Record


class ExtremeTokens:
    """Many heads park on one early position, its value drains, and its residual state peaks (2410.13835).

    One finding a run for each of the three, where they come; the two that follow a sink tell how long after it.
    """

    reads = ("attention/sink_mass", "attention/value_norm", "residual/peak")
    # A head is a sink head above 0.3 of the mass (2410.10781); half of it and a quarter of the heads make it news (ours).
    mass, share, looks = 0.5, 0.25, 3
    # Trained toys drain to under a third, and their states peak at twice the others (2410.13835); in language models at
    # hundreds. Heads also differ at random, hence a half; depth also spreads norms, hence growth from the early level.
    drain, peak, growth, early_looks = 0.5, 3.0, 1.5, 3

    def __init__(self) -> None:
        self._streaks = {name: Streak(self.looks) for name in ("sink", "drain", "peak")}
        self._sinks: dict[int, np.ndarray] = {}
        self._drains: dict[int, np.ndarray] = {}
        self._early: list[np.ndarray] = []
        self._sink_since: int | None = None

    def feed(self, new: Mapping[str, Piece]) -> Iterable[Finding]:
        """At most three findings a run."""
        if "attention/sink_mass" in new:
            yield from self._see_sinks(new["attention/sink_mass"])
        if "attention/value_norm" in new:
            one = new["attention/value_norm"]
            self._drains |= {int(step): now for step, now in zip(one.steps, one.values, strict=True)}
        # The two series are looked at together, but their pieces may arrive apart.
        for step in sorted(set(self._sinks) & set(self._drains)):
            yield from self._see_drain(step, self._sinks.pop(step), self._drains.pop(step))
        for kept in (self._sinks, self._drains):
            for step in sorted(kept)[: -2 * self.looks]:
                del kept[step]
        if "residual/peak" in new:
            yield from self._see_peak(new["residual/peak"])

    def _see_sinks(self, sinks: Piece) -> Iterable[Finding]:
        for step, now in zip(sinks.steps, sinks.values, strict=True):
            self._sinks[int(step)] = now
            strongest = np.nanmax(np.where(np.isnan(now), 0.0, now), axis=-1)
            share = float((strongest > self.mass).mean())
            since = self._streaks["sink"].fires(share >= self.share, int(step))
            if since is None:
                continue
            self._sink_since = since
            layer, head = map(int, np.unravel_index(int(strongest.argmax()), strongest.shape))
            place = int(np.nanargmax(now[layer, head]))
            where = f"head {head} of {sinks.coords['layer'][layer]}"
            yield Finding(
                id="attention-sink",
                severity="info",
                step=since,
                message=(
                    f"{share:.0%} of the heads put most of their attention on one early position; {where} gives "
                    f"{strongest[layer, head]:.0%} to position {place}. Keep it in a KV cache, and expect outliers "
                    "when quantizing."
                ),
                evidence={"share_of_heads": share, "strongest": float(strongest[layer, head]), "position": place},
                remedy="tokens = torch.cat([bos.expand(len(tokens), 1), tokens], 1)  # give the sink a token of its own",
                source="2309.17453; threshold after 2410.10781",
                series="attention/sink_mass",
                where=where,
            )

    def _see_drain(self, step: int, mass: np.ndarray, norms: np.ndarray) -> Iterable[Finding]:
        filled = np.where(np.isnan(mass), 0.0, mass)
        is_sink_head = filled.max(-1) > self.mass
        at_sink = np.take_along_axis(norms, filled.argmax(-1)[..., None], -1)[..., 0]
        drained = float(np.median(at_sink[is_sink_head])) if is_sink_head.any() else np.nan
        since = self._streaks["drain"].fires(bool(drained < self.drain), step)
        if since is not None:
            yield Finding(
                id="value-drain",
                severity="info",
                step=since,
                message=(
                    f"The heads that park on an early position have emptied it: its value has {drained:.0%} of the mean "
                    f"norm{self._after(since)}. They do nothing there, and can be pruned where they never act."
                ),
                evidence={"value_norm": drained, "sink_since": self._sink_since},
                remedy=(
                    "from dynascope.nn import register_with_transformers; register_with_transformers()  # "
                    'attn_implementation="relu": heads that can attend to nothing need no sink'
                ),
                source="2410.13835, section 3",
                series="attention/value_norm",
            )

    def _see_peak(self, peaks: Piece) -> Iterable[Finding]:
        for step, now in zip(peaks.steps, peaks.values, strict=True):
            if len(self._early) < self.early_looks:
                self._early.append(now)
                continue
            grown = now / np.mean(self._early, axis=0)
            is_peak = (now > self.peak) & (grown > self.growth)
            since = self._streaks["peak"].fires(bool(is_peak.any()), int(step))
            if since is not None:
                block = int(np.nanargmax(np.where(is_peak, now, -np.inf)))
                name = str(peaks.coords["block"][block])
                yield Finding(
                    id="residual-peak",
                    severity="warning",
                    step=since,
                    message=(
                        f"One position's residual state after {name} is {now[block]:.3g} times the median, from "
                        f"{np.mean(self._early, axis=0)[block]:.3g} early on{self._after(since)}. Low-bit quantization of "
                        "activations will suffer."
                    ),
                    evidence={"peak": float(now[block]), "growth": float(grown[block]), "sink_since": self._sink_since},
                    remedy=(
                        "optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4); "
                        "warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=500)  # instead of Adam, "
                        "whose steps of constant size make the peak grow; or ReLU attention"
                    ),
                    source="2410.13835, section 3; threshold ours",
                    series="residual/peak",
                    where=name,
                )

    def _after(self, since: int) -> str:
        """How long after the sink, if there is one."""
        if self._sink_since is None:
            return ""
        lag = since - self._sink_since
        return f", {lag} steps after the sink came" if lag >= 0 else f", {-lag} steps before the sink came"


@dataclass(frozen=True)
class ExtremeOnsets:
    """When the three came in one head and block, in which order, and how they go together."""

    sink: int | None
    drain: int | None
    peak: int | None
    order: tuple[str, ...]
    """Those that came, the first first."""
    reinforcement: float
    """Spearman's rank correlation of sink score and minus the value drain over checkpoints; 1 where each feeds the other."""
    slope: float
    """Of the sink logit against the log of the step, late; theory says a half."""
    lead: int
    """By how many checkpoints growth of the sink logit runs before the fall of the value's log norm; negative: behind."""


def detect_extreme_tokens(record: Record, *, late: float = 0.25) -> ExtremeOnsets:
    """Onsets, order and reinforcement in a record of the probe `extreme-tokens`, in the head with the strongest sink at last.

    A sink is a score above 0.5, a drain a ratio below 0.5, a peak 1.25 times the first look's ratio to the median; each
    counts from where it lasts to the end. `late` is the share of steps that the slope leaves out.

    Raises KeyError for a record without these series. Source: 2410.13835, section 3.

    >>> detect_extreme_tokens(dynascope.open("runs/mine")).order
    ('sink', 'drain', 'peak')
    """
    score, drain, logit = (record.piece(f"extreme/{name}") for name in ("sink_score", "value_drain", "sink_logit"))
    peaks = record.piece("extreme/peak_median")
    layer, head = np.unravel_index(int(np.nanargmax(score.values[-1])), score.values.shape[1:])
    block = int(np.nanargmax(peaks.values[-1]))
    steps = score.steps
    scores, drains, logits = (one.values[:, layer, head] for one in (score, drain, logit))
    ratio = peaks.values[:, block] / peaks.values[0, block]
    came = {
        "sink": onset(steps, scores > 0.5),
        "drain": onset(steps, drains < 0.5),
        "peak": onset(peaks.steps, ratio > 1.25),
    }
    seen = [(step, name) for name, step in came.items() if step is not None]
    return ExtremeOnsets(
        **came,
        order=tuple(name for _, name in sorted(seen, key=lambda pair: pair[0])),
        reinforcement=reinforcement(scores, drains),
        slope=log_slope(steps, logits, since=late * float(steps[-1])),
        lead=lead(logits, -np.log(drains)),
    )


def onset(steps: Int[np.ndarray, " looks"], holds: np.ndarray) -> int | None:
    """The first step from which a condition holds to the end; None where it does not hold at the end.

    >>> onset(np.array([0, 10, 20, 30]), np.array([True, False, True, True]))
    20
    """
    broken = np.flatnonzero(~holds)
    first = int(broken[-1]) + 1 if broken.size else 0
    return int(steps[first]) if first < len(steps) else None


def reinforcement(sink: Float[np.ndarray, " looks"], drain: Float[np.ndarray, " looks"]) -> float:
    """Spearman's rank correlation of a sink score and minus a value drain over checkpoints; NaN for fewer than three.

    >>> reinforcement(np.array([0.1, 0.5, 0.9]), np.array([1.0, 0.6, 0.2]))
    1.0
    """
    known = np.isfinite(sink) & np.isfinite(drain)
    if known.sum() < 3:
        return float("nan")
    from scipy import stats  # a training that is watched does without it

    return float(stats.spearmanr(sink[known], -drain[known]).statistic)


def lead(first: Float[np.ndarray, " looks"], second: Float[np.ndarray, " looks"], most: int = 5) -> int:
    """By how many looks changes of the first series run before those of the second, at the highest correlation.

    >>> pulse = np.array([0.0, 0, 1, 1, 1, 1, 1])
    >>> lead(pulse, np.roll(pulse, 1))
    1
    """
    one, other = np.nan_to_num(np.diff(first)), np.nan_to_num(np.diff(second))
    one, other = one - one.mean(), other - other.mean()
    most = min(most, len(one) - 2)
    lags = range(-most, most + 1)
    products = [float(one[: len(one) - lag] @ other[lag:] if lag >= 0 else one[-lag:] @ other[:lag]) for lag in lags]
    return lags[int(np.argmax(products))] if products else 0
