"""Findings on RL from rewards alone: responses that grow without sense, rewards for format, questions that teach nothing."""

from collections.abc import Iterable, Mapping

import numpy as np
import xarray as xr

from dynascope.findings.history import Streak
from dynascope.record import Finding

LENGTH, TRUNCATED, STOPPED = "rollout/length", "rollout/truncated", "rollout/length_stopped"
CORRECT, REWARD, FORMATTED = "rollout/correct", "rollout/reward", "rollout/formatted"
LEARNABLE, SOLVED, UNSOLVED = "rollout/learnable", "rollout/solved", "rollout/unsolved"
REFLECTIONS, BEHAVIOURS = "rollout/reflections", "rollout/behaviours"


class _Courses:
    """Several series step by step, each as its median over the first steps and over the latest ones."""

    reads: tuple[str, ...]
    window = 10

    def __init__(self) -> None:
        self._pending: dict[int, dict[str, float]] = {}
        self._first: dict[str, list[float]] = {name: [] for name in self.reads}
        self._last: dict[str, list[float]] = {name: [] for name in self.reads}

    def looks(self, new: Mapping[str, xr.DataArray]) -> Iterable[tuple[int, dict[str, float], dict[str, float]]]:
        """(step, medians of the first window, medians of the latest one) at each step at which all series were told.

        Nothing before the second window is full. What is not finite is left out of a median.
        """
        for name, series in new.items():
            for step, value in zip(series["step"].values.tolist(), series.values.tolist(), strict=True):
                self._pending.setdefault(step, {})[name] = value
        for step in sorted(self._pending):
            if len(self._pending[step]) < len(self.reads):
                continue
            told = self._pending.pop(step)
            for earlier in [one for one in self._pending if one < step]:  # told of only in part
                del self._pending[earlier]
            is_early = len(self._first[self.reads[0]]) < self.window
            for name, value in told.items():
                if is_early:
                    self._first[name].append(value)
                else:
                    self._last[name] = [*self._last[name], value][-self.window :]
            if len(self._last[self.reads[0]]) == self.window:
                yield step, _medians(self._first), _medians(self._last)


def _medians(values: Mapping[str, list[float]]) -> dict[str, float]:
    finite = {name: [one for one in each if np.isfinite(one)] for name, each in values.items()}
    return {name: float(np.median(each)) if each else float("nan") for name, each in finite.items()}


class UnhealthyGrowth(_Courses):
    """Responses grow into the length limit while accuracy does not: gibberish, not reasoning.

    Truncated shares of healthy models stay below 0.05 (2503.18892, section 2.4 and appendix C). Growth by a fifth, twice
    that share, and less than 0.02 of accuracy gained, over 5 looks, are our convention.
    """

    reads = (LENGTH, TRUNCATED, CORRECT)
    growth, share, rise, gain, looks_in_a_row = 1.2, 0.1, 0.05, 0.02, 5

    def __init__(self) -> None:
        super().__init__()
        self._streak = Streak(self.looks_in_a_row)

    def feed(self, new: Mapping[str, xr.DataArray]) -> Iterable[Finding]:
        """At most one finding a run, at the first of the looks that showed it."""
        for step, first, last in self.looks(new):
            is_growing = last[LENGTH] > self.growth * first[LENGTH]
            is_cut = last[TRUNCATED] > max(self.share, first[TRUNCATED] + self.rise)
            since = self._streak.fires(is_growing and is_cut and last[CORRECT] < first[CORRECT] + self.gain, step)
            if since is not None:
                yield Finding(
                    id="unhealthy-growth",
                    severity="warning",
                    step=since,
                    message=(
                        f"Responses grew from {first[LENGTH]:.0f} to {last[LENGTH]:.0f} tokens and {last[TRUNCATED]:.0%} run "
                        f"into the length limit, while accuracy went from {first[CORRECT]:.0%} to {last[CORRECT]:.0%}: "
                        "the policy rambles. Look at some responses; easier questions or another prompt help."
                    ),
                    evidence={"length": last[LENGTH], "truncated": last[TRUNCATED], "correct": last[CORRECT]},
                    remedy="rewards += overlong_penalty(lengths, truncated, max_length=8192, buffer=1024)  # from rl.rewards",
                    source="2503.18892, section 2.4 and appendix C (healthy below 5 %); 5 looks (convention)",
                    series=TRUNCATED,
                )


class LengthCollapse(_Courses):
    """Responses shrink to a fraction while accuracy falls or stands still: reasoning is being given up.

    Where answers get shorter and better nothing is wrong. Half of the first length over 5 looks is our convention.
    """

    reads = (LENGTH, CORRECT)
    shrink, gain, looks_in_a_row = 0.5, 0.02, 5

    def __init__(self) -> None:
        super().__init__()
        self._streak = Streak(self.looks_in_a_row)

    def feed(self, new: Mapping[str, xr.DataArray]) -> Iterable[Finding]:
        """At most one finding a run."""
        for step, first, last in self.looks(new):
            is_short = last[LENGTH] < self.shrink * first[LENGTH] and last[CORRECT] < first[CORRECT] + self.gain
            since = self._streak.fires(is_short, step)
            if since is not None:
                yield Finding(
                    id="length-collapse",
                    severity="warning",
                    step=since,
                    message=(
                        f"Responses shrank from {first[LENGTH]:.0f} to {last[LENGTH]:.0f} tokens without becoming right more "
                        f"often ({first[CORRECT]:.0%} before, {last[CORRECT]:.0%} now): reasoning is being given up. Harder "
                        "questions and a reward for right answers alone bring it back."
                    ),
                    evidence={"length": last[LENGTH], "length_before": first[LENGTH], "correct": last[CORRECT]},
                    remedy="level, shares = recommend_level(pass_rates_by_level)  # from dynascope.rl.tasks.curriculum",
                    source="2503.18892, sections 3.1 and 3.2; half of the length, 5 looks (convention)",
                    series=LENGTH,
                )


class FormatPressure(_Courses):
    """Reward rises with the share of formatted answers while right answers do not become more.

    A rise by a tenth of the share, less than 0.02 of accuracy, over 5 looks, are our convention.
    """

    reads = (REWARD, FORMATTED, CORRECT)
    rise, gain, looks_in_a_row = 0.1, 0.02, 5

    def __init__(self) -> None:
        super().__init__()
        self._streak = Streak(self.looks_in_a_row)

    def feed(self, new: Mapping[str, xr.DataArray]) -> Iterable[Finding]:
        """At most one finding a run."""
        for step, first, last in self.looks(new):
            is_form = last[FORMATTED] > first[FORMATTED] + self.rise and last[REWARD] > first[REWARD]
            since = self._streak.fires(is_form and last[CORRECT] < first[CORRECT] + self.gain, step)
            if since is not None:
                yield Finding(
                    id="format-pressure",
                    severity="warning",
                    step=since,
                    message=(
                        f"Reward rose from {first[REWARD]:.3g} to {last[REWARD]:.3g} with the share of formatted answers "
                        f"({first[FORMATTED]:.0%} to {last[FORMATTED]:.0%}), but right answers did not "
                        f"({first[CORRECT]:.0%} to {last[CORRECT]:.0%}): the policy learns the form. Pay for right answers alone."
                    ),
                    evidence={"formatted": last[FORMATTED], "reward": last[REWARD], "correct": last[CORRECT]},
                    remedy="reward = RewardRule.named('correctness').as_reward(is_right)  # from dynascope.rl.tasks.reward_rules",
                    source="2503.18892, section 3.1; 5 looks (convention)",
                    series=REWARD,
                )


class UnsuitableQuestions(_Courses):
    """Nearly all questions are solved by every answer, or by none: most of each rollout teaches nothing.

    Less than a tenth of the questions with both right and wrong answers, at 10 looks in a row, is our convention.
    """

    reads = (LEARNABLE, SOLVED, UNSOLVED)
    least, looks_in_a_row = 0.1, 10

    def __init__(self) -> None:
        super().__init__()
        self._streaks = {kind: Streak(self.looks_in_a_row) for kind in ("too-hard", "too-easy")}

    def feed(self, new: Mapping[str, xr.DataArray]) -> Iterable[Finding]:
        """At most one finding a run of each kind."""
        for step, _, last in self.looks(new):
            for kind, streak in self._streaks.items():
                is_it = (last[UNSOLVED] > last[SOLVED]) == (kind == "too-hard")
                since = streak.fires(last[LEARNABLE] < self.least and is_it, step)
                if since is not None:
                    yield self._finding(kind, since, last)

    def _finding(self, kind: str, since: int, last: Mapping[str, float]) -> Finding:
        share, name = (last[UNSOLVED], "no") if kind == "too-hard" else (last[SOLVED], "every")
        return Finding(
            id=f"questions-{kind}",
            severity="warning" if kind == "too-hard" else "info",
            step=since,
            message=(
                f"Of {share:.0%} of the questions {name} answer is right; only {last[LEARNABLE]:.0%} have both kinds, and "
                f"the others teach nothing: they are {kind.replace('-', ' ')} for this policy."
            ),
            evidence={"learnable": last[LEARNABLE], "solved": last[SOLVED], "unsolved": last[UNSOLVED]},
            remedy="sampler = QueryDifficultySelector(pass_rates, low=0.125, high=0.875)  # from dynascope.rl.tasks.curriculum",
            source="2503.18892, section 3.2; a tenth of the questions at 10 looks (convention)",
            series=LEARNABLE,
        )


class KeywordIllusion(_Courses):
    """Words of reflection multiply while behaviours of reasoning do not: the words are no sign of thought.

    Half as many again, a rise of behaviours below 0.05, over 5 looks, are our convention.
    """

    reads = (REFLECTIONS, BEHAVIOURS)
    growth, least, gain, looks_in_a_row = 1.5, 0.1, 0.05, 5

    def __init__(self) -> None:
        super().__init__()
        self._streak = Streak(self.looks_in_a_row)

    def feed(self, new: Mapping[str, xr.DataArray]) -> Iterable[Finding]:
        """At most one finding a run."""
        for step, first, last in self.looks(new):
            is_more = last[REFLECTIONS] > max(self.growth * first[REFLECTIONS], first[REFLECTIONS] + self.least)
            since = self._streak.fires(is_more and last[BEHAVIOURS] < first[BEHAVIOURS] + self.gain, step)
            if since is not None:
                yield Finding(
                    id="keyword-illusion",
                    severity="info",
                    step=since,
                    message=(
                        f"Words of reflection rose from {first[REFLECTIONS]:.2g} to {last[REFLECTIONS]:.2g} a response, while "
                        f"the share with a behaviour of reasoning stayed ({first[BEHAVIOURS]:.0%}, {last[BEHAVIOURS]:.0%}): "
                        "do not take the words for thought."
                    ),
                    evidence={"reflections": last[REFLECTIONS], "behaviours": last[BEHAVIOURS]},
                    remedy="labeller = JudgeLabeller(ask, sample=64)  # from dynascope.rl.reasoning.behaviours",
                    source="2503.18892, appendix C (keywords and behaviours go together only weakly); 5 looks (convention)",
                    series=REFLECTIONS,
                )
