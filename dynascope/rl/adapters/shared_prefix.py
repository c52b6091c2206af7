"""Shared prompts inside TRL's trainers of groups."""

from typing import Any

import torch
from torch import Tensor

from dynascope.nn.shared_prefix.models import prefix_sharing
from dynascope.rl.prompt_groups import PromptGroups
from dynascope.rl.shared_prefix import grouped_log_probs


class SharedPromptsMixin:
    """In front of GRPOTrainer, or of `PolicyObjectiveTrainer`: log-probabilities with each prompt of a batch worked out once.

    The policy's, the old policy's and the reference model's all come this way, so that their ratios compare like with like.
    TRL shuffles completions between the optimizer steps of a generation, so one step shares what it holds of each prompt:
    most with `steps_per_generation=1`. Batches with images, and auxiliary losses of experts, go TRL's own way.

    >>> class Trainer(SharedPromptsMixin, GRPOTrainer): ...
    >>> Trainer(model, reward_funcs=reward, args=args, train_dataset=prompts).train()
    """

    temperature: float
    _entropy_bonus_enabled: bool

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's own; gradient checkpointing, which is its default, runs layers again within it."""
        with prefix_sharing(self.accelerator.unwrap_model(model)):  # type: ignore[attr-defined]
            loss: Tensor = super().training_step(model, *args, **kwargs)  # type: ignore[misc]
        return loss

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if compute_aux_loss or any(one is not None for one in others.values()):
            told: tuple[Tensor, Tensor | None, Tensor | None] = super()._get_per_token_logps_and_entropies(  # type: ignore[misc]
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **others,
            )
            return told
        mask = attention_mask.bool()
        groups, rows = PromptGroups.of_repeated(
            input_ids[:, :-logits_to_keep],
            mask[:, :-logits_to_keep],
            input_ids[:, -logits_to_keep:],
            mask[:, -logits_to_keep:],
        )
        log_probs, entropies = grouped_log_probs(
            model,
            groups,
            temperature=self.temperature,
            share=True,  # whether it pays differs from batch to batch, and ratios compare old log-probabilities with new ones
            entropy=compute_entropy,
            differentiable_entropy=self._learns_from_entropy,
        )
        return _in_order(log_probs, rows), None if entropies is None else _in_order(entropies, rows), None

    @property
    def _learns_from_entropy(self) -> bool:
        """Whether a bonus of entropy is in the loss: TRL's own, or that of a `PolicyObjectiveTrainer`."""
        objective = getattr(self, "objective", None)
        return self._entropy_bonus_enabled if objective is None else bool(objective.entropy_bonus)


def _in_order(values: Tensor, rows: Tensor) -> Tensor:
    return torch.empty_like(values).index_copy(0, rows, values)
