"""Findings on attention: entropy collapse."""

from collections.abc import Iterable, Mapping

import numpy as np

from dynascope.findings.history import History, Streak
from dynascope.record import Finding, Piece


class EntropyCollapse:
    """Attention has become one-hot, the state in which transformers turn unstable (2303.06296).

    A single sharp head is healthy (many copy from one place). A collapse is a layer whose mean entropy is below a tenth
    of the possible and has fallen to half of its own early level; or a head that fell to a quarter of its level while
    the gradients grew threefold.
    """

    reads = ("attention/entropy_normalized", "gradients/total_norm_unclipped", "gradients/total_norm")
    floor, layer_fall, head_fall, growth = 0.1, 0.5, 0.25, 3.0
    early_looks, looks, window = 3, 2, 50

    def __init__(self) -> None:
        self._early: list[np.ndarray] = []
        self._layers: dict[int, Streak] = {}
        self._heads: dict[tuple[int, int], Streak] = {}
        self._told: set[int] = set()
        self._norms = History(2 * self.window)
        self._source: str | None = None

    def feed(self, new: Mapping[str, Piece]) -> Iterable[Finding]:
        """One finding a layer."""
        self._source = self._source or next((name for name in self.reads[1:] if name in new), None)
        if self._source is not None and self._source in new:
            self._norms.extend(new[self._source])
        entropy = new.get("attention/entropy_normalized")
        if entropy is None:
            return
        for step, now in zip(entropy.steps, entropy.values, strict=True):
            if len(self._early) < self.early_looks:
                self._early.append(now)
                continue
            early = np.mean(self._early, axis=0)
            is_unstable = self._has_grown(int(step))
            for layer, name in enumerate(entropy.coords["layer"]):
                if layer in self._told:
                    continue
                level, before = float(np.nanmean(now[layer])), float(np.nanmean(early[layer]))
                is_low = level < self.floor and level < self.layer_fall * before
                since = self._layers.setdefault(layer, Streak(self.looks)).fires(is_low, int(step))
                head: int | None = None
                for index in range(now.shape[1]) if since is None else ():
                    has_fallen = now[layer, index] < min(self.floor, self.head_fall * early[layer, index])
                    streak = self._heads.setdefault((layer, index), Streak(1))
                    since = streak.fires(bool(has_fallen and is_unstable), int(step))
                    if since is not None:
                        head, level, before = index, float(now[layer, index]), float(early[layer, index])
                        break
                if since is not None:
                    self._told.add(layer)
                    yield self._finding(since, str(name), head, level, before, is_unstable)

    def _has_grown(self, step: int) -> bool:
        recent = np.flatnonzero(self._norms.steps <= step)[-self.window :]
        if recent.size < 4:
            return False
        usual = np.nanmedian(self._norms.values[recent[:-1]])
        return bool(np.nanmax(self._norms.values[recent[-5:]]) > self.growth * usual)

    def _finding(
        self, step: int, layer: str, head: int | None, level: float, before: float, is_unstable: bool
    ) -> Finding:
        who = f"{layer}" if head is None else f"head {head} of {layer}"
        growing = " while gradients grow" if is_unstable else ""
        return Finding(
            id="entropy-collapse",
            severity="critical" if is_unstable else "warning",
            step=step,
            message=f"Attention in {who} has collapsed to {level:.0%} of its possible entropy, from {before:.0%}{growing}.",
            evidence={"entropy_normalized": level, "early": before, "gradients_grow": is_unstable},
            remedy=(
                'from dynascope.nn import sigma_reparam; sigma_reparam(model, gamma="preserve")  '
                "# or query-key normalisation, a lower learning rate, a longer warmup"
            ),
            source="2303.06296: collapse below a tenth of log T goes with instability",
            series="attention/entropy_normalized",
            where=who,
        )
