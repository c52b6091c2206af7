"""Findings on RL from rewards alone: responses that grow without sense, rewards for format, questions that teach nothing."""

from collections.abc import Iterable, Mapping

import numpy as np

from dynascope.findings.history import Aligned, Streak
from dynascope.record import Finding, Piece

LENGTH, TRUNCATED, STOPPED = "rollout/length", "rollout/truncated", "rollout/length_stopped"
CORRECT, REWARD, FORMATTED = "rollout/correct", "rollout/reward", "rollout/formatted"
LEARNABLE, SOLVED, UNSOLVED = "rollout/learnable", "rollout/solved", "rollout/unsolved"
REFLECTIONS, BEHAVIOURS = "rollout/reflections", "rollout/behaviours"


class _Courses:
    """A condition on several series, each as its median over the first steps and over the latest ones."""

    reads: tuple[str, ...]
    window, looks_in_a_row = 10, 5

    def __init__(self) -> None:
        self._aligned = Aligned(self.reads)
        self._first: list[list[float]] = []
        self._last: list[list[float]] = []
        self._streak = Streak(self.looks_in_a_row)

    def looks(self, new: Mapping[str, Piece]) -> Iterable[tuple[int, dict[str, float], dict[str, float]]]:
        """(step, medians of the first window, medians of the latest one) at each step at which all series were told.

        Nothing before the second window is full. What is not finite is left out of a median.
        """
        for step, values in self._aligned.feed(new):
            if len(self._first) < self.window:
                self._first.append(values)
            else:
                self._last = [*self._last, values][-self.window :]
            if len(self._last) == self.window:
                yield step, _medians(self.reads, self._first), _medians(self.reads, self._last)

    def feed(self, new: Mapping[str, Piece]) -> Iterable[Finding]:
        """At most one finding a run, at the first of the looks in a row that showed it."""
        for step, first, last in self.looks(new):
            since = self._streak.fires(self.holds(first, last), step)
            if since is not None:
                yield self.finding(since, first, last)

    def holds(self, first: Mapping[str, float], last: Mapping[str, float]) -> bool:
        """Whether a look shows it."""
        raise TypeError(f"{type(self).__name__} must define holds(first, last), or feed(new)")

    def finding(self, step: int, first: Mapping[str, float], last: Mapping[str, float]) -> Finding:
        """What is told, from the look that completed the streak, which began at `step`."""
        raise TypeError(f"{type(self).__name__} must define finding(step, first, last), or feed(new)")


def _medians(names: tuple[str, ...], rows: list[list[float]]) -> dict[str, float]:
    finite = {
        name: [one for one in each if np.isfinite(one)]
        for name, each in zip(names, zip(*rows, strict=True), strict=True)
    }
    return {name: float(np.median(each)) if each else float("nan") for name, each in finite.items()}


class UnhealthyGrowth(_Courses):
    """Responses grow into the length limit while accuracy does not: gibberish, not reasoning.

    Truncated shares of healthy models stay below 0.05 (2503.18892, section 2.4 and appendix C). Growth by a fifth, twice
    that share, and less than 0.02 of accuracy gained, over 5 looks, are our convention.
    """

    reads = (LENGTH, TRUNCATED, CORRECT)
    growth, share, rise, gain = 1.2, 0.1, 0.05, 0.02

    def holds(self, first: Mapping[str, float], last: Mapping[str, float]) -> bool:
        """See the class."""
        is_growing = last[LENGTH] > self.growth * first[LENGTH]
        is_cut = last[TRUNCATED] > max(self.share, first[TRUNCATED] + self.rise)
        return is_growing and is_cut and last[CORRECT] < first[CORRECT] + self.gain

    def finding(self, step: int, first: Mapping[str, float], last: Mapping[str, float]) -> Finding:
        """See the class."""
        return Finding(
            id="unhealthy-growth",
            severity="warning",
            step=step,
            message=(
                f"Responses grew from {first[LENGTH]:.0f} to {last[LENGTH]:.0f} tokens and {last[TRUNCATED]:.0%} run "
                f"into the length limit, while accuracy went from {first[CORRECT]:.0%} to {last[CORRECT]:.0%}: "
                "the policy rambles. Look at some responses; easier questions or another prompt help."
            ),
            evidence={"length": last[LENGTH], "truncated": last[TRUNCATED], "correct": last[CORRECT]},
            remedy="rewards += overlong_penalty(lengths, cut, max_length=8192, buffer=1024)  # from dynascope.rl.tasks.rewards",
            source="2503.18892, section 2.4 and appendix C (healthy below 5 %); 5 looks (convention)",
            series=TRUNCATED,
        )


class ErraticStops(_Courses):
    """Responses run into the length limit, and those that end by themselves do so at lengths that jump from step to step.

    The paper's other sign of gibberish beside a high share of truncated ones. That share above 0.05 (2503.18892), and a deviation
    of the mean stopped length over the window of a fifth of its mean and twice that of the first window, over 5 looks, are our
    convention.
    """

    reads = (STOPPED, TRUNCATED)
    share, spread, growth = 0.05, 0.2, 2.0

    def holds(self, first: Mapping[str, float], last: Mapping[str, float]) -> bool:
        """See the class."""
        now = _spread(self._last)
        return last[TRUNCATED] > self.share and now > max(self.spread, self.growth * _spread(self._first))

    def finding(self, step: int, first: Mapping[str, float], last: Mapping[str, float]) -> Finding:
        """See the class."""
        return Finding(
            id="erratic-stops",
            severity="warning",
            step=step,
            message=(
                f"{last[TRUNCATED]:.0%} of the responses run into the length limit, and the mean length of the others jumps by "
                f"{_spread(self._last):.0%} from step to step: the policy rambles. Look at some responses; easier questions or "
                "another prompt help."
            ),
            evidence={
                "truncated": last[TRUNCATED],
                "spread": _spread(self._last),
                "spread_before": _spread(self._first),
            },
            remedy="rewards += overlong_penalty(lengths, cut, max_length=8192, buffer=1024)  # from dynascope.rl.tasks.rewards",
            source="2503.18892, appendix C; a fifth of the length at 5 looks (convention)",
            series=STOPPED,
        )


def _spread(rows: list[list[float]]) -> float:
    """Deviation over mean of the first of the series, over a window; NaN where less than two looks have one."""
    values = [row[0] for row in rows if np.isfinite(row[0])]
    return float(np.std(values) / np.mean(values)) if len(values) > 1 else float("nan")


class LengthCollapse(_Courses):
    """Responses shrink to a fraction while accuracy falls or stands still: reasoning is being given up.

    Where answers get shorter and better nothing is wrong. Half of the first length over 5 looks is our convention.
    """

    reads = (LENGTH, CORRECT)
    shrink, gain = 0.5, 0.02

    def holds(self, first: Mapping[str, float], last: Mapping[str, float]) -> bool:
        """See the class."""
        return last[LENGTH] < self.shrink * first[LENGTH] and last[CORRECT] < first[CORRECT] + self.gain

    def finding(self, step: int, first: Mapping[str, float], last: Mapping[str, float]) -> Finding:
        """See the class."""
        return Finding(
            id="length-collapse",
            severity="warning",
            step=step,
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
    rise, gain = 0.1, 0.02

    def holds(self, first: Mapping[str, float], last: Mapping[str, float]) -> bool:
        """See the class."""
        is_form = last[FORMATTED] > first[FORMATTED] + self.rise and last[REWARD] > first[REWARD]
        return is_form and last[CORRECT] < first[CORRECT] + self.gain

    def finding(self, step: int, first: Mapping[str, float], last: Mapping[str, float]) -> Finding:
        """See the class."""
        return Finding(
            id="format-pressure",
            severity="warning",
            step=step,
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

    def feed(self, new: Mapping[str, Piece]) -> Iterable[Finding]:
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
    growth, least, gain = 1.5, 0.1, 0.05

    def holds(self, first: Mapping[str, float], last: Mapping[str, float]) -> bool:
        """See the class."""
        is_more = last[REFLECTIONS] > max(self.growth * first[REFLECTIONS], first[REFLECTIONS] + self.least)
        return is_more and last[BEHAVIOURS] < first[BEHAVIOURS] + self.gain

    def finding(self, step: int, first: Mapping[str, float], last: Mapping[str, float]) -> Finding:
        """See the class."""
        return Finding(
            id="keyword-illusion",
            severity="info",
            step=step,
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
