"""Reinforcement learning as studies run it: the loop of `rl/`, with what it saw and what the policy can do put on record."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynascope.record import RecordWriter, Series
from dynascope.rl.loop import LoopConfig, Step, Task, draw_rollout, train
from dynascope.rl.objective import PolicyObjective
from dynascope.rl.reasoning.pass_at_k import cot_pass_at_k, pass_at_k
from dynascope.rl.rollout import score
from dynascope.rl.scoring import score_by_length
from dynascope.rl.tasks.base_model import BaseModel, base_model
from dynascope.studies.harness.study import StudyRecord

_TEST_SEED = 2**31


@dataclass(frozen=True)
class Evaluation:
    """How often a policy is tested, and on how much."""

    num_problems: int = 128
    num_samples: int = 16
    every: int = 10
    """Training steps from one test to the next; the start and the end are always tested."""
    measures_entropy: bool = False
    """Whether the entropy of a token is told too, which takes a forward pass over the completions."""

    def __post_init__(self) -> None:
        if min(self.num_problems, self.num_samples, self.every) < 1:
            raise ValueError("num_problems, num_samples and every must be at least 1")

    @property
    def ks(self) -> list[int]:
        """The powers of two up to `num_samples`."""
        return [2**power for power in range(self.num_samples.bit_length())]


def reinforce(
    record: RecordWriter,
    model: nn.Module,
    objective: PolicyObjective,
    task: Task,
    loop: LoopConfig = LoopConfig(),  # noqa: B008 frozen
    *,
    lr: float,
    seed: int,
    evaluation: Evaluation | None = Evaluation(),
    start: nn.Module | None = None,
    test_task: Task | None = None,
    look: Callable[[Step], object] = lambda step: None,
    **more: Any,
) -> None:
    """Train `model` in place with AdamW by `rl.loop.train`, to which `more` goes, and record every step.

    Recorded at each step: what `watch_rollout` and the objective tell, `gradient_norm` and `rollout/tokens_per_second` (of
    the whole step, tests not counted). Tests see the same problems whenever they are asked, and draw from a generator of
    their own, so that they change nothing in training; their step is the number of steps taken before. Their problems come
    from `test_task`, or from the task itself, whose problems are drawn at random. `evaluation=None` leaves tests to the caller.

    - `test/correct`: share of right answers at the training temperature.
    - `test/pass_at_k` (k): unbiased, over powers of two.
    - `test/length`: mean tokens; `test/truncated`: share at the length limit.
    - `test/entropy`: of a token of its own completions, in nats, if asked for. Rollouts differ between objectives in what was
      drawn and kept; tests do not.
    - `test/chain`, `test/cot_pass_at_k` (k): right chains of thought, where the task can check them (`are_chains_right`).
    - `test/kl_start`: with `start`, how far the policy went from that model: mean log-ratio of its own tokens, in nats.

    >>> reinforce(record, model, preset("dapo"), Arithmetic(), LoopConfig(num_steps=20), lr=3e-4, seed=0)
    """
    if evaluation is not None:
        declare(record, evaluation)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)

    def test(taken: int) -> None:
        if evaluation is not None and (taken % evaluation.every == 0 or taken == loop.num_steps):
            record.add(taken, measure_policy(model, test_task or task, evaluation, loop.temperature, start))

    test(0)
    started = time.perf_counter()

    def see(step: Step) -> None:
        nonlocal started
        seconds = time.perf_counter() - started
        speed = {"rollout/tokens_per_second": float(step.rollout.mask.sum()) / seconds}
        record.add(step.number, {**step.metrics, **speed})
        look(step)
        test(step.number + 1)
        started = time.perf_counter()

    train(model, objective, task, optimizer, loop, generator=generator, look=see, **more)


def declare(record: RecordWriter, evaluation: Evaluation) -> None:
    """State the series of tests, whose axis k has labels."""
    told = {"test/correct": "Share of right answers.", "test/truncated": "Share at the length limit."}
    told |= {"test/length": "Mean length of a completion.", "test/chain": "Share with a right chain of thought."}
    told |= {"test/kl_start": "How far the policy went from the start model, a token."}
    told |= {"test/entropy": "Mean entropy of a token."}
    units = {"test/length": "tokens", "test/kl_start": "nats", "test/entropy": "nats"}
    for name, description in told.items():
        record.declare(Series(name, unit=units.get(name, ""), description=description))
    for name, of in (("test/pass_at_k", "answers is"), ("test/cot_pass_at_k", "chains and their answer are")):
        record.declare(Series(name, ("k",), "", f"Chance that one of k {of} right.", {"k": evaluation.ks}))


def measure_policy(
    model: nn.Module,
    task: Task,
    evaluation: Evaluation = Evaluation(),
    temperature: float = 1.0,
    start: nn.Module | None = None,
) -> dict[str, Tensor | float]:
    """What a policy can do, on the same problems and with the same random numbers every time; see `reinforce`.

    >>> measure_policy(model, Arithmetic())["test/correct"]
    """
    generator = torch.Generator().manual_seed(_TEST_SEED)
    amount = LoopConfig(
        num_prompts=evaluation.num_problems, num_samples=evaluation.num_samples, temperature=temperature
    )
    problems, rollout = draw_rollout(model, task, amount, generator)
    completions = task.texts(rollout.tokens)
    correct = torch.tensor(task.are_right(problems, completions)).view(-1, evaluation.num_samples)
    measured: dict[str, Tensor | float] = {
        "test/correct": correct.float().mean(),
        "test/pass_at_k": pass_at_k(evaluation.num_samples, correct.sum(1), evaluation.ks).mean(0),
        "test/length": rollout.lengths.float().mean(),
        "test/truncated": rollout.is_truncated.float().mean(),
    }
    if evaluation.measures_entropy:
        with torch.no_grad():
            entropy = score_by_length(model, rollout, {"entropy"})["entropy"]
        measured["test/entropy"] = (entropy * rollout.mask).sum() / rollout.mask.sum()
    if hasattr(task, "are_chains_right"):
        chains = torch.tensor(task.are_chains_right(problems, completions)).view(correct.shape)
        measured["test/chain"] = chains.float().mean()
        both = (correct & chains).sum(1)
        measured["test/cot_pass_at_k"] = cot_pass_at_k(evaluation.num_samples, both, evaluation.ks).mean(0)
    if start is not None:
        with torch.no_grad():
            drift = rollout.behaviour_log_probs - score(start, rollout)["log_probs"]
        measured["test/kl_start"] = (drift * rollout.mask).sum() / rollout.mask.sum()
    return measured


def measure_greedy(model: nn.Module, task: Task, evaluation: Evaluation = Evaluation()) -> Tensor | float:
    """Share of right answers where the likeliest token is always taken, on the problems of `measure_policy`.

    >>> record.add(0, {"greedy/correct": measure_greedy(model, Arithmetic(), Evaluation(512))})
    """
    return measure_policy(model, task, Evaluation(evaluation.num_problems, 1), temperature=0.0)["test/correct"]


def start_model(record: StudyRecord, spec: BaseModel, seed: int) -> nn.Module:
    """A copy of the base model of a seed, taught once and kept beside the studies for all of them.

    >>> model = start_model(record, BaseModel(Arithmetic((2,))), seed)
    """
    return base_model(spec, seed, record.folder.parents[3] / "models")
