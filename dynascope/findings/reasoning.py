"""Findings on reinforcement learning from answers alone: guessing, and rewards with nothing left to teach."""

from collections import deque
from collections.abc import Iterable, Mapping

import numpy as np

from dynascope.findings.history import Aligned
from dynascope.record import Finding, Piece

_PASS, _COT = "reasoning/pass_at_k", "reasoning/cot_pass_at_k"
_ANSWER, _CHAIN = "reasoning/answer_correct", "reasoning/chain_correct"


class GuessingDetector:
    """Pass@K rises at some K while CoT-Pass@K does not: answers come right by something other than the reasoning.

    Means of the last five looks are held against those of the first five.
    """

    reads = (_PASS, _COT)
    # A rise of 0.1 of which less than a quarter is in the chains, at three looks in a row (ours; the effect: 2506.14245).
    rise, share, window, looks = 0.1, 0.25, 5, 3

    def __init__(self) -> None:
        self._aligned = Aligned(self.reads)
        self._early: list[np.ndarray] = []
        self._late: deque[np.ndarray] = deque(maxlen=self.window)
        self._count = 0
        self._has_told = False

    def feed(self, new: Mapping[str, Piece]) -> Iterable[Finding]:
        """One finding a run, at the K where the two rises are furthest apart."""
        for step, (answers, chains) in self._aligned.feed(new):
            now = np.stack([answers, chains])
            if len(self._early) < self.window:
                self._early.append(now)
                continue
            self._late.append(now)
            if len(self._late) < self.window:
                continue
            early, late = np.mean(self._early, axis=0), np.mean(self._late, axis=0)
            gain, gain_chains = late - early
            is_guessing = (gain > self.rise) & (gain_chains < self.share * gain)
            self._count = self._count + 1 if is_guessing.any() else 0
            if self._has_told or self._count < self.looks:
                continue
            self._has_told = True
            place = int(np.where(is_guessing, gain - gain_chains, -np.inf).argmax())
            k = list(new[_PASS].coords.values())[-1][place] if _PASS in new else place
            yield Finding(
                id="guessing",
                severity="warning",
                step=step,
                message=(
                    f"Pass@K rose by {gain[place]:.2f} and CoT-Pass@K by {gain_chains[place]:.2f}: "
                    "answers come right without right reasoning."
                ),
                evidence={
                    "pass_at_k": float(late[0, place]),
                    "cot_pass_at_k": float(late[1, place]),
                    "pass_rise": float(gain[place]),
                    "cot_rise": float(gain_chains[place]),
                },
                remedy="rewards = rewards * chain_correct  # or tasks whose answers cannot be guessed",
                source="2506.14245, section 3; thresholds are ours",
                series=_COT,
                where=f"k {k}",
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
