"""Evaluating an objective, forward and backward, against TRL's own loss function: `python benchmarks/policy_objective.py`.

TRL's `_compute_loss` is driven with the model's forward pass replaced by ready log-probabilities and entropies, so that
both sides do the same: the loss, its gradient at the log-probabilities, and their metrics. Losses are compared first.
"""

import argparse
import logging
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from interleaved import medians, tell
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from dynascope.rl import PolicyBatch, PolicyObjective, dapo, dr_grpo, grpo, gspo

METHODS: dict[str, tuple[PolicyObjective, dict[str, Any]]] = {
    "grpo": (grpo, {"loss_type": "grpo"}),
    "dr_grpo": (dr_grpo, {"loss_type": "dr_grpo"}),
    "dapo": (dapo, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "gspo": (
        gspo,
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    ),
}


def trl_loss(settings: dict[str, Any], width: int) -> GRPOTrainer:
    """A trainer whose loss function can be called; its model is never run."""
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    tokenizer = Tokenizer(
        models.WordLevel({character: place for place, character in enumerate(" $abc")}, unk_token=" ")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    args = GRPOConfig(
        tempfile.gettempdir(),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=8,
        max_completion_length=width,
        **settings,
    )
    trainer = GRPOTrainer(
        LlamaForCausalLM(config),
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=" ", eos_token="$"),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def pair(name: str, num: int, width: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Both sides of one method on the same random rollout."""
    objective, settings = METHODS[name]
    lengths = torch.randint(1, width + 1, (num,))
    mask = torch.arange(width) < lengths[:, None]
    log_probs = -torch.rand(num, width)
    behaviour, entropy = log_probs + 0.1 * torch.randn(num, width), torch.rand(num, width)
    log_probs.requires_grad_()
    batch = PolicyBatch(
        mask=mask,
        rewards=torch.randn(num),
        group_ids=torch.arange(num) // 8,
        behaviour_log_probs=behaviour,
        max_length=width,
        num_tokens=mask.sum(),
    )
    batch = batch.having(advantage=objective.advantages(batch), log_probs=log_probs, entropy=entropy)
    trainer = trl_loss(settings, width)
    trainer.args.steps_per_generation = 1
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (log_probs, entropy, None)
    inputs = {
        "prompt_ids": torch.ones(num, 1, dtype=torch.long),
        "prompt_mask": torch.ones(num, 1, dtype=torch.long),
        "completion_ids": torch.ones(num, width, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": batch.advantage,
        "old_per_token_logps": behaviour,
        "num_items_in_batch": mask.sum(),
    }

    def ours() -> Tensor:
        loss, metrics = objective.loss(batch)
        loss.backward()
        torch.stack(list(metrics.values())).tolist()  # read on the host, as TRL's are
        return loss

    def theirs() -> Tensor:
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        return loss

    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=100)
    options = parser.parse_args()
    logging.disable()
    torch.manual_seed(0)
    for num, width in ((64, 8), (64, 128), (256, 1024)):
        for name in METHODS:
            ours, theirs = pair(name, num, width)
            print(
                f"\n{name}, {num} completions of {width} tokens; losses differ by {abs(ours() - theirs()).item():.1e}"
            )
            turns = options.turns if num * width < 100_000 else max(options.turns // 10, 1)
            tell(medians({"policy objective": ours, "TRL": theirs}, turns), "TRL")


if __name__ == "__main__":
    main()
