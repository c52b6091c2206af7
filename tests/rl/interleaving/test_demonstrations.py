"""Demonstrations are looked up or asked for, verified, and counted."""

import threading
import time

import pytest

from dynascope.rl.interleaving.demonstrations import DemoBudget, Demonstrations, DemonstrationSource, Teacher
from dynascope.rl.tasks.arithmetic import Sum


def is_right(question: Sum, solution: str) -> bool:
    return question.check(solution).is_answer_right


PROBLEMS = {one.prompt: one for one in (Sum(1, 2), Sum(3, 4), Sum(5, 6))}


def test_only_verified_solutions_come_back_and_each_once() -> None:
    source = Demonstrations({"1+2=": "1+2=3>3$", "3+4=": "3+4=7>8$"}, is_right)
    assert isinstance(source, DemonstrationSource)
    source.request(PROBLEMS)
    assert source.collect() == [("1+2=", Sum(1, 2), "1+2=3>3$")]
    assert source.collect() == []
    assert (source.refused.wrong, source.refused.missing, source.available) == (1, 1, 2)


def test_rows_of_a_dataset_and_functions_serve_too() -> None:
    rows = [{"q": "1+2=", "s": "1+2=3>3$"}]
    source = Demonstrations.from_rows(rows, question="q", solution="s")
    source.request({"1+2=": Sum(1, 2)})
    assert source.collect()[0][2] == "1+2=3>3$"
    made = Demonstrations(lambda problem: problem.completion, is_right)
    made.request(PROBLEMS)
    assert len(made.collect()) == 3
    assert made.available is None


def wait_for(teacher: Teacher) -> list[str]:
    found = []
    deadline = time.monotonic() + 20
    while teacher.num_asked and time.monotonic() < deadline:
        found += [name for name, *_ in teacher.collect()]
        time.sleep(0.005)
    return sorted(map(str, found))


def test_a_teacher_is_not_waited_for_nor_asked_twice() -> None:
    may_answer, asked = threading.Event(), []

    def solve(problem: Sum) -> str:
        asked.append(problem)
        may_answer.wait(20)
        return problem.completion

    teacher = Teacher(solve, is_right)
    teacher.request(PROBLEMS)
    teacher.request(PROBLEMS)
    assert teacher.collect() == []
    assert teacher.num_asked == 3
    may_answer.set()
    assert wait_for(teacher) == sorted(PROBLEMS)
    assert len(asked) == 3
    teacher.close()


def test_a_teacher_may_be_asynchronous_wrong_silent_or_broken() -> None:
    async def solve(problem: Sum) -> str | None:
        if problem.first == 5:
            raise RuntimeError("out of credit")
        return None if problem.first == 3 else problem.completion

    teacher = Teacher(solve, is_right)
    teacher.request({**PROBLEMS, "9+9=": Sum(9, 9)})
    assert wait_for(teacher) == ["1+2=", "9+9="]
    assert (teacher.refused.failed, teacher.refused.missing) == (1, 1)
    assert teacher.refused.last_error == "RuntimeError: out of credit"
    wrong = Teacher(lambda problem: "1>1$", is_right)
    wrong.request(PROBLEMS)
    assert wait_for(wrong) == []
    assert wrong.refused.wrong == 3


def test_the_budget_counts_uses_and_distinct_questions_apart() -> None:
    budget = DemoBudget(available=10)
    budget.spend(["a", "b"])
    budget.spend(["b", "c"])
    assert (budget.used, budget.distinct, budget.steps, budget.share) == (4, 3, 2, 0.3)
    assert DemoBudget().share is None
    with budget.phase("rl"):
        time.sleep(0.02)
    assert budget.seconds["rl"] == pytest.approx(0.02, abs=0.5)
    assert budget.seconds["rl"] >= 0.02


def test_a_silent_teacher_is_counted_and_asked_again() -> None:
    never, asked = threading.Event(), []

    def solve(problem: Sum) -> str:
        asked.append(problem)
        never.wait()
        return problem.completion

    teacher = Teacher(solve, is_right, num_workers=1, timeout=0.05)
    for times in (1, 2):
        teacher.request({"1+2=": Sum(1, 2)})
        assert wait_for(teacher) == []
        assert (teacher.refused.failed, len(asked)) == (times, times)
    assert teacher.refused.last_error == "TimeoutError: no answer within 0.05 seconds"
    never.set()
