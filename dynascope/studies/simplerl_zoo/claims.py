"""What `simplerl-zoo` claims, and what is measured of its records to tell."""

import numpy as np

from dynascope.findings.detector import Follower
from dynascope.findings.zero_rl import FormatPressure, LengthCollapse, UnhealthyGrowth, UnsuitableQuestions
from dynascope.record import Record
from dynascope.studies.harness import Claim, Runs

ZOO = ("weak", "middle", "strong")
COLD = ("cold-short", "cold-long")
TRAINED = (*ZOO, "weak-strict", "weak-easy", "weak-hard", *COLD)


def course(record: Record) -> np.ndarray:
    """Right answers of two-digit sums at each test."""
    return np.asarray(record["benchmark/correct"].values, np.float64)


def gain(record: Record) -> float:
    """By how much they rose."""
    return float(course(record)[-1] - course(record)[0])


def area(record: Record) -> float:
    """Their mean over training."""
    steps = record["benchmark/correct"].step.values
    return float(np.trapezoid(course(record), steps) / (steps[-1] - steps[0]))


def pass_at_8(record: Record, place: int) -> float:
    """At a test."""
    return float(record["benchmark/pass_at_k"].values[place, 3])


def cut_off(record: Record) -> float:
    """By how much the share of truncated responses rose, first and last fifth of the rollouts."""
    values = record["rollout/truncated"].values
    fifth = max(1, len(values) // 5)
    return float(values[-fifth:].mean() - values[:fifth].mean())


def verified(record: Record) -> float:
    """Share of responses with a check, last fifth of the rollouts."""
    values = record["rollout/behaviours"].values
    return float(values[-max(1, len(values) // 5) :].mean())


def warnings(record: Record) -> list[str]:
    """What the detectors of zero RL warn of."""
    kinds = (UnhealthyGrowth, LengthCollapse, FormatPressure, UnsuitableQuestions)
    told = Follower(record, lambda: [kind() for kind in kinds]).new_findings()
    return [finding.id for finding in told if finding.severity == "warning"]


def told_apart(runs: Runs) -> float | None:
    """Share warned of among the runs that gained less than 0.02, less that among those that gained 0.1 or more."""
    gains = {arm: gain(runs[arm]) for arm in TRAINED}
    collapsed = [bool(warnings(runs[arm])) for arm in TRAINED if gains[arm] < 0.02]
    healthy = [bool(warnings(runs[arm])) for arm in TRAINED if gains[arm] >= 0.1]
    return float(np.mean(collapsed) - np.mean(healthy)) if collapsed and healthy else None


def lengthened(record: Record) -> float:
    """By how many tokens the answers to two-digit sums grew."""
    values = record["benchmark/length"].values
    return float(values[-1] - values[0])


def skill_gained(runs: Runs, arm: str) -> np.ndarray:
    """Of the difficulty bandit, by difficulty."""
    return np.asarray(runs[arm]["bandit/gain"].values[0], np.float64)


CLAIMS = [
    Claim(
        id="A1-correctness",
        statement="Paid for right answers alone, the bandit answers rightly after 40 steps.",
        source="Section 3.1 (as arithmetic)",
        paper_value=None,
        quantity="P(right) at step 40",
        measure=lambda runs: float(runs["format-bandit"]["bandit/correct"].values[40]),
        op=">=",
        threshold=0.9,
    ),
    Claim(
        id="A1-strict",
        statement="A strict format holds it back.",
        source="Section 3.1 (as arithmetic)",
        paper_value=None,
        quantity="P(right) at step 40",
        measure=lambda runs: float(runs["format-bandit-strict"]["bandit/correct"].values[40]),
        op="<=",
        threshold=0.32,
    ),
    Claim(
        id="B1-weak",
        statement="A weak learner gains most from moderately hard questions.",
        source="Section 3.2 (as arithmetic)",
        paper_value=None,
        quantity="skill gained at difficulty 2 less the most at any other",
        measure=lambda runs: float(
            skill_gained(runs, "difficulty-bandit-weak")[1]
            - np.delete(skill_gained(runs, "difficulty-bandit-weak"), 1).max()
        ),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="B1-dead",
        statement="From far too hard ones it learns nothing.",
        source="Section 3.2 (as arithmetic)",
        paper_value=None,
        quantity="skill gained at difficulty 8",
        measure=lambda runs: float(skill_gained(runs, "difficulty-bandit-weak")[3]),
        op="<=",
        threshold=0.05,
    ),
    Claim(
        id="B2-strong",
        statement="A strong one gains the more the harder they are.",
        source="Section 3.2 (as arithmetic)",
        paper_value=None,
        quantity="least rise of the skill gained from one difficulty to the next",
        measure=lambda runs: float(np.diff(skill_gained(runs, "difficulty-bandit-strong")).min()),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C1-format",
        statement="A weak base learns more from a reward for right answers than from one with a strict format.",
        source="Section 3.1",
        paper_value=None,
        quantity="mean accuracy over training, less that with a strict format",
        measure=lambda runs: area(runs["weak"]) - area(runs["weak-strict"]),
        op=">=",
        threshold=0.05,
    ),
    Claim(
        id="C2-hard",
        statement="Questions that are too hard teach a weak base nothing.",
        source="Section 3.2",
        paper_value=None,
        quantity="gain of accuracy",
        measure=lambda runs: gain(runs["weak-hard"]),
        op="<",
        threshold=0.02,
    ),
    Claim(
        id="C2-length",
        statement="They drive its responses into the length limit.",
        source="Section 3.2",
        paper_value=None,
        quantity="rise of the truncated share",
        measure=lambda runs: cut_off(runs["weak-hard"]),
        op=">=",
        threshold=0.1,
    ),
    Claim(
        id="C2-easy",
        statement="Questions that are too easy teach it less than those of the right difficulty.",
        source="Section 3.2",
        paper_value=None,
        quantity="accuracy after RL, medium less easy questions",
        measure=lambda runs: float(course(runs["weak"])[-1] - course(runs["weak-easy"])[-1]),
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C2-easy-length",
        statement="They make its answers shorter.",
        source="Section 3.2",
        paper_value=None,
        quantity="tokens by which answers to two-digit sums grow, easy less medium questions",
        measure=lambda runs: lengthened(runs["weak-easy"]) - lengthened(runs["weak"]),
        op="<",
        threshold=0.0,
    ),
    Claim(
        id="C3-gain",
        statement="The recipe lifts every base.",
        source="Table 1",
        paper_value="13.3 (Mistral-7B) to 22.3 points (Math-7B)",
        quantity="gain of accuracy, weak, middle and strong base",
        measure=lambda runs: [gain(runs[arm]) for arm in ZOO],
        op=">",
        threshold=0.2,
    ),
    Claim(
        id="C3-pass-at-8",
        statement="It does not do so at the cost of what eight tries could find.",
        source="Section 2.5",
        paper_value="10 to 30 points more",
        quantity="pass@8 after less before, weak, middle and strong base",
        measure=lambda runs: [pass_at_8(runs[arm], -1) - pass_at_8(runs[arm], 0) for arm in ZOO],
        op=">=",
        threshold=0.0,
    ),
    Claim(
        id="C4-monitors",
        statement="The monitors warn of runs that learn nothing, and of none that learns.",
        source="Section 2.4, appendix C",
        paper_value=None,
        quantity="share warned of, of runs that gained less than 0.02 less that of runs that gained 0.1 or more",
        measure=told_apart,
        op=">=",
        threshold=0.8,
    ),
    Claim(
        id="C5-start",
        statement="Fine-tuning on short chains first, a little or long, gives a better start.",
        source="Section 3.3",
        paper_value=None,
        quantity="accuracy before RL, short and long cold start less none",
        measure=lambda runs: [float(course(runs[arm])[0] - course(runs["weak"])[0]) for arm in COLD],
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C5-ceiling",
        statement="And a lower end.",
        source="Section 3.3",
        paper_value=None,
        quantity="accuracy after RL, none less short and long cold start",
        measure=lambda runs: [float(course(runs["weak"])[-1] - course(runs[arm])[-1]) for arm in COLD],
        op=">",
        threshold=0.0,
    ),
    Claim(
        id="C5-behaviours",
        statement="And fewer behaviours of reasoning.",
        source="Section 3.3",
        paper_value=None,
        quantity="share of responses with a check after RL, none less short and long cold start",
        measure=lambda runs: [verified(runs["weak"]) - verified(runs[arm]) for arm in COLD],
        op=">",
        threshold=0.0,
    ),
]
