"""Findings on what heads compute: in-context gradient descent, found or missed."""

from collections.abc import Iterable, Mapping

import numpy as np
import xarray as xr
from jaxtyping import Float

from dynascope.findings.history import Streak
from dynascope.record import Finding


class InContextDescent:
    """Heads have come to compare tokens by multiples of the identity: to descend on the context, or only to smooth it.

    With heads of both signs and one size that cancel, a layer is one step of debiased gradient descent. When all heads
    have one sign it is a kernel smoother, which no number of such heads betters, and gradients do not lead out of it.
    Layers whose KQ is no multiple of the identity, as in any language model, are left alone.
    """

    reads = ("circuits/omega", "circuits/mu", "circuits/off_diagonal")
    # Off-diagonal share and cancellation as the verdict in 2503.12734's reproduction has them; the rest is ours.
    off_diagonal, cancelling, equal, dummy, looks = 0.15, 0.1, 0.1, 0.05, 4

    def __init__(self) -> None:
        self._waiting: dict[int, dict[str, np.ndarray]] = {}
        self._streaks: dict[tuple[str, str], Streak] = {}

    def feed(self, new: Mapping[str, xr.DataArray]) -> Iterable[Finding]:
        """At most two findings a layer."""
        for name, series in new.items():
            for step, values in zip(series["step"].values, series.values, strict=True):
                self._waiting.setdefault(int(step), {})[name] = values
        layers = [str(layer) for layer in next(iter(new.values()))["layer"].values]
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
        size = np.abs(np.nan_to_num(mu))
        is_live = (size >= self.dummy * size.max()) & (size > 0)
        signs, sizes = np.sign(omega[is_live]), np.abs(omega[is_live])
        is_formed = len(signs) > 1 and float(off_diagonal[is_live].mean()) < self.off_diagonal
        total = float(abs(mu[is_live].sum()) / size[is_live].sum()) if is_formed else np.nan
        spread = float(sizes.std() / sizes.mean()) if is_formed else np.nan
        is_one_sided = is_formed and abs(signs.sum()) == len(signs)
        is_settled = is_formed and not is_one_sided and total <= self.cancelling and spread <= self.equal
        evidence = {"heads": len(signs), "omega": float(sizes.mean()) if is_formed else np.nan, "zero_sum": total}
        since = self._streak("one-sided", layer).fires(is_one_sided, step)
        if since is not None:
            yield Finding(
                id="one-sided-heads",
                severity="warning",
                step=since,
                message=(
                    f"All {len(signs)} heads of {layer} compare tokens with one sign: together they do what a single "
                    "head does, smooth the context, and training does not lead out of it."
                ),
                evidence=evidence,
                remedy='MultiHeadSoftmaxICL(dim, num_heads, init="opposite_small_identity")  # or another seed, or more heads',
                source="2503.12734: heads of both signs make gradient descent, one sign a kernel smoother",
                series="circuits/omega",
                where=layer,
            )
        since = self._streak("settled", layer).fires(is_settled, step)
        if since is not None:
            yield Finding(
                id="in-context-descent",
                severity="info",
                step=since,
                message=(
                    f"The {len(signs)} heads of {layer} are of one size, of both signs, and cancel: one step of debiased "
                    f"gradient descent. From here omega ({evidence['omega']:.2g}) shrinks for ever and little is gained."
                ),
                evidence=evidence | {"spread": spread},
                remedy="# nothing to mend; training can end here",
                source="2503.12734: the manifold of solutions, on which training only creeps",
                series="circuits/omega",
                where=layer,
            )

    def _streak(self, kind: str, layer: str) -> Streak:
        return self._streaks.setdefault((kind, layer), Streak(self.looks))
