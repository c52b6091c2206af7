"""Demonstrations inside TRL's GRPOTrainer: fine-tuned on between its steps (ReLIFT, 2506.07527), or in its groups (LUFFY)."""

from collections.abc import Callable, Hashable
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from dynascope.rl.adapters.trl import PolicyObjectiveTrainer
from dynascope.rl.interleaving.demonstrations import DemonstrationSource
from dynascope.rl.interleaving.hardest import gathered
from dynascope.rl.interleaving.interleave import Interleaver, TeachableTask, is_sharded, prompt_of
from dynascope.rl.interleaving.mixed_policy import GroupDemonstrations


class InterleavedTrainer(PolicyObjectiveTrainer):
    """`PolicyObjectiveTrainer` with fine-tuning on demonstrations in between; needs the extra `trl`.

    `interleave(model)` makes the `Interleaver` for the trainer's model; its task is `WordProblems` with the trainer's
    tokenizer, or one of your own. A question is a row of the training set, known by its prompt, and completions that no reward
    was given say nothing of it. At most one step of fine-tuning is taken a rollout, however many of its optimizer steps there
    are, as in the authors' program. Under DDP and FSDP2 every process
    works on its share of the demonstrations. `interleave` is called when training begins, with the model as accelerate
    prepared it, so that an optimizer of its own holds the weights that train; `interleaver` is what it made. Checkpoints hold
    its state, and resuming puts it back; what a teacher still owed is asked anew.

    Raises ValueError for FSDP1 and DeepSpeed, and as `PolicyObjectiveTrainer` does.

    >>> def interleave(model):
    ...     task = WordProblems(rows, tokenizer, max_new_tokens=256)
    ...     return Interleaver(model, task, Demonstrations(solutions), batch_size=128, lr=1e-6)
    >>> InterleavedTrainer(model, reward_funcs=reward, args=args, train_dataset=rows, objective=relift_rl, interleave=interleave)
    """

    def __init__(
        self,
        *args: Any,
        interleave: Callable[[nn.Module], Interleaver],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and not self.accelerator.is_fsdp2):
            raise ValueError(
                "fine-tuning in between reaches weights that are replicated or sharded by FSDP2 (fsdp_version: 2): "
                "leave DeepSpeed and FSDP1 off"
            )
        self._interleave, self._has_seen = interleave, False
        self.interleaver: Interleaver
        self._resumed_from: str | None = None
        self.add_callback(_AfterEachStep(self))

    def begin(self) -> None:
        """Make the interleaver, for the prepared model; training does it."""
        self.interleaver = self._interleave(self.accelerator.unwrap_model(self.model_wrapped))
        if self._resumed_from is not None and (kept := self._state_in(self._resumed_from)).is_file():
            self.interleaver.load_state_dict(torch.load(kept, weights_only=True))

    def _state_in(self, folder: str | Path) -> Path:
        # Replicated models have one state, and of a sharded one each process has its part.
        rank = self.accelerator.process_index if is_sharded(self.interleaver.model) else 0
        return Path(folder) / f"interleaver-{rank}.pt"

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save or is_sharded(self.interleaver.model):
            torch.save(self.interleaver.state_dict(), self._state_in(self._checkpoint_folder(trial)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resumed_from = checkpoint

    def _calculate_rewards(self, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        by_function = super()._calculate_rewards(inputs, *args, **kwargs)
        if self.model.training:
            rows = gathered([{"prompt": row["prompt"]} for row in inputs])
            known = self._is_correctness_known.tolist()
            if any(known):
                self.interleaver.see(list(compress(rows, known)), list(compress(self._is_correct.tolist(), known)))
            self._has_seen = True
        return by_function

    def fine_tune_if_due(self) -> None:
        """At most one step of fine-tuning a rollout, logged with the trainer's own metrics."""
        if not self._has_seen:
            return
        self._has_seen = False
        # Schedules and ages count rollouts, as in the loop.
        steps = self.args.steps_per_generation * self.num_iterations // self.args.gradient_accumulation_steps
        number = (self.state.global_step - 1) // max(steps, 1)
        for name, value in self.interleaver.step(number).items():
            self._metrics["train"][name].append(float(value))


class MixedPolicyTrainer(PolicyObjectiveTrainer):
    """`PolicyObjectiveTrainer` with a demonstration in the place of each prompt's last completion (2504.14945).

    As `mixed_policy.DemonstrationsInGroups` does it in the loop: they are rewarded and compared with the samples of their
    group, and prompts without one keep their samples. `task` is `WordProblems` with the trainer's tokenizer, or one of your
    own; a question is a row of the training set, known by its prompt. TRL's metrics of lengths are of the samples alone, those
    of rewards of all. Evaluation sees no demonstrations. `shown` counts them.

    >>> task = WordProblems(rows, tokenizer, max_new_tokens=256)
    >>> source = Demonstrations(solutions)
    >>> MixedPolicyTrainer(model, reward_funcs=reward, args=args, train_dataset=rows, objective="luffy", task=task, source=source)
    """

    gives = PolicyObjectiveTrainer.gives | {"is_demonstration"}

    def __init__(
        self,
        *args: Any,
        task: TeachableTask,
        source: DemonstrationSource,
        name: Callable[[Any], Hashable] = prompt_of,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.shown = GroupDemonstrations(task, source, name=name)
        self._rows: list[Any] = []

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self._rows = inputs
        return super()._generate_and_score_completions(inputs)

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        whole: tuple[Any, ...] = super()._generate(prompts)
        prompt_ids, completion_ids, tool_mask, completions, sampling, *others = whole
        is_given = torch.zeros(len(prompts), dtype=torch.bool, device=self.accelerator.device)
        self._is_demonstration = is_given
        if not self.model.training:
            return whole
        # A group may lie across processes; its last completion is in one of them.
        first = self.accelerator.process_index * len(prompts)
        last = [place for place in range(len(prompts)) if (first + place + 1) % self.num_generations == 0]
        for place, solution in self.shown.of([self._rows[place] for place in last]).items():
            row = last[place]
            tokens, mask = self.shown.task.completions([solution])
            ids = tokens[mask].tolist()
            text = self.processing_class.decode(ids, skip_special_tokens=True)
            is_chat = isinstance(completions[row], list)
            completion_ids[row], is_given[row] = ids, True
            completions[row] = [{"role": "assistant", "content": text}] if is_chat else text
            if tool_mask is not None:
                tool_mask[row] = [1] * len(ids)
            if sampling is not None:
                sampling[row] = [None] * len(ids)  # TRL's word for a token that nobody drew
        share = self.accelerator.gather(is_given.float()).mean().item()
        self._metrics["train"]["rollout/demonstrations"].append(share)
        return prompt_ids, completion_ids, tool_mask, completions, sampling, *others


class _AfterEachStep(TrainerCallback):
    def __init__(self, trainer: InterleavedTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.fine_tune_if_due()
