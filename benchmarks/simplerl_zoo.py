"""What monitoring a rollout costs: `python benchmarks/simplerl_zoo.py`.

All monitors of a rollout against one forward pass of a small model on the same tokens, and the linear test for repetition
against the Jaccard rule of the authors' program, on 256 responses.
"""

import argparse
import random

import torch
from interleaved import medians, tell
from transformers import LlamaConfig, LlamaForCausalLM

from dynascope.rl.monitors import watch_responses
from dynascope.rl.reasoning.behaviours import REPETITIVE, compression_ratio, is_repetitive
from dynascope.rl.tasks.answer_checking import AnswerChecker, math_equal


def responses(num: int, generator: random.Random) -> list[str]:
    """Half of them prose-like sums, half of them going round in circles from somewhere on."""
    texts = []
    for place in range(num):
        lines = [
            f"step {n}: {generator.randint(1, 999)} + {generator.randint(1, 999)} gives {generator.random():.4f}. "
            for n in range(60)
        ]
        texts.append("".join(lines) if place % 2 else "".join(lines[:20]) + "and so on and so on, " * 120)
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--num", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts = responses(options.num, random.Random(0))
    lengths = torch.randint(16, 65, (options.num,))
    truncated, correct = lengths == 64, torch.rand(options.num) < 0.3
    groups = torch.arange(options.num) // 8
    config = LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(1000, (options.num, 64))

    @torch.no_grad()
    def forward() -> object:
        return model(tokens).logits

    tell(
        medians(
            {
                "forward pass": forward,
                "monitors of tensors": lambda: watch_responses(lengths, truncated, correct, groups),
                "with texts": lambda: watch_responses(lengths, truncated, correct, groups, texts=texts),
            },
            options.turns,
        ),
        "forward pass",
    )
    fast = [compression_ratio(text) >= REPETITIVE for text in texts]
    slow = [is_repetitive(text) for text in texts]
    looping = [place % 2 == 0 for place in range(options.num)]
    for name, found in (("compression", fast), ("Jaccard", slow)):
        agreed = sum(one == other for one, other in zip(found, looping, strict=True)) / options.num
        print(f"{name} finds what goes round in circles: right in {agreed:.0%}")
    tell(
        medians(
            {
                "compression": lambda: [compression_ratio(text) for text in texts],
                "Jaccard": lambda: [is_repetitive(text) for text in texts],
            },
            options.turns,
        ),
        "Jaccard",
    )
    answers = [str(number % 50) for number in range(1024)]
    with AnswerChecker(math_equal, num_workers=1) as checker:
        tell(
            medians(
                {
                    "checked in processes, equal pairs once": lambda: checker(answers, answers),
                    "checked one by one here": lambda: [math_equal(one, one) for one in answers],
                },
                options.turns,
            ),
            "checked one by one here",
        )


if __name__ == "__main__":
    main()
