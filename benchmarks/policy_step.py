"""One whole step of reinforcement learning against TRL's GRPOTrainer: `python benchmarks/policy_step.py [--turns 5]`.

Rollout, reward, advantage, loss, update; the same model, completions, optimizer and reward on both sides, GRPO without a KL
term. Both take turns in one process, and medians are told: "a step" is from one step's end to the next within `train`, "overall"
is a whole call of `train` by its steps.

1. 64 completions of 8 tokens, a Llama of 2 layers, width 64; bar: 0.5 of TRL's time.
2. 25M parameters, completions of 128 tokens (16 of them, so that a CPU can); bar 0.9.
"""

import argparse
import itertools
import logging
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from dynascope.rl import grpo
from dynascope.rl.loop import LoopConfig, train
from dynascope.rl.tasks.arithmetic import CHARACTERS, PAD, STOP, Arithmetic, Sum

GROUP = 8


@dataclass(frozen=True)
class Sums(Arithmetic):
    """Sums of one digit, with completions as long as the benchmark wants."""

    num_tokens: int = 8

    @property
    def max_new_tokens(self) -> int:
        """The length limit."""
        return self.num_tokens


def make_model(num_layers: int, width: int, num_tokens: int) -> Any:
    """A Llama with random weights that never ends a completion, so that both sides draw as many tokens."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(CHARACTERS),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=num_layers,
            num_attention_heads=max(4, width // 64),
            max_position_embeddings=num_tokens + 8,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=STOP,
        )
    )

    def never_ends(module: Any, args: Any, logits: Tensor) -> Tensor:
        blocked = torch.zeros(len(CHARACTERS)).index_fill_(0, torch.tensor([STOP]), -1e4)
        return logits + blocked

    model.lm_head.register_forward_hook(never_ends)
    return model


def digits(completions: Sequence[str], **columns: Any) -> list[float]:
    """Share of digits."""
    return [sum(map(str.isdigit, text)) / max(1, len(text)) for text in completions]


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds from the end of one step to that of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Called by the trainer."""
        self.ends.append(time.perf_counter())


def seconds_of_trl(model: Any, num_completions: int, num_tokens: int, num_steps: int) -> tuple[list[float], float]:
    """A step each, the first left out; and overall."""
    vocabulary = {character: place for place, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    args = GRPOConfig(
        tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=num_completions,
        num_generations=GROUP,
        max_completion_length=num_tokens,
        max_steps=num_steps + 1,
        learning_rate=1e-4,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        loss_type="grpo",
    )
    prompts = [Sum(first, second).prompt for first in range(8) for second in range(8)]
    clock = Clock()
    trainer = GRPOTrainer(
        model,
        reward_funcs=digits,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=" ", eos_token="$"),
        callbacks=[clock],
    )
    started = time.perf_counter()
    trainer.train()
    overall = (time.perf_counter() - started) / (num_steps + 1)
    return [after - before for before, after in itertools.pairwise(clock.ends)], overall


def seconds_of_ours(model: Any, num_completions: int, num_tokens: int, num_steps: int) -> tuple[list[float], float]:
    """Likewise."""
    ends: list[float] = []
    started = time.perf_counter()
    train(
        model,
        grpo,
        Sums((1,), num_tokens),
        torch.optim.AdamW(model.parameters(), 1e-4, fused=True),  # as the Trainer has it
        LoopConfig(num_steps + 1, num_completions // GROUP, GROUP, num_minibatches=1),
        generator=torch.Generator().manual_seed(0),
        rewards=digits,
        look=lambda step: ends.append(time.perf_counter()),
    )
    overall = (time.perf_counter() - started) / (num_steps + 1)
    return [after - before for before, after in itertools.pairwise(ends)], overall


def main() -> None:
    """Print every figure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--large", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(2)
    cases = [("2 layers, width 64, 64 x 8 tokens", 0.5, (2, 64), 64, 8, 30)]
    if options.large:
        cases.append(("25M parameters, 16 x 128 tokens", 0.9, (6, 512), 16, 128, 1))
    for name, bar, size, num_completions, num_tokens, num_steps in cases:
        ours, theirs = make_model(*size, num_tokens), make_model(*size, num_tokens)
        steps: dict[str, list[float]] = {"TRL": [], "ours": []}
        overall: dict[str, list[float]] = {"TRL": [], "ours": []}
        for _ in range(options.turns):
            for side, seconds_of, model in (("TRL", seconds_of_trl, theirs), ("ours", seconds_of_ours, ours)):
                taken, whole = seconds_of(model, num_completions, num_tokens, num_steps)
                steps[side] += taken
                overall[side].append(whole)
        count = sum(one.numel() for one in ours.parameters()) / 1e6
        print(f"{name} ({count:.2f}M), bar {bar}")
        for what, found in (("a step", steps), ("overall", overall)):
            medians = {side: statistics.median(seconds) for side, seconds in found.items()}
            told = ", ".join(f"{side} {1e3 * seconds:.1f} ms" for side, seconds in medians.items())
            print(f"    {what}: {told}; {medians['ours'] / medians['TRL']:.3f}x")


if __name__ == "__main__":
    main()
