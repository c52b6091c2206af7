"""The buffer of hardest questions: its arithmetic, its orders, and that it can be put back."""

import subprocess
import sys
from collections.abc import Hashable, Sequence
from pathlib import Path

import pytest
import torch

from dynascope.rl.interleaving.hardest import Entry, HardestQuestionBuffer, hardest_questions
from dynascope.rl.interleaving.schedules import Schedule


def filled(buffer: HardestQuestionBuffer, questions: Sequence[Hashable], step: int = 0) -> HardestQuestionBuffer:
    buffer.put([Entry(question, step=step) for question in questions])
    return buffer


def names(entries: Sequence[Entry]) -> list[object]:
    return [entry.question for entry in entries]


def test_a_batch_is_due_exactly_when_it_is_full() -> None:
    buffer = HardestQuestionBuffer(4)
    fired, left = [], []
    for step, count in enumerate((3, 3, 0, 5, 1), 1):
        accuracy = torch.zeros(count + 2)
        accuracy[count:] = 1 / 8  # two questions more that some answer solves
        filled(buffer, hardest_questions([f"{step}-{number}" for number in range(count + 2)], accuracy), step)
        if buffer.ready(step):
            fired.append(step)
            buffer.pop(step)
        left.append(len(buffer))
    assert fired == [2, 4, 5]
    assert left == [3, 2, 2, 3, 0]


def test_an_empty_buffer_is_not_ready_and_says_what_is_missing() -> None:
    buffer = HardestQuestionBuffer(2)
    assert not buffer.ready()
    with pytest.raises(ValueError, match="holds 0 questions of the 2"):
        buffer.pop()


@pytest.mark.parametrize(("policy", "expected"), [("newest", ["e", "d"]), ("fifo", ["a", "b"])])
def test_orders(policy: str, expected: list[str]) -> None:
    buffer = filled(HardestQuestionBuffer(2, policy=policy), "abcde")
    assert names(buffer.pop()) == expected
    assert len(buffer) == 3


def test_a_random_sample_takes_each_equally_often() -> None:
    taken = [
        question
        for seed in range(300)
        for question in names(filled(HardestQuestionBuffer(2, policy="random", seed=seed), "abcd").pop())
    ]
    for question in "abcd":
        assert taken.count(question) == pytest.approx(150, abs=35)


def test_old_entries_go_and_so_do_those_beyond_the_size() -> None:
    buffer = filled(HardestQuestionBuffer(2, max_age=3), "ab", step=0)
    filled(buffer, "c", step=2)
    assert buffer.ready(3)
    assert not buffer.ready(4)
    assert (len(buffer), buffer.num_dropped) == (1, 2)
    small = filled(HardestQuestionBuffer(2, max_size=3), "abcde")
    assert names(small.pop()) == ["e", "d"]
    assert small.num_dropped == 2


def test_a_question_that_is_there_is_renewed() -> None:
    assert names(filled(HardestQuestionBuffer(3), "abca").pop()) == ["a", "c", "b"]
    assert len(filled(HardestQuestionBuffer(3, dedup=False), "abca")) == 4


@pytest.mark.parametrize("policy", ["newest", "fifo", "random"])
def test_put_back_it_pops_the_same(policy: str) -> None:
    buffer = filled(HardestQuestionBuffer(2, policy=policy, seed=3), "abcdefgh")
    buffer.pop()
    other = HardestQuestionBuffer(2, policy=policy)
    other.load_state_dict(buffer.state_dict())
    assert [names(buffer.pop()) for _ in range(3)] == [names(other.pop()) for _ in range(3)]


def test_hardness_is_of_correctness_and_has_a_threshold() -> None:
    assert hardest_questions(["a", "b", "c"], torch.tensor([0.0, 0.25, 0.5]), 0.25) == ["a", "b"]
    with pytest.raises(ValueError, match="2 questions for 1 rows"):
        hardest_questions(["a", "b"], torch.tensor([0.0]))


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"batch_size": 3, "max_size": 2}, {"batch_size": 1, "policy": "lifo"}]
)
def test_impossible_buffers_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must be|policy is"):
        HardestQuestionBuffer(**wrong)  # type: ignore[arg-type]


def test_schedules_enter_what_their_row_says() -> None:
    questions, accuracy = list("abcdef"), torch.tensor([0.0, 0.0, 0.125, 0.5, 0.875, 1.0])

    def entering(name: str) -> list[object]:
        return list(Schedule.named(name).entering(questions, accuracy, torch.Generator().manual_seed(0)))

    assert entering("relift") == ["a", "b"]
    assert entering("threshold(0.125)") == ["a", "b", "c"]
    assert entering("all") == entering("uniform(8)") == questions
    assert entering("never") == []
    random = entering("random")
    assert len(random) == 2
    assert set(random) <= set("cdef")


def test_schedules_are_due_when_their_row_says() -> None:
    def due(name: str, is_full: bool = False) -> list[int]:
        return [step for step in range(16) if Schedule.named(name).is_due(step, is_full)]

    assert due("relift") == due("never") == due("never", True) == []
    assert due("relift", True) == due("all") == list(range(16))
    assert due("uniform(8)") == [7, 15]
    assert not Schedule.named("always").has_rl
    for name in ("sometimes", "uniform(0)", "threshold(2)"):
        with pytest.raises(ValueError, match=r"no schedule|at least 1"):
            Schedule.named(name)


def test_all_processes_hold_the_same_buffer(tmp_path: Path) -> None:
    script = Path(__file__).with_name("distributed_interleave.py")
    command = [sys.executable, str(script), str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    for one in ranks:
        _, errors = one.communicate(timeout=240)
        assert one.returncode == 0, errors[-2000:]
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2))
    assert first["popped"] == second["popped"] == ["1-b", "1-a", "0-b"]
    # Each worked on its share of the demonstrations, and both took the step that one process takes with all of them.
    torch.testing.assert_close(first["after"], second["after"], rtol=0, atol=0)
    torch.testing.assert_close(first["after"], first["alone"], rtol=1e-5, atol=1e-7)
    assert first["loss"] == pytest.approx(first["loss_alone"], rel=1e-5)
    # So they do where each holds a part of the weights, one of them with fewer passes.
    for one in (first, second):
        torch.testing.assert_close(one["sharded"], first["alone"], rtol=1e-5, atol=1e-7)
        assert one["loss_sharded"] == pytest.approx(first["loss_alone"], rel=1e-5)
        assert "set recheck=0" in one["refused"]
        assert one["kept"] == first["kept"]
        assert len(one["kept"]) == 2
        assert one["used"] == one["resumed"] == 3
        assert one["moments"][0].abs().sum() > 0
        assert torch.equal(*one["moments"])
