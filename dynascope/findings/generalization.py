"""Findings on the gap between training and validation: overfitting, and memorisation before generalisation."""

from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float

from dynascope.findings.history import History
from dynascope.record import Finding, Piece

TRAIN = "loss"
VALIDATION = (
    "val/loss",
    "eval/loss",
    "valid/loss",
    "validation/loss",
    "test/loss",
    "val_loss",
    "eval_loss",
    "test_loss",
)


KERNEL = ("kernel/distance", "kernel/alignment")


class _Gap:
    """Validation losses with the training loss of their time beside them."""

    reads: tuple[str, ...] = (TRAIN, *VALIDATION)
    window = 20

    def __init__(self) -> None:
        self._train = History(1_000)
        self._name: str | None = None

    def pairs(self, new: Mapping[str, Piece]) -> Iterable[tuple[int, float, float]]:
        """(step, training loss smoothed over 20 steps, validation loss) for each new validation loss."""
        if TRAIN in new:
            self._train.extend(new[TRAIN])
        self._name = self._name or next((name for name in VALIDATION if name in new), None)
        if self._name is None or self._name not in new or not len(self._train.values):
            return
        smooth = self._train.rolling_median(self.window)
        for step, value in zip(new[self._name].steps, new[self._name].values, strict=True):
            before = np.flatnonzero(self._train.steps <= step)
            if before.size and np.isfinite(value):
                level = smooth[before[-1]] if np.isfinite(smooth[before[-1]]) else self._train.values[before[-1]]
                yield int(step), float(level), float(value)


class Overfitting(_Gap):
    """Validation loss rises from its best while training loss still falls."""

    # 5 % above the best, at 3 validations in a row, while training loss fell by 5 % (convention; cf. Prechelt 1998).
    rise, looks = 0.05, 3

    def __init__(self) -> None:
        super().__init__()
        self._best = self._train_at_best = np.inf
        self._best_step = self._worse = 0
        self._has_told = False

    def feed(self, new: Mapping[str, Piece]) -> Iterable[Finding]:
        """One finding a run, at the step of the best validation loss."""
        for step, train, validation in self.pairs(new):
            if validation < self._best:
                self._best, self._train_at_best, self._best_step, self._worse = validation, train, step, 0
                continue
            is_worse = validation > (1 + self.rise) * self._best and train < (1 - self.rise) * self._train_at_best
            self._worse = self._worse + 1 if is_worse else 0
            if self._worse >= self.looks and not self._has_told:
                self._has_told = True
                yield Finding(
                    id="overfitting",
                    severity="warning",
                    step=self._best_step,
                    message=(
                        f"Validation loss was best at step {self._best_step} ({self._best:.4g}) and is {validation:.4g} "
                        f"at step {step}, while training loss fell to {train:.4g}."
                    ),
                    evidence={
                        "best": self._best,
                        "now": validation,
                        "train": train,
                        "train_at_best": self._train_at_best,
                    },
                    remedy="optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)  # or stop at the best",
                    source="convention: 5 % above the best at 3 validations; Prechelt, Early stopping (1998)",
                    series=self._name or "",
                )


class DelayedGeneralization(_Gap):
    """The training set is memorised while validation is still near where it began; and later, when that changes.

    Judged on losses, since accuracies jump where losses do not (2310.06110). Where the tangent kernel was watched too
    (probe `tangent-kernel`), a memorising run whose kernel stands still and does not turn to the labels is told as lazy.
    """

    reads = (*_Gap.reads, *KERNEL)
    # A kernel within a tenth of its start, whose alignment rose by less than a twentieth, is a lazy network's (ours).
    near, turned = 0.1, 0.05
    # Memorised: training loss below 5 % of its start while validation keeps over half of its own, at 3 validations.
    memorised, unlearnt, looks = 0.05, 0.5, 3

    def __init__(self) -> None:
        super().__init__()
        self._kernel = {name: History(10_000) for name in KERNEL}
        self._start: tuple[float, float] | None = None
        self._streak = 0
        self._since = 0
        self._plateau: float | None = None
        self._has_generalised = False

    def feed(self, new: Mapping[str, Piece]) -> Iterable[Finding]:
        """Up to two findings a run: the gap opens, the gap closes."""
        for name, history in self._kernel.items():
            if name in new:
                history.extend(new[name])
        for step, train, validation in self.pairs(new):
            if self._start is None:
                self._start = train, validation
            first_train, first_validation = self._start
            is_memorised = train < self.memorised * first_train and validation > self.unlearnt * first_validation
            if is_memorised and not self._streak:
                self._since = step
            self._streak = self._streak + 1 if is_memorised else 0
            if self._streak == self.looks and self._plateau is None:
                self._plateau = validation
                yield self._memorised(step, train, validation)
            is_down = self._plateau is not None and validation < self.unlearnt * min(self._plateau, first_validation)
            if is_down and not self._has_generalised:
                self._has_generalised = True
                yield self._generalised(step, validation)

    def _memorised(self, step: int, train: float, validation: float) -> Finding:
        distance, alignment = (self._until(name, step) for name in KERNEL)
        is_still = bool(distance.size) and float(distance[-1]) < self.near
        is_lazy = is_still and not (alignment.size > 1 and alignment[-1] - alignment[0] > self.turned)
        why = (
            " It is still lazy: its tangent kernel has hardly moved, so no features were learnt; more data, longer "
            "training or a smaller output scale would help."
            if is_lazy
            else ""
        )
        remedy = (
            "from dynascope.nn import OutputScale; model = OutputScale(model, alpha=0.1)"
            if is_lazy
            else "optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1.0)  # or a smaller output scale"
        )
        evidence = {"train": train, "validation": validation, "since": self._since}
        return Finding(
            id="memorisation",
            severity="warning",
            step=self._since,
            message=(
                f"The training set is memorised (loss {train:.2g}) while validation loss is still {validation:.4g}: "
                f"it may stay so, or fall much later (grokking).{why}"
            ),
            evidence=evidence | ({"kernel_distance": float(distance[-1])} if distance.size else {}),
            remedy=remedy,
            source="2310.06110; 2201.02177",
            series=self._name or "",
        )

    def _until(self, name: str, step: int) -> Float[np.ndarray, " kept"]:
        history = self._kernel[name]
        return history.values[history.steps <= step]

    def _generalised(self, step: int, validation: float) -> Finding:
        return Finding(
            id="delayed-generalisation",
            severity="info",
            step=step,
            message=f"Generalisation set in at step {step}, {step - self._since} steps after memorisation (grokking).",
            evidence={"validation": validation, "memorised_at": self._since, "delay": step - self._since},
            remedy="# nothing to mend; a smaller output scale or more data would shorten the delay",
            source="2310.06110; 2201.02177",
            series=self._name or "",
        )
