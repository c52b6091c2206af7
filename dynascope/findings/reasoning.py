"""Findings on reinforcement learning from answers alone: guessing, and rewards with nothing left to teach."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dynascope.findings.history import Aligned, Streak
from dynascope.record import Finding, Piece

_PASS, _COT = "reasoning/pass_at_k", "reasoning/cot_pass_at_k"
_ANSWER, _CHAIN = "reasoning/answer_correct", "reasoning/chain_correct"


_POWERS = tuple(2**power for power in range(11))


class GuessingDetector:
    """Pass@K rises at some K, or crosses the start's curve, while CoT-Pass@K does not: it is not the reasoning that changed.

    It crosses where it has risen at one K and fallen at a larger one: the start's lucky answers are gone. Means of the last
    five looks are held against those of the first five. Curves are read whole, or as TRL logs them, a number for each K that
    is a power of 2.
    """

    # A change of 0.1 of which less than a quarter is in the chains, at three looks in a row (ours; the effect: 2506.14245).
    rise, share, window, looks = 0.1, 0.25, 5, 3
    reads = (_PASS, _COT, *(f"{name}/{k}" for name in (_PASS, _COT) for k in _POWERS))

    def __init__(self) -> None:
        self._aligned: Aligned | None = None
        self._ks: Sequence[Any] = ()
        self._early: list[np.ndarray] = []
        self._late: deque[np.ndarray] = deque(maxlen=self.window)
        self._guessing, self._crossing = Streak(self.looks), Streak(self.looks)

    def _curves(self, new: Mapping[str, Piece]) -> Iterable[tuple[int, np.ndarray]]:
        """(step, Pass@K and CoT-Pass@K of every K)."""
        if self._aligned is None and {_PASS, _COT} <= set(new):
            self._aligned, self._ks = Aligned((_PASS, _COT)), list(new[_PASS].coords.values())[-1]
        elif self._aligned is None:
            self._ks = [k for k in _POWERS if {f"{_PASS}/{k}", f"{_COT}/{k}"} <= set(new)]
            if self._ks:
                self._aligned = Aligned([f"{name}/{k}" for name in (_PASS, _COT) for k in self._ks])
        if self._aligned is not None:
            for step, values in self._aligned.feed(new):
                yield step, np.stack(values).reshape(2, -1)

    def feed(self, new: Mapping[str, Piece]) -> Iterable[Finding]:
        """At most one finding a run of either kind, at the K where the two changes are furthest apart."""
        for step, now in self._curves(new):
            if len(self._early) < self.window:
                self._early.append(now)
                continue
            self._late.append(now)
            if len(self._late) < self.window:
                continue
            early, late = np.mean(self._early, axis=0), np.mean(self._late, axis=0)
            gain, gain_chains = late - early
            is_guessing = (gain > self.rise) & (gain_chains < self.share * gain)
            has_risen_before = np.maximum.accumulate(gain) > 0
            is_crossing = has_risen_before & (gain < -self.rise) & (gain_chains > self.share * gain)
            if self._guessing.fires(is_guessing.any(), step) is not None:
                place = int(np.where(is_guessing, gain - gain_chains, -np.inf).argmax())
                yield self._finding(
                    step,
                    place,
                    late,
                    early,
                    id="guessing",
                    severity="warning",
                    message=(
                        f"Pass@K rose by {gain[place]:.2f} and CoT-Pass@K by {gain_chains[place]:.2f}: "
                        "answers come right without right reasoning."
                    ),
                    remedy="rewards = rewards * chain_correct  # or tasks whose answers cannot be guessed",
                )
            if self._crossing.fires(is_crossing.any(), step) is not None:
                place = int(np.where(is_crossing, gain_chains - gain, -np.inf).argmax())
                yield self._finding(
                    step,
                    place,
                    late,
                    early,
                    id="pass-at-k-crossing",
                    severity="info",
                    message=(
                        f"Pass@K rose at small K and fell by {-gain[place]:.2f} here, below the start's, while CoT-Pass@K went "
                        f"by {gain_chains[place]:+.2f}: what is lost are answers that came right without right reasoning."
                    ),
                    remedy="curves = [cot_pass_at_k(n, d, ks) for n, d in counts]  # from dynascope.rl.reasoning.pass_at_k",
                )

    def _finding(self, step: int, place: int, late: np.ndarray, early: np.ndarray, **told: Any) -> Finding:
        rise = late - early
        return Finding(
            step=step,
            evidence={
                "pass_at_k": float(late[0, place]),
                "cot_pass_at_k": float(late[1, place]),
                "pass_rise": float(rise[0, place]),
                "cot_rise": float(rise[1, place]),
            },
            source="2506.14245, section 3; thresholds are ours",
            series=_COT,
            where=f"k {self._ks[place]}",
            **told,
        )


class RewardSaturationDetector:
    """Nearly all answers are right while the share of right chains among them stands still: nothing is left to learn from.

    Groups whose answers are all right have advantage 0 whatever their reasoning (2506.14245, section 5).
    """

    reads = (_ANSWER, _CHAIN)
    # P(CA) above 0.95 and P(CC|CA) below 0.9 that moved by less than 0.02 between halves of the last 20 looks (ours).
    saturated, sound, flat, window = 0.95, 0.9, 0.02, 20

    def __init__(self) -> None:
        self._aligned = Aligned(self.reads)
        self._recent: deque[tuple[float, float]] = deque(maxlen=self.window)
        self._has_told = False

    def feed(self, new: Mapping[str, Piece]) -> Iterable[Finding]:
        """One finding a run."""
        for step, (answer, chain) in self._aligned.feed(new):
            if not np.isfinite(chain):
                continue
            self._recent.append((float(answer), float(chain)))
            if self._has_told or len(self._recent) < self.window:
                continue
            recent = np.array(self._recent)
            half = self.window // 2
            before, after = recent[:half, 1].mean(), recent[half:, 1].mean()
            if recent[:, 0].mean() > self.saturated and after < self.sound and abs(after - before) < self.flat:
                self._has_told = True
                yield Finding(
                    id="reward-saturation",
                    severity="warning",
                    step=step,
                    message=(
                        f"{recent[:, 0].mean():.0%} of the answers are right but only {after:.0%} of their chains, "
                        "and that share stands still: rewards for answers have nothing left to teach here."
                    ),
                    evidence={"answer_correct": float(recent[:, 0].mean()), "chain_correct": float(after)},
                    remedy="prompts = prompts[solved_share < 1]  # harder prompts, or a reward for the chain of thought",
                    source="2506.14245, section 5; thresholds are ours",
                    series=_CHAIN,
                )
