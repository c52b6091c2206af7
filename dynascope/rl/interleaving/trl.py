"""ReLIFT inside TRL's GRPOTrainer: the hardest questions of its rollouts, fine-tuned on between its steps (2506.07527)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from dynascope.rl.adapters.trl import PolicyObjectiveTrainer
from dynascope.rl.interleaving.hardest import gathered
from dynascope.rl.interleaving.interleave import Interleaver, is_sharded


class InterleavedTrainer(PolicyObjectiveTrainer):
    """`PolicyObjectiveTrainer` with fine-tuning on demonstrations in between; needs the extra `trl`.

    `interleave(model)` makes the `Interleaver` for the trainer's model; its task is `WordProblems` with the trainer's
    tokenizer, or one of your own. A question is a row of the training set, known by its prompt. `correctness` names the
    reward function whose positive values mean a right answer; None takes the sum of all. Under DDP and FSDP2 every process
    works on its share of the demonstrations. `interleave` is called when training begins, with the model as accelerate
    prepared it, so that an optimizer of its own holds the weights that train; `interleaver` is what it made. Checkpoints hold
    its state, and resuming puts it back; what a teacher still owed is asked anew.

    Raises ValueError for a `correctness` that names no reward function, and for FSDP1 and DeepSpeed.

    >>> def interleave(model):
    ...     task = WordProblems(rows, tokenizer, max_new_tokens=256)
    ...     return Interleaver(model, task, Demonstrations(solutions), batch_size=128, lr=1e-6)
    >>> InterleavedTrainer(model, reward_funcs=reward, args=args, train_dataset=rows, objective=relift_rl, interleave=interleave)
    """

    def __init__(
        self,
        *args: Any,
        interleave: Callable[[nn.Module], Interleaver],
        correctness: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if correctness is not None and correctness not in self.reward_func_names:
            names = ", ".join(self.reward_func_names)
            raise ValueError(f"there is no reward function {correctness!r}; there are {names}")
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and not self.accelerator.is_fsdp2):
            raise ValueError(
                "fine-tuning in between reaches weights that are replicated or sharded by FSDP2 (fsdp_version: 2): "
                "leave DeepSpeed and FSDP1 off"
            )
        self._correctness, self._interleave = correctness, interleave
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
            column = None if self._correctness is None else self.reward_func_names.index(self._correctness)
            values = self._rewards if column is None else by_function[:, column]
            rows = gathered([{"prompt": row["prompt"]} for row in inputs])
            self.interleaver.see(rows, (values > 0).tolist())
        return by_function

    def fine_tune_if_due(self) -> None:
        """At most one step of fine-tuning, logged with the trainer's own metrics."""
        for name, value in self.interleaver.step(self.state.global_step - 1).items():
            self._metrics["train"][name].append(float(value))


class _AfterEachStep(TrainerCallback):
    def __init__(self, trainer: InterleavedTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.fine_tune_if_due()
