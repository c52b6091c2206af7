"""Findings on what heads compute: in-context gradient descent, found or missed."""

from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float

from dynascope.findings.history import Streak
from dynascope.record import Finding, Piece


class InContextDescent:
    """Heads have come to compare tokens by multiples of the identity: to descend on the context, or only to smooth it.

    With heads of both signs and one size that cancel, a layer is one step of debiased gradient descent. When all heads
    have one sign it is a kernel smoother, which no number of such heads betters, and gradients seldom lead out of it.
    Layers whose KQ is no multiple of the identity, as in any language model, are left alone.
    """

    reads = ("circuits/omega", "circuits/mu", "circuits/off_diagonal")
    # Of the settled pattern: off-diagonal share of KQ, cancellation, spread of sizes (ours, as the study's claims).
    off_diagonal, cancelling, equal, dummy, looks = 0.15, 0.1, 0.1, 0.05, 4
    # Heads of one sign leave KQ less clean. They have stalled when each omega stands within a quarter from some step to three
    # times that step (ours: in slow but healthy runs one of them mostly turns its sign within that time).
    one_sided_off_diagonal, moved, patience = 0.5, 0.25, 3

    def __init__(self) -> None:
        self._waiting: dict[int, dict[str, np.ndarray]] = {}
        self._settled: dict[str, Streak] = {}
        self._anchor: dict[str, tuple[int, np.ndarray]] = {}
        self._stalled: set[str] = set()

    def feed(self, new: Mapping[str, Piece]) -> Iterable[Finding]:
        """At most two findings a layer."""
        for name, series in new.items():
            for step, values in zip(series.steps, series.values, strict=True):
                self._waiting.setdefault(int(step), {})[name] = values
        layers = [str(layer) for layer in next(iter(new.values())).coords["layer"]]
        for step in sorted(step for step, seen in self._waiting.items() if len(seen) == len(self.reads)):
            seen = self._waiting.pop(step)
            for layer, numbers in zip(layers, zip(*(seen[name] for name in self.reads), strict=True), strict=True):
                yield from self._look(step, layer, *numbers)
        # A series that stops before the others must not keep them for ever.
        for step in sorted(self._waiting)[:-1000]:
            del self._waiting[step]

    def _look(
        self,
        step: int,
        layer: str,
        omega: Float[np.ndarray, " heads"],
        mu: Float[np.ndarray, " heads"],
        off_diagonal: Float[np.ndarray, " heads"],
    ) -> Iterable[Finding]:
        omega, mu = np.nan_to_num(omega), np.nan_to_num(mu)
        size = np.abs(mu)
        is_live = (size >= self.dummy * size.max()) & (size > 0)
        num_live = int(is_live.sum())
        if num_live < 2:
            return
        share, sizes = float(off_diagonal[is_live].mean()), np.abs(omega[is_live])
        is_one_sided = bool(abs(np.sign(omega[is_live]).sum()) == num_live)
        total, spread = float(abs(mu[is_live].sum()) / size[is_live].sum()), float(sizes.std() / sizes.mean())
        evidence = {"heads": num_live, "omega": float(sizes.mean()), "zero_sum": total, "off_diagonal": share}
        since = self._stands_since(step, layer, omega, is_one_sided and share < self.one_sided_off_diagonal)
        if since is not None:
            yield Finding(
                id="one-sided-heads",
                severity="warning",
                step=since,
                message=(
                    f"All {num_live} heads of {layer} compare tokens with one sign: together they do what a single "
                    f"head does, smooth the context, and they have stood still there since step {since}."
                ),
                evidence=evidence,
                remedy='MultiHeadSoftmaxICL(dim, num_heads, init="opposite_small_identity")  # or another seed, or more heads',
                source="2503.12734: heads of both signs make gradient descent, one sign a kernel smoother",
                series="circuits/omega",
                where=layer,
            )
        is_settled = (
            not is_one_sided and max(share / self.off_diagonal, total / self.cancelling, spread / self.equal) <= 1
        )
        since = self._settled.setdefault(layer, Streak(self.looks)).fires(is_settled, step)
        if since is not None:
            yield Finding(
                id="in-context-descent",
                severity="info",
                step=since,
                message=(
                    f"The {num_live} heads of {layer} are of one size, of both signs, and cancel: one step of debiased "
                    f"gradient descent. From here omega ({evidence['omega']:.2g}) shrinks for ever and little is gained."
                ),
                evidence=evidence | {"spread": spread},
                remedy="# nothing to mend; training can end here",
                source="2503.12734: the manifold of solutions, on which training only creeps",
                series="circuits/omega",
                where=layer,
            )

    def _stands_since(
        self, step: int, layer: str, omega: Float[np.ndarray, " heads"], is_one_sided: bool
    ) -> int | None:
        """The step since which heads of one sign have stood still, once that has been for long enough."""
        if not is_one_sided:
            self._anchor.pop(layer, None)
            return None
        since, there = self._anchor.setdefault(layer, (step, omega))
        if (np.abs(omega - there) > self.moved * np.abs(there)).any():
            self._anchor[layer] = step, omega
            return None
        if layer in self._stalled or step < self.patience * max(since, 1):
            return None
        self._stalled.add(layer)
        return since
