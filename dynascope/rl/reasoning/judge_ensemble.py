"""Several verdicts on a chain of thought, and a rule that joins them (2506.14245, section 3 and appendix A.6)."""

import hashlib
import json
import reprlib
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dynascope.rl.reasoning.judges import JUDGE_PROMPT, Judge, JudgeServerError, Solution, Verdict, judge_name

Rule = Literal["any", "majority", "all"]
RULES: tuple[Rule, ...] = ("any", "majority", "all")


def decide(
    yes: Int[Tensor, " N"], no: Int[Tensor, " N"], invalid: Int[Tensor, " N"], n: int, rule: str
) -> tuple[Bool[Tensor, " N"], Bool[Tensor, " N"]]:
    """Whether the rule says yes after these verdicts out of n, and whether the verdicts still to come can change that.

    `any` wants one yes, `all` wants n, `majority` more yes than no, so that a tie fails; a verdict that is invalid is
    neither. For each solution any >= majority >= all.
    Raises ValueError for another rule.

    >>> decide(torch.tensor([2]), torch.tensor([0]), torch.tensor([0]), 3, "majority")
    (tensor([True]), tensor([True]))
    """
    left = n - yes - no - invalid
    if rule == "any":
        return yes > 0, (yes > 0) | (left == 0)
    if rule == "all":
        return yes == n, (yes == n) | (no + invalid > 0) | (left == 0)
    if rule == "majority":
        return yes > no, (yes > no + left) | (yes + left <= no) | (left == 0)
    raise ValueError(f"rule is any, majority or all, not {rule!r}")


@dataclass(frozen=True, eq=False)
class Judgement:
    """How many verdicts of each kind each solution got, what the rule made of them, and how many calls that took.

    `is_judged` is False where the ensemble had no need to ask, as the answer was wrong; there `is_correct` is False.
    """

    is_correct: Bool[Tensor, " N"]
    is_judged: Bool[Tensor, " N"]
    yes: Int[Tensor, " N"]
    no: Int[Tensor, " N"]
    invalid: Int[Tensor, " N"]
    num_calls: int
    n: int

    def by_rule(self, rule: str) -> Bool[Tensor, " N"]:
        """What another rule makes of the same verdicts.

        Raises ValueError when verdicts were left out that this rule would have needed.
        """
        says, is_settled = decide(self.yes, self.no, self.invalid, self.n, rule)
        if not bool((is_settled | ~self.is_judged).all()):
            raise ValueError(f"the ensemble stopped before {rule!r} was settled; build it with early_stop=False")
        return says & self.is_judged


class JudgeEnsemble:
    """Asks a judge n times about each chain of thought and joins the verdicts.

    Args:
        judge: Called with the solutions that still need a verdict. It should sample, or its n verdicts are one.
        n: Verdicts a solution.
        aggregate: The rule: "any", "majority" or "all".
        only_if_answer_correct: Ask only where the answer is right, which is all that CoT-Pass@K counts. False where the
            chains of wrong answers matter too, as for `estimate_logic_prior`.
        early_stop: Ask no more once the rule is settled. False where all three rules are wanted from the same verdicts.
        cache: Where verdicts are kept from call to call: a dict, or anything like one with strings (`dbm` on disk). Several
            judges may share one: verdicts are kept under the judge, its prompt and the solution.
        name: What the judge is called there; by default its own `name` if it has one, else that of its function or class, so
            that judges of your own that differ in more than that want one.

    Where a server fails, the verdicts that came are kept, and a further call asks for the others alone. Identical solutions
    are judged once. Raises ValueError for n < 1 or another rule.

    >>> ensemble = JudgeEnsemble(StepChecker(), n=1)
    >>> ensemble([Solution("2 + 3 * 4?", "3 * 4 = 12\\n2 + 12 = 14", "14")], torch.tensor([True])).is_correct
    tensor([True])
    """

    def __init__(
        self,
        judge: Judge,
        n: int = 3,
        aggregate: Rule = "majority",
        *,
        only_if_answer_correct: bool = True,
        early_stop: bool = True,
        cache: MutableMapping[str, str] | None = None,
        name: str | None = None,
    ) -> None:
        if n < 1:
            raise ValueError(f"n={n} verdicts cannot be asked for; n must be at least 1")
        if aggregate not in RULES:
            raise ValueError(f"aggregate is any, majority or all, not {aggregate!r}")
        self.judge, self.n, self.aggregate = judge, n, aggregate
        self.only_if_answer_correct, self.early_stop = only_if_answer_correct, early_stop
        self._cache: MutableMapping[str, str] = {} if cache is None else cache
        self._name = name or str(getattr(judge, "name", None) or judge_name(judge))

    def __call__(self, solutions: Sequence[Solution], answer_correct: Bool[Tensor, " N"]) -> Judgement:
        """Raises ValueError when the judge returns another number of verdicts than it was given solutions, or something else."""
        if len(solutions) != len(answer_correct):
            raise ValueError(
                f"{len(solutions)} solutions and {len(answer_correct)} answers; give one answer a solution"
            )
        is_judged = answer_correct.cpu().clone() if self.only_if_answer_correct else torch.ones(len(solutions)).bool()
        places: dict[Solution, int] = {}
        index = torch.tensor([places.setdefault(one, len(places)) for one in solutions], dtype=torch.long)
        distinct = list(places)
        counts = torch.zeros(3, len(distinct), dtype=torch.long)
        is_open = torch.zeros(len(distinct), dtype=torch.bool)
        is_open[index[is_judged]] = True
        num_calls = 0
        for turn in range(self.n):
            asked = is_open.nonzero()[:, 0].tolist()
            if not asked:
                break
            verdicts, calls = self._verdicts([distinct[place] for place in asked], turn)
            num_calls += calls
            counts[torch.tensor([_KINDS.index(one) for one in verdicts]), torch.tensor(asked)] += 1
            if self.early_stop:
                is_open &= ~decide(counts[0], counts[1], counts[2], self.n, self.aggregate)[1]
        yes, no, invalid = counts[:, index] * is_judged
        says, _ = decide(yes, no, invalid, self.n, self.aggregate)
        return Judgement(says & is_judged, is_judged, yes, no, invalid, num_calls, self.n)

    def _verdicts(self, solutions: Sequence[Solution], turn: int) -> tuple[list[str], int]:
        keys = [f"{_hash(self._name, one)}:{turn}" for one in solutions]
        unknown = [place for place, key in enumerate(keys) if key not in self._cache]
        if unknown:
            try:
                told: Any = self.judge([solutions[place] for place in unknown])
            except JudgeServerError as error:
                self._cache.update({keys[unknown[place]]: _KIND_OF[one] for place, one in error.told.items()})
                raise
            try:
                kinds = [_KIND_OF[verdict] for verdict in (told.tolist() if isinstance(told, Tensor) else told)]
            except (TypeError, KeyError):
                raise ValueError(
                    f"the judge gave {reprlib.repr(told)}, where True, False or None is wanted of each solution; "
                    "TextJudge reads verdicts out of texts"
                ) from None
            if len(kinds) != len(unknown):
                raise ValueError(
                    f"the judge gave {len(kinds)} verdicts for {len(unknown)} solutions; it must give one each"
                )
            for place, kind in zip(unknown, kinds, strict=True):
                self._cache[keys[place]] = kind
        kept: list[str | bytes] = [self._cache[key] for key in keys]
        return [one.decode() if isinstance(one, bytes) else one for one in kept], len(unknown)


_KINDS = ("yes", "no", "invalid")
_KIND_OF: dict[Verdict, str] = {True: "yes", False: "no", None: "invalid"}


def _hash(judge: str, solution: Solution) -> str:
    content = json.dumps([judge, JUDGE_PROMPT, solution.question, solution.reasoning, solution.reference])
    return hashlib.sha256(content.encode()).hexdigest()
