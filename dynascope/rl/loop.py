"""The loop of reinforcement learning on verifiable rewards, for one machine and for studies: rollout, reward, objective, step.

Everything is a function that can be called alone; `train` is only their order.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim import Optimizer

from dynascope.rl.advantages import penalised_rewards, returns_to_go
from dynascope.rl.batch import PolicyBatch
from dynascope.rl.critic import LinearCritic
from dynascope.rl.distillation import solved
from dynascope.rl.monitors import watch_advantages, watch_rollout
from dynascope.rl.objective import Metrics, PolicyObjective
from dynascope.rl.rollout import Rollout, sample, score, unembedding
from dynascope.rl.scoring import score_by_length
from dynascope.rl.tasks.rewards import Reward, evaluate_rewards
from dynascope.rl.teachers import Teacher, TeacherScorer, check_teacher, check_tokenizer, check_vocabulary

_SCORED = frozenset({"entropy", "logits", "hidden", "unembedding"})
_CHECKED = 8
"""Completions that tell whether a teacher teaches."""


@runtime_checkable
class Task(Protocol):
    """Where prompts come from, and how completions are read; `Arithmetic` and `WordProblems` are such."""

    @property
    def stop_token(self) -> int: ...

    @property
    def pad_token(self) -> int: ...

    @property
    def max_new_tokens(self) -> int: ...

    def draw(self, num: int, generator: torch.Generator) -> Sequence[Any]:
        """Problems at random."""

    def prompts(self, problems: Sequence[Any], /) -> tuple[Tensor, Tensor]:
        """Tokens padded on the left (N, P), and the mask of what is no padding."""

    def texts(self, tokens: Tensor, /) -> list[str]:
        """What completions say."""

    def are_right(self, problems: Sequence[Any], completions: Sequence[str], /) -> list[bool]:
        """Whether each answer is right, whatever the reward."""


@dataclass(frozen=True)
class LoopConfig:
    """How much is sampled and how often the policy steps on it."""

    num_steps: int = 80
    """Rollouts."""
    num_prompts: int = 40
    """A rollout."""
    num_samples: int = 8
    """Completions a prompt."""
    num_minibatches: int = 2
    """Optimizer steps a pass over the rollout."""
    num_passes: int = 1
    temperature: float = 1.0
    max_grad_norm: float = 1.0
    reward_time_limit: float | None = 60.0
    """Seconds that one call of a reward may take."""
    stops_at_nonfinite: bool = True
    """Raise before a step whose gradient is not finite, instead of training on; waits for the device once a step."""

    def __post_init__(self) -> None:
        if min(self.num_steps, self.num_prompts, self.num_samples, self.num_minibatches, self.num_passes) < 1:
            raise ValueError("num_steps, num_prompts, num_samples, num_minibatches and num_passes must be at least 1")


@dataclass(frozen=True, eq=False)
class Step:
    """What one step of the loop saw, for whoever looks on or has something to add."""

    number: int
    problems: Sequence[Any]
    """One a completion."""
    completions: Sequence[str]
    rollout: Rollout
    batch: PolicyBatch
    metrics: Metrics
    drawn: Sequence[Any] = ()
    """Every problem of the rollout, one a completion that was sampled; `problems` are those that `keep` left."""
    drawn_correct: Tensor | None = None
    """Whether each of these completions was right, bool."""


def train(
    model: nn.Module,
    objective: PolicyObjective,
    task: Task,
    optimizer: Optimizer,
    config: LoopConfig = LoopConfig(),
    *,
    generator: torch.Generator,
    rewards: Reward | Mapping[str, Reward] | None = None,
    ref_model: nn.Module | None = None,
    teacher: nn.Module | Teacher | None = None,
    critic: LinearCritic | None = None,
    keep: Callable[[PolicyBatch], Bool[Tensor, " N"]] | None = None,
    process: Callable[[Tensor, Tensor], Tensor] | None = None,
    mix: Callable[[Sequence[Any], Rollout], tuple[Rollout, Bool[Tensor, " N"]]] | None = None,
    look: Callable[[Step], object] = lambda step: None,
) -> None:
    """Train `model` in place.

    Args:
        rewards: As in `evaluate_rewards`, given `problem` beside prompts and completions; None rewards right answers with 1.
        ref_model: The start model, where the objective has a term against it.
        teacher: Likewise; it must have the policy's vocabulary. A `TeacherScorer` says how it is asked; anything else that
            knows log-probabilities is a `Teacher` too.
        critic: For objectives that need values; made when it is needed and not given.
        keep: Which completions are learned from, once rewards are known (`learnable_groups` is DAPO's dynamic sampling).
            A rollout of which nothing is kept takes no optimizer step.
        process: Changes the distribution that is drawn from, as in `sample`.
        mix: Puts completions that were not sampled into a rollout, and says which they are; they are rewarded like any other,
            and monitors of the rollout leave them out (`rl.interleaving.mixed_policy`).
        look: Called after every step with what it saw; interleaved updates of one's own go here too.

    Raises ValueError when a model that the objective needs is missing or has another vocabulary, when a reward fails,
    when a teacher teaches nothing (`check_teacher`), or when a gradient is not finite.

    >>> train(model, preset("dapo"), Arithmetic(), AdamW(model.parameters(), 3e-4), generator=generator)
    """
    for name, other in (("teacher", teacher), ("start model", ref_model)):
        if other is not None:
            check_vocabulary(model, other, name)
    check_tokenizer(getattr(task, "tokenizer", None), getattr(teacher, "tokenizer", None))
    if "values" in objective.rollout_needs and critic is None:
        critic = LinearCritic(model.get_output_embeddings().weight.shape[1])  # type: ignore[operator]
    is_taught = False
    for number in range(config.num_steps):
        keeps_hidden = not {"hidden", "values"}.isdisjoint(objective.rollout_needs)
        problems, rollout = draw_rollout(model, task, config, generator, process, number, keeps_hidden)
        is_given = torch.zeros_like(rollout.is_truncated)
        if mix is not None:
            rollout, is_given = mix(problems, rollout)
        completions = task.texts(rollout.tokens)
        correct = torch.tensor(task.are_right(problems, completions), device=rollout.tokens.device)
        if rewards is None:
            total = correct.float()
        else:
            given = {"problem": problems}
            told = [getattr(one, "prompt", "") if not isinstance(one, Mapping) else one["prompt"] for one in problems]
            total, _ = evaluate_rewards(rewards, told, completions, given, time_limit=config.reward_time_limit)
            total = total.to(correct.device)
        own = ~is_given
        metrics: Metrics = watch_rollout(rollout.select(own), total[own], correct[own])

        batch = rollout.batch(total, correct=correct, is_solved=solved(correct, rollout.group_ids), step=number)
        if mix is not None:
            batch = batch.having(is_demonstration=is_given)
            metrics = {**metrics, "rollout/demonstrations": is_given.float().mean()}
        batch = batch.having(**known_before(model, rollout, objective, ref_model, teacher, batch))
        if critic is not None and batch.hidden is not None:
            with torch.no_grad():
                batch = batch.having(values=critic(batch.hidden))
        kept = torch.ones_like(correct) if keep is None else keep(batch)
        batch, rollout = batch.select(kept), rollout.select(kept)
        if len(batch):
            advantage = objective.advantages(batch)
            batch = batch.having(advantage=advantage)
            is_taught = is_taught or _check_first(model, objective, rollout, batch)
            pushed = {**watch_advantages(rollout, advantage), **objective.rollout_metrics}
            metrics = {**metrics, **pushed, **update(model, objective, rollout, batch, optimizer, config, generator)}
            if critic is not None and batch.hidden is not None:
                coefficient = getattr(objective.advantage, "kl_coefficient", 0.0)
                critic.fit(batch.hidden, returns_to_go(penalised_rewards(batch, coefficient), batch.mask), batch.mask)
        chosen = kept.nonzero().flatten().tolist()
        look(
            Step(
                number,
                [problems[place] for place in chosen],
                [completions[place] for place in chosen],
                rollout,
                batch,
                metrics,
                list(compress(problems, own.tolist())),
                correct[own],
            )
        )


def draw_rollout(
    model: nn.Module,
    task: Task,
    config: LoopConfig,
    generator: torch.Generator,
    process: Callable[[Tensor, Tensor], Tensor] | None = None,
    weights_version: int = 0,
    keeps_hidden: bool = False,
) -> tuple[list[Any], Rollout]:
    """Problems, one a completion, and their completions.

    >>> problems, rollout = draw_rollout(model, Arithmetic(), LoopConfig(num_prompts=4), generator)
    """
    drawn = task.draw(config.num_prompts, generator)
    device = next(model.parameters()).device
    prompts, mask = (one.to(device) for one in task.prompts(drawn))
    rollout = sample(
        model,
        prompts,
        None if bool(mask.all()) else mask,
        num_samples=config.num_samples,
        max_new_tokens=task.max_new_tokens,
        stop_token=task.stop_token,
        pad_token=task.pad_token,
        temperature=config.temperature,
        process=process,
        generator=generator,
        weights_version=weights_version,
        keeps_hidden=keeps_hidden,
    )
    return [one for one in drawn for _ in range(config.num_samples)], rollout


@torch.no_grad()
def known_before(
    model: nn.Module,
    rollout: Rollout,
    objective: PolicyObjective,
    ref_model: nn.Module | None = None,
    teacher: nn.Module | Teacher | None = None,
    batch: PolicyBatch | None = None,
) -> dict[str, Tensor]:
    """What the objective's slots need of the policy as it was, of the start model and of a teacher; only that.

    With `batch`, completions that no term of the objective keeps are not shown to the teacher.

    Raises ValueError for a model that is needed and not there.

    >>> batch = batch.having(**known_before(model, rollout, preset("kdrl"), teacher=teacher))
    """
    known: dict[str, Tensor] = {}
    wanted = objective.rollout_needs & _SCORED
    if "values" in objective.rollout_needs:
        wanted |= {"hidden"}
    if rollout.hidden is not None and not wanted.isdisjoint({"hidden", "unembedding"}):
        wanted -= {"hidden", "unembedding"}
        known["hidden"] = rollout.hidden
        if "unembedding" in objective.rollout_needs:
            known["unembedding"] = unembedding(model)
    if wanted:
        told = score_by_length(model, rollout, wanted)
        known |= {name: told[name] for name in told if name != "log_probs"}
    needs = objective.rollout_needs | objective.loss_needs
    of_ref, of_teacher = (needs & {f"{name}_log_probs", f"{name}_logits"} for name in ("ref", "teacher"))
    for own, other, argument in ((of_ref, ref_model, "ref_model"), (of_teacher, teacher, "teacher")):
        if own and other is None:
            raise ValueError(f"this objective needs {', '.join(sorted(own))}: give {argument}=")
    if of_ref and ref_model is not None:
        told = score_by_length(ref_model, rollout, {"logits"} if "ref_logits" in of_ref else ())
        known |= {f"ref_{one}": value for one, value in told.items() if f"ref_{one}" in of_ref}
    if of_teacher and teacher is not None:
        asked = TeacherScorer(teacher) if isinstance(teacher, nn.Module) else teacher
        if "teacher_log_probs" in of_teacher:
            known["teacher_log_probs"] = asked(rollout, None if batch is None else objective.kept_by_teacher(batch))
        if "teacher_logits" in of_teacher:
            if not isinstance(asked, TeacherScorer):
                raise ValueError("kind='full' compares with the teacher's logits: give a model, or use kind='k2'")
            known["teacher_logits"] = asked.logits(rollout)
    return known


def update(
    model: nn.Module,
    objective: PolicyObjective,
    rollout: Rollout,
    batch: PolicyBatch,
    optimizer: Optimizer,
    config: LoopConfig,
    generator: torch.Generator | None = None,
) -> Metrics:
    """The optimizer steps on one rollout, whose advantages are known; returns metrics averaged over them.

    Each minibatch is an optimizer step of its own, with its own denominators. Without a generator, rows keep their order.
    Raises ValueError, before the step, for a gradient that is not finite where the config says so.

    >>> metrics = update(model, grpo, rollout, batch.having(advantage=grpo.advantages(batch)), optimizer, LoopConfig())
    """
    also = objective.loss_needs & _SCORED | {"entropy"}
    size = -(-len(batch) // config.num_minibatches)
    trained = [one for group in optimizer.param_groups for one in group["params"]]
    every: list[Metrics] = []
    for _ in range(config.num_passes):
        for rows in batch.split(size, generator):
            scored = score_by_length(
                model, rollout.select(rows), also, differentiable_entropy=objective.entropy_bonus != 0
            )
            optimizer.zero_grad()
            loss, metrics = objective.loss(batch.select(rows).having(**scored))
            loss.backward()
            norm = nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
            if config.stops_at_nonfinite and not bool(norm.isfinite()):
                raise ValueError(
                    f"step {batch.step}: a gradient is not finite, and the weights are those before this update; "
                    "a lower learning rate or pre_clip=(1e-3, 1e3) keeps ratios sane"
                )
            optimizer.step()
            every.append({**metrics, "gradient_norm": norm})
    return {f"policy/{name}" if name != "gradient_norm" else name: _mean(every, name) for name in every[0]}


def _mean(every: Sequence[Metrics], name: str) -> Tensor:
    return torch.stack([one[name].float() for one in every]).mean()


def _check_first(model: nn.Module, objective: PolicyObjective, rollout: Rollout, batch: PolicyBatch) -> bool:
    """`check_teacher` on the first few completions that the teacher saw."""
    if not objective.is_shaped_by_teacher and not any(term.against == "teacher" for term in objective.kl):
        return True
    kept = objective.kept_by_teacher(batch)
    rows = (torch.ones_like(batch.mask[:, 0]) if kept is None else kept).nonzero().flatten()[:_CHECKED]
    if not len(rows):
        return False
    with torch.no_grad():
        scored = score(model, rollout.select(rows), objective.loss_needs & _SCORED)
    return check_teacher(objective, batch.select(rows).having(**scored))
