"""What the claims measure, and the claims."""

from typing import Any

import numpy as np

from dynascope.data.in_context.linear_regression import toeplitz_covariance
from dynascope.studies.harness import Claim, Runs
from dynascope.studies.icl_linear_regression.method import RHO
from dynascope.theory.in_context_regression import best_step, debiased_gd_risk, gd_risk, preconditioner


def last(runs: Runs, arm: str, name: str) -> np.ndarray:
    """What a series of an arm is at the end."""
    value: np.ndarray = runs[arm][name].values[-1]
    return value


def setting(runs: Runs) -> tuple[int, int, float]:
    """Inputs, examples and noise of the single task."""
    dim, length, noise = last(runs, "heads-2", "setting")
    return int(dim), int(length), round(float(noise), 6)


def risk_at(runs: Runs, arm: str, length: int | None = None) -> np.ndarray:
    """Risk of each network of a single-task arm at one length, or at that of training."""
    at = list(last(runs, arm, "lengths")).index(setting(runs)[1] if length is None else length)
    risk: np.ndarray = last(runs, arm, "risk")[at, :, 0]
    return risk


def all_but_one(values: Any, *, high_is_good: bool = False) -> float:
    """What every network but the worst reaches: one start in five may stall with heads of one sign."""
    ordered = np.sort(np.asarray(values, float))
    ordered = ordered if high_is_good else ordered[::-1]
    return float(ordered[min(1, len(ordered) - 1)])


def one_sided(runs: Runs) -> int:
    """Networks with two heads that are of one sign."""
    return int((np.abs(np.sign(last(runs, "heads-2", "circuits/omega")).sum(1)) == 2).sum())


def longest(runs: Runs) -> int:
    """The longest prompts of the tests."""
    return int(last(runs, "heads-2", "lengths").max())


def off_descent(runs: Runs) -> float:
    """Risk on the longest prompts over that of debiased descent with the step that is best in training."""
    dim, length, noise = setting(runs)
    descent = debiased_gd_risk(best_step(dim, length, noise), dim, longest(runs), noise)
    return all_but_one(risk_at(runs, "heads-2", longest(runs)) / descent)


def preconditioned(runs: Runs) -> list[float]:
    """Cosine of Σ μ KQ of each network with the best preconditioner."""
    dim, length, noise = setting(runs)
    best = preconditioner(toeplitz_covariance(dim, RHO), length, noise).numpy()
    found = trained_preconditioners(runs)
    return [float((one * best).sum() / (np.linalg.norm(one) * np.linalg.norm(best))) for one in found]


def trained_preconditioners(runs: Runs) -> list[np.ndarray]:
    """Σ μ KQ on the inputs, which is what heads make of a prompt to first order, of each network."""
    dim = setting(runs)[0]
    return [(kq[:, :dim, :dim] * ov[:, 0, dim, None, None]).sum(0) for kq, ov in networks(runs, "anisotropic")]


def networks(runs: Runs, arm: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """KQ and OV of each network of an arm."""
    return list(zip(last(runs, arm, "kq"), last(runs, arm, "ov"), strict=True))


def task_risks(runs: Runs, heads: int, over: int) -> list[float]:
    """Risk of the middle network by task, over that of the middle network with another number of heads."""
    several, few = (np.median(last(runs, f"tasks-{count}", "risk")[0], axis=0) for count in (over, heads))
    return [float(one) for one in few / several]


def best_descent(runs: Runs) -> float:
    """Risk of one step of gradient descent, the best one."""
    dim, length, noise = setting(runs)
    return gd_risk(best_step(dim, length, noise, debiased=False), dim, length, noise)


CLAIMS = [
    Claim(
        id="C1-descent",
        statement="Two heads do as well as the best step of gradient descent.",
        source="Section 4; Figure on risk against heads",
        paper_value="0.2430 against 0.2407",
        quantity="risk over that of the best step, worst of five networks but one",
        measure=lambda runs: all_but_one(risk_at(runs, "heads-2") / best_descent(runs)),
        op="<=",
        threshold=1.05,
    ),
    Claim(
        id="C1-heads",
        statement="One head cannot do that.",
        source="Section 4; Figure on risk against heads",
        paper_value="0.2430 / 0.4048",
        quantity="risk of two heads over that of one, worst of five networks but one",
        measure=lambda runs: all_but_one(risk_at(runs, "heads-2") / risk_at(runs, "heads-1")),
        op="<=",
        threshold=0.65,
    ),
    Claim(
        id="C2-zero-sum",
        statement="What the two heads pass on cancels.",
        source="Section 3",
        paper_value=None,
        quantity="|sum of mu| over sum of |mu|, worst of five networks but one",
        measure=lambda runs: all_but_one(last(runs, "heads-2", "circuits/zero_sum")),
        op="<",
        threshold=0.1,
    ),
    Claim(
        id="C2-diagonal",
        statement="They compare inputs by a multiple of the identity.",
        source="Section 3",
        paper_value=None,
        quantity="off-diagonal share of KQ, the larger head, worst of five networks but one",
        measure=lambda runs: all_but_one(last(runs, "heads-2", "circuits/off_diagonal").max(1)),
        op="<",
        threshold=0.15,
    ),
    Claim(
        id="C2-labels",
        statement="They pass on labels only.",
        source="Section 3",
        paper_value=None,
        quantity="share of the label in OV, the smaller head, worst of five networks but one",
        measure=lambda runs: all_but_one(last(runs, "heads-2", "circuits/last_entry_share").min(1), high_is_good=True),
        op=">",
        threshold=0.9,
    ),
    Claim(
        id="C2-signs",
        statement="They are of opposite signs.",
        source="Section 3",
        paper_value=None,
        quantity="networks of five whose two heads have one sign",
        measure=one_sided,
        op="<=",
        threshold=1.0,
    ),
    Claim(
        id="C3",
        statement="Their answers are those of debiased gradient descent.",
        source="Section 4",
        paper_value=None,
        quantity="correlation of answers, worst of five networks but one",
        measure=lambda runs: all_but_one(last(runs, "heads-2", "correlation"), high_is_good=True),
        op=">",
        threshold=0.99,
    ),
    Claim(
        id="C4-softmax",
        statement="Trained at one length, two heads are as good as debiased descent on longer prompts.",
        source="Section 4; notebook, 100 examples",
        paper_value="0.1638 against 0.1635",
        quantity="risk over that of debiased descent at 100 examples, worst of five networks but one",
        measure=off_descent,
        op="<",
        threshold=1.1,
    ),
    Claim(
        id="C4-linear",
        statement="Linear attention, whose weights know no length, is not.",
        source="Section 4",
        paper_value=None,
        quantity="risk over that of two softmax heads at 100 examples, worst of five networks but one",
        measure=lambda runs: all_but_one(
            risk_at(runs, "linear", longest(runs)) / risk_at(runs, "heads-2", longest(runs)), high_is_good=True
        ),
        op=">",
        threshold=3.0,
    ),
    Claim(
        id="C5",
        statement="Correlated inputs are preconditioned.",
        source="Section 5",
        paper_value=None,
        quantity="cosine of the sum of mu KQ with the best preconditioner, worst of five networks but one",
        measure=lambda runs: all_but_one(preconditioned(runs), high_is_good=True),
        op=">",
        threshold=0.95,
    ),
    Claim(
        id="C6-three",
        statement="Three heads serve two tasks as well as four do.",
        source="Section 5",
        paper_value=None,
        quantity="risk with three heads over that with four, by task, middle network",
        measure=lambda runs: task_risks(runs, 3, over=4),
        op="<=",
        threshold=1.1,
    ),
    Claim(
        id="C6-two",
        statement="Two heads do not.",
        source="Section 5",
        paper_value=None,
        quantity="risk with two heads over that with four, by task, middle network",
        measure=lambda runs: task_risks(runs, 2, over=4),
        op=">",
        threshold=1.1,
    ),
]
