"""Objectives on equal terms: the same start models, problems, samples, optimizer steps and seeds; the objective alone differs.

Tasks of sums with written steps: `arithmetic` is reinforcement learning: a policy draws answers and is rewarded for right ones.
`arithmetic-pairs` is preference learning: the start model draws once, a right answer and a wrong one of the same problem make a
pair, and the policy never draws again while it trains. Both are tested alike. `gsm8k` is reinforcement learning on real word
problems from a folder, with a model from a folder.

`relift` is the preset `relift_rl` with fine-tuning on demonstrations of the hardest questions in between, steps that the others
do not take; `luffy` has one in every group. How many they used is among the measures.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynascope.losses.preference import MARGIN_LOSSES, PreferencePairs, margin_loss
from dynascope.record import Series
from dynascope.rl.entropy.parts import AdaptiveTemperature
from dynascope.rl.interleaving.demonstrations import Demonstrations
from dynascope.rl.interleaving.interleave import Interleaver, TeachableTask
from dynascope.rl.interleaving.mixed_policy import DemonstrationsInGroups
from dynascope.rl.loop import LoopConfig, Step, Task, draw_rollout
from dynascope.rl.presets import PRESETS, preset
from dynascope.rl.rollout import Rollout, score
from dynascope.rl.tasks.gsm8k import WordProblems, read_gsm8k
from dynascope.studies.harness import StudyRecord
from dynascope.studies.harness.policy import declare, measure_policy, reinforce, start_model
from dynascope.studies.harness.sums import SumsConfig


@dataclass(frozen=True)
class Config(SumsConfig):
    """What all objectives share; of preferences, `num_steps` are steps on pairs, and `num_prompts` the pairs of one.

    `num_prompts` are also the demonstrations of one step of relift's fine-tuning.
    """

    base_steps: int = 150
    teacher_steps: int = 1500
    """Behind the teacher of objectives that have one."""
    num_pairs: int = 512
    """Problems that are drawn for pairs; those with both a right and a wrong answer give one each."""
    data: str = ""
    """Of gsm8k: a folder with train.jsonl and test.jsonl."""
    model: str = ""
    """Of gsm8k: a folder with a causal language model and its tokenizer, as `save_pretrained` leaves them."""
    teacher: str = ""
    """Of gsm8k: likewise, for objectives that have a teacher; it must have the model's vocabulary."""
    max_new_tokens: int = 256
    """Of gsm8k."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.num_pairs, self.max_new_tokens) < 1:
            raise ValueError("num_pairs and max_new_tokens must be at least 1")
        for name in ("data", "model", "teacher"):
            folder = getattr(self, name)
            if folder and not Path(folder).is_dir():
                raise ValueError(f"there is no folder {folder}, which {name} names")


def train_policy(config: Config, arm: str, seed: int, record: StudyRecord) -> None:
    """Reinforcement learning on sums with the preset `arm`."""

    def start() -> nn.Module:
        return start_model(record, config.start, seed)

    def teacher() -> nn.Module:
        return start_model(record, dataclasses.replace(config.start, num_steps=config.teacher_steps), seed)

    train_on(config, arm, seed, record, config.task, start, teacher, solve=lambda problem: problem.completion)


def train_words(config: Config, arm: str, seed: int, record: StudyRecord) -> None:
    """Reinforcement learning on word problems with the preset `arm`, tested on problems that training never sees."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    def load(folder: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, local_files_only=True)

    tokenizer = AutoTokenizer.from_pretrained(config.model, local_files_only=True)
    task, test = (
        WordProblems(read_gsm8k(config.data, split), tokenizer, config.max_new_tokens) for split in ("train", "test")
    )
    teacher = (lambda: load(config.teacher)) if config.teacher else (lambda: None)
    train_on(
        config, arm, seed, record, task, lambda: load(config.model), teacher, test, solve=lambda row: row["solution"]
    )


def train_on(
    config: Config,
    arm: str,
    seed: int,
    record: StudyRecord,
    task: TeachableTask,
    start: Callable[[], nn.Module],
    teacher: Callable[[], nn.Module | None],
    test_task: Task | None = None,
    *,
    solve: Callable[[Any], str],
) -> None:
    """Reinforcement learning on any task, from any start; `solve` gives a problem's demonstration."""
    objective = preset("relift_rl" if arm == "relift" else arm)
    needs = objective.rollout_needs | objective.loss_needs
    before, model, source = start(), start(), Demonstrations(solve)
    mix = DemonstrationsInGroups(model, task, source) if "is_demonstration" in needs else None
    relift = None
    if arm == "relift":
        relift = Interleaver(model, task, source, batch_size=config.num_prompts, lr=config.lr, seed=seed)

    def look(step: Step) -> None:
        if relift is not None:
            record.add(step.number, relift(step))
        elif mix is not None:
            record.add(step.number, {"demonstrations/used": mix.budget.used})

    reinforce(
        record,
        model,
        objective,
        task,
        config.loop,
        lr=config.lr,
        seed=seed,
        evaluation=config.evaluation,
        start=before,
        test_task=test_task,
        ref_model=before,
        process=AdaptiveTemperature({task.stop_token, task.pad_token}) if arm == "hapo" else None,
        mix=mix,
        look=look,
        teacher=None if needs.isdisjoint({"teacher_log_probs", "teacher_logits"}) else teacher(),
    )


def train_pairs(config: Config, arm: str, seed: int, record: StudyRecord) -> None:
    """Preference learning with the margin loss `arm`."""
    loss = margin_loss(arm)
    start, model = (start_model(record, config.start, seed) for _ in range(2))
    generator = torch.Generator().manual_seed(seed)
    amount = LoopConfig(num_prompts=config.num_pairs, num_samples=config.num_samples)
    problems, rollout = draw_rollout(start, config.task, amount, generator)
    right = torch.tensor(config.task.are_right(problems, config.task.texts(rollout.tokens)))
    chosen, rejected = pairs_of(right.view(-1, config.num_samples))
    if not len(chosen):
        raise ValueError("no problem has both a right and a wrong answer; change base_steps or digits")
    with torch.no_grad():
        reference = log_probs(start, rollout)

    declare(record, config.evaluation)
    for side in ("chosen", "rejected"):
        record.declare(Series(f"logps/{side}", unit="nats", description=f"Log-probability of {side} answers."))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    for step in range(config.num_steps + 1):
        if step % config.test_every == 0 or step == config.num_steps:
            record.add(step, measure_policy(model, config.task, config.evaluation, start=start))
        if step == config.num_steps:
            break
        drawn = torch.randint(len(chosen), (config.num_prompts,), generator=generator)
        rows = torch.cat([chosen[drawn], rejected[drawn]])
        now, before = log_probs(model, rollout.select(rows)).chunk(2), reference[rows].chunk(2)
        optimizer.zero_grad()
        mean = loss(PreferencePairs(*now, *before, *rollout.lengths[rows].chunk(2))).mean()
        mean.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        record.add(step, {"loss": mean, "logps/chosen": now[0].mean(), "logps/rejected": now[1].mean()})


def pairs_of(right: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers of a right and of a wrong answer, the first of each, for problems (problems, answers) that have both."""
    both = right.any(1) & ~right.all(1)
    first = torch.arange(len(right)) * right.shape[1]
    return (first + right.int().argmax(1))[both], (first + (~right).int().argmax(1))[both]


def log_probs(model: nn.Module, rollout: Rollout) -> Tensor:
    """Of whole answers, (N,)."""
    return (score(model, rollout)["log_probs"] * rollout.mask).sum(1)


SETTINGS = {
    "smoke": Config(
        (1,), num_layers=1, width=32, base_steps=60, teacher_steps=120, num_steps=6, num_prompts=8, num_pairs=64,
        test_problems=16, test_samples=4, test_every=3,
    ),
    "small": Config(),
    "large": Config((3,), num_layers=4, width=128, base_steps=1000, teacher_steps=4000, num_steps=300, num_prompts=128),
}  # fmt: skip
# At the rate of reinforcement learning, DPO unlearns sums: pairs say which answer is better, not what answers are like.
SETTINGS_OF_PAIRS = {name: dataclasses.replace(config, lr=config.lr / 10) for name, config in SETTINGS.items()}


@dataclass(frozen=True)
class Kind:
    """What trains on a task, the objectives that it takes, and its presets."""

    train: Callable[[Config, str, int, StudyRecord], None]
    objectives: tuple[str, ...]
    presets: Mapping[str, Config]


POLICIES = (*PRESETS, "relift")
TASKS = {
    "arithmetic": Kind(train_policy, POLICIES, SETTINGS),
    "arithmetic-pairs": Kind(train_pairs, tuple(MARGIN_LOSSES), SETTINGS_OF_PAIRS),
    "gsm8k": Kind(train_words, POLICIES, SETTINGS),
}
