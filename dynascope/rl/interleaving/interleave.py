"""Fine-tuning on demonstrations between the steps of RL, for the questions that RL cannot learn from (arXiv 2506.07527).

relift = Interleaver(model, task, Demonstrations(solutions, accept=verify), batch_size=128, lr=1e-6)
train(model, relift_rl, task, optimizer, generator=generator, look=relift)
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from dynascope.losses.demonstrations import DemonstrationLoss, interleaved_sft_loss, sft_loss_from_hidden
from dynascope.rl.batch import PolicyBatch
from dynascope.rl.hidden import completion_hidden
from dynascope.rl.interleaving.demonstrations import DemoBudget, DemonstrationSource
from dynascope.rl.interleaving.hardest import Entry, HardestQuestionBuffer, gathered, hardest_questions
from dynascope.rl.interleaving.schedules import Schedule
from dynascope.rl.logits import completion_logits
from dynascope.rl.loop import Step, Task
from dynascope.rl.objective import Metrics, PolicyObjective
from dynascope.rl.rollout import sample


@runtime_checkable
class TeachableTask(Task, Protocol):
    """A task whose solutions can be turned into tokens; `Arithmetic` and `WordProblems` are such."""

    def completions(self, texts: Sequence[str], /) -> tuple[Tensor, Tensor]:
        """Tokens of completions, each with its end, padded on the right (N, T), and the mask of what is no padding."""


def prompt_of(problem: Any) -> str:
    """A problem's prompt, which names it.

    >>> prompt_of({"prompt": "1+2=", "answer": "3"})
    '1+2='
    """
    return str(problem["prompt"] if isinstance(problem, Mapping) else problem.prompt)


@dataclass(frozen=True)
class FineTuning:
    """How a batch of demonstrations is learned from."""

    entropy_coef: float = 1e-4
    """α; the scripts that were released have 1e-3."""
    reduction: str = "token"
    max_grad_norm: float = 1.0
    micro_batch: int | None = None
    """Demonstrations at a time, their gradients added up; None takes the whole batch."""
    chunk: int | None = None
    """Tokens whose logits exist at a time, which are then worked out twice; None holds all. Not for sharded models."""


def fine_tune(
    model: nn.Module,
    task: TeachableTask,
    problems: Sequence[Any],
    solutions: Sequence[str],
    optimizer: Optimizer,
    how: FineTuning = FineTuning(),
) -> dict[str, Tensor]:
    """One optimizer step on demonstrations; returns `loss`, `nll`, `entropy` and `gradient_norm`.

    Under torch.distributed every process is given the whole batch, works out its share, and gradients are summed: for models
    that are replicated (hand over what DDP wraps), and for those that FSDP2's `fully_shard` spread over all processes. Raises
    ValueError for `how.chunk` with a sharded model, whose head is nowhere whole, or one with a bias or a soft cap behind it.

    >>> fine_tune(model, Arithmetic(), [Sum(1, 2)], ["1+2=3>3$"], optimizer)
    """
    device = next(model.parameters()).device
    tokens, mask = (one.to(device) for one in task.completions(solutions))
    prompts, prompt_mask = (one.to(device) for one in task.prompts(problems))
    optimizer.zero_grad()
    told = torch.zeros(3, device=device)
    count, sharded = _num_processes(), is_sharded(model)
    head: Any = None if how.chunk is None else model.get_output_embeddings()  # type: ignore[operator]
    if head is not None and (sharded or getattr(head, "bias", None) is not None):
        raise ValueError("chunk= applies an output head that is whole and has no bias: leave it out of FineTuning")
    for rows in _shares(len(problems), how.micro_batch or len(problems), keeps_step=sharded):
        # A share that has run out goes through the model all the same, and counts for nothing.
        counted = mask[rows] if len(rows) else torch.zeros_like(mask[:1])
        rows = rows if len(rows) else torch.tensor([0])
        asked = prompts[rows], prompt_mask[rows], tokens[rows]
        settings: dict[str, Any] = {
            "entropy_coef": how.entropy_coef,
            "reduction": how.reduction,
            "num_tokens": mask.sum(),
            "num_sequences": len(problems),
        }
        if how.chunk is None:
            part = interleaved_sft_loss(completion_logits(model, *asked), tokens[rows], counted, **settings)
        else:
            hidden = completion_hidden(model, *asked)
            part = sft_loss_from_hidden(hidden, head.weight, tokens[rows], counted, chunk=how.chunk, **settings)
        # What is sharded comes back as a mean over processes.
        (part.loss * count if sharded else part.loss).backward()
        told += torch.stack([part.loss.detach(), part.nll, part.entropy])
    if count > 1:
        torch.distributed.all_reduce(told)
    if count > 1 and not sharded:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.distributed.all_reduce(parameter.grad)
    norm: Tensor = nn.utils.clip_grad_norm_(model.parameters(), how.max_grad_norm)
    optimizer.step()
    loss, nll, entropy = told
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return {"loss": loss, "nll": nll, "entropy": entropy, "gradient_norm": whole}


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 keeps a part of the model's weights in each process.

    >>> is_sharded(nn.Linear(2, 2))
    False
    """
    return any(isinstance(one, FSDPModule) for one in model.modules())


def _shares(num: int, size: int, *, keeps_step: bool) -> list[Tensor]:
    """Row numbers of this process's micro-batches; with `keeps_step` as many as of any other, empty ones at the end."""
    own = torch.arange(num)[_rank() :: _num_processes()]
    shares = list(own.split(size)) if len(own) else []
    most = -(-num // _num_processes())
    return shares + [own[:0]] * (-(-most // size) - len(shares)) if keeps_step else shares


def _rank() -> int:
    return torch.distributed.get_rank() if _num_processes() > 1 else 0


def _num_processes() -> int:
    is_there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if is_there else 1


class Interleaver:
    """Collects the hardest questions and fine-tunes on their demonstrations when a batch is there; goes in as `look=`.

    After the policy's own update, at most one step of fine-tuning follows, whatever waits. Its optimizer is its own (Adam's
    state of one loss says little of the other's), unless `optimizer` names the policy's. Where no demonstration comes,
    the run is plain RL, bit for bit.

    Args:
        task: Turns solutions into tokens; those longer than its `max_new_tokens`, end included, are left out, never cut.
        batch_size: Demonstrations a step (the paper's 128).
        schedule: A row of `rl/interleaving/schedules.py`, by name or made by hand.
        lr: Of the own optimizer, AdamW (the paper's 1e-6).
        optimizer: The policy's, whose state then serves both losses, or one of yours: with `AdamW8bit` of torchao or bitsandbytes
            the second state takes 2 bytes a weight instead of 8.
        buffer: One of your own; the default holds up to 64 batches and gives the newest first.
        recheck: Before a batch is used, so many answers to each of its questions; those solved by now are discarded. 0: none.
            With several processes the first one's answers count. Not for sharded models, of which none can answer alone.
        name: What a problem is called in the buffer and by the source; its prompt by default.

    Raises ValueError for a recheck with a sharded model.

    >>> relift = Interleaver(model, Arithmetic(), Demonstrations(lambda problem: problem.completion), batch_size=16, lr=1e-3)
    >>> train(model, preset("grpo"), Arithmetic(), optimizer, generator=generator, look=relift)
    >>> relift.budget.used
    """

    def __init__(
        self,
        model: nn.Module,
        task: TeachableTask,
        source: DemonstrationSource,
        *,
        batch_size: int = 128,
        schedule: str | Schedule = "relift",
        lr: float = 1e-6,
        optimizer: Optimizer | None = None,
        how: FineTuning = FineTuning(),
        buffer: HardestQuestionBuffer | None = None,
        recheck: int = 0,
        name: Callable[[Any], Hashable] = prompt_of,
        seed: int = 0,
    ) -> None:
        if recheck and is_sharded(model):
            raise ValueError("recheck samples answers, which a sharded model cannot do alone: set recheck=0")
        self.model, self.task, self.source, self.how, self.recheck = model, task, source, how, recheck
        self.schedule = Schedule.named(schedule) if isinstance(schedule, str) else schedule
        self.optimizer = AdamW(model.parameters(), lr=lr) if optimizer is None else optimizer
        self.buffer = HardestQuestionBuffer(batch_size, max_size=64 * batch_size) if buffer is None else buffer
        self.budget = DemoBudget(available=source.available)
        self.num_too_long = self.num_solved_meanwhile = 0
        self._name, self._generator = name, torch.Generator().manual_seed(seed)
        # Its own, as only the first process draws from it.
        self._of_recheck = torch.Generator().manual_seed(seed)

    def __call__(self, step: Step) -> dict[str, Tensor | float]:
        """What follows a step of RL: take in its answers, fine-tune if it is time. Returns what `step` returns."""
        assert step.drawn_correct is not None
        everyone = gathered(list(zip(step.drawn, step.drawn_correct.tolist(), strict=True)))
        self.see([problem for problem, _ in everyone], [is_right for _, is_right in everyone])
        return self.step(step.number)

    def see(self, problems: Sequence[Any], correct: Sequence[bool]) -> None:
        """Take in answers, one problem a completion in any order; asks for the demonstrations of those that enter.

        With several processes, all must be shown the same.
        """
        named = {self._name(problem): problem for problem in problems}
        place = {name: number for number, name in enumerate(named)}
        rows = torch.tensor([place[self._name(problem)] for problem in problems])
        right = torch.bincount(rows, torch.tensor(correct, dtype=torch.float32), minlength=len(named))
        accuracy = right.float() / torch.bincount(rows, minlength=len(named))
        entering = self.schedule.entering(list(named), accuracy, self._generator)
        self._request({name: named[name] for name in entering})

    def step(self, number: int) -> dict[str, Tensor | float]:
        """Let in demonstrations that have become ready, and fine-tune if the schedule says so and there are some.

        Returns `demonstrations/step` (1 where a step was taken), `/waiting`, `/used` and `/distinct`; how many were refused so
        far, `/missing`, `/wrong`, `/failed` and `/too_long`; and of a step `/loss`, `/nll`, `/entropy` and `/gradient_norm`.
        """
        self.budget.lap("rl")
        self._take_in(number)
        batch = self._batch(number) if self.schedule.is_due(number, self.buffer.ready(number)) else []
        told: dict[str, Tensor | float] = {}
        if batch:
            with self.budget.phase("fine-tuning"):
                problems, solutions = zip(*(entry.value for entry in batch), strict=True)
                told = {**fine_tune(self.model, self.task, problems, solutions, self.optimizer, self.how)}
            self.budget.spend([entry.question for entry in batch])
        self.budget.lap(None)
        told |= {"step": float(bool(batch)), "waiting": float(len(self.buffer))}
        told |= {"used": float(self.budget.used), "distinct": float(self.budget.distinct)}
        refused = self.source.refused
        told |= {name: float(getattr(refused, name)) for name in ("missing", "wrong", "failed")}
        told["too_long"] = float(self.num_too_long)
        return {f"demonstrations/{name}": value for name, value in told.items()}

    def fine_tune_only(self, number: int, generator: torch.Generator) -> dict[str, Tensor | float]:
        """One step of plain fine-tuning, on problems drawn from the task: the schedule `always`.

        >>> for number in range(100):
        ...     sft.fine_tune_only(number, generator)
        """
        self._request({self._name(one): one for one in self.task.draw(self.buffer.batch_size, generator)})
        return self.step(number)

    def _request(self, problems: Mapping[Hashable, Any]) -> None:
        if _rank() == 0:  # a teacher's answers come to all through one
            self.source.request(problems)

    def _take_in(self, number: int) -> None:
        for name, problem, solution in gathered(self.source.collect() if _rank() == 0 else []):
            if self.task.completions([solution])[0].shape[1] > self.task.max_new_tokens:
                self.num_too_long += 1
            else:
                self.buffer.put([Entry(name, (problem, solution), number)])

    def _batch(self, number: int) -> list[Entry]:
        size, batch = self.buffer.batch_size, list[Entry]()
        while len(batch) < size and len(self.buffer):
            taken = self.buffer.pop(number, min(size - len(batch), len(self.buffer)))
            batch += self._still_hard(taken) if self.recheck else taken
        if len(batch) < size and self.schedule.every is None:
            self.buffer.put(batch)
            return []
        return batch

    def _still_hard(self, entries: Sequence[Entry]) -> list[Entry]:
        # Answers differ between processes, and all must go on with the same entries.
        still = set(gathered(self._unsolved(entries) if _rank() == 0 else []))
        self.num_solved_meanwhile += len(entries) - len(still)
        return [one for one in entries if one.question in still]

    @torch.no_grad()
    def _unsolved(self, entries: Sequence[Entry]) -> list[Hashable]:
        problems = [entry.value[0] for entry in entries for _ in range(self.recheck)]
        device = next(self.model.parameters()).device
        prompts, mask = (one.to(device) for one in self.task.prompts(problems[:: self.recheck]))
        rollout = sample(
            self.model,
            prompts,
            mask,
            num_samples=self.recheck,
            max_new_tokens=self.task.max_new_tokens,
            stop_token=self.task.stop_token,
            pad_token=self.task.pad_token,
            generator=self._of_recheck if device.type == "cpu" else None,
        )
        right = torch.tensor(self.task.are_right(problems, self.task.texts(rollout.tokens))).view(-1, self.recheck)
        return hardest_questions([one.question for one in entries], right.float().mean(1), self._threshold)

    @property
    def _threshold(self) -> float:
        return 0.0 if self.schedule.threshold is None else self.schedule.threshold

    def state_dict(self) -> dict[str, Any]:
        """The buffer, what was counted, and the optimizer's state, for a checkpoint; what a teacher still owes is asked anew."""
        return {
            "buffer": self.buffer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self._generator.get_state(),
            "recheck": self._of_recheck.get_state(),
            "budget": self.budget.state_dict(),
            "counts": [self.num_too_long, self.num_solved_meanwhile],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.buffer.load_state_dict(state["buffer"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"])
        self._of_recheck.set_state(state["recheck"])
        self.budget.load_state_dict(state["budget"])
        self.num_too_long, self.num_solved_meanwhile = state["counts"]


@dataclass(frozen=True)
class WithDemonstrations(PolicyObjective):
    """A policy objective whose loss has the fine-tuning loss of a fresh batch of demonstrations added at every step.

    The baseline that ReLIFT is compared with as "RL with SFT loss".

    >>> objective = WithDemonstrations.of(preset("grpo"), demonstrations, weight=0.1)
    """

    demonstrations: Callable[[], DemonstrationLoss] | None = None
    """Gives the loss of the next batch, with its gradient."""
    weight: float = 1.0

    @classmethod
    def of(
        cls, objective: PolicyObjective, demonstrations: Callable[[], DemonstrationLoss], weight: float = 1.0
    ) -> "WithDemonstrations":
        """The same slots, and the loss to be added."""
        slots = {one.name: getattr(objective, one.name) for one in fields(objective)}
        return cls(**slots, demonstrations=demonstrations, weight=weight)

    def loss(self, batch: PolicyBatch) -> tuple[Tensor, Metrics]:
        """Both losses; adds the metric `demonstrations_nll`."""
        loss, metrics = super().loss(batch)
        if self.demonstrations is None:
            return loss, metrics
        extra = self.demonstrations()
        return loss + self.weight * extra.loss, {**metrics, "demonstrations_nll": extra.nll}
