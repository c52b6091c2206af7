"""What the parts of active-dormant-heads cost: `python benchmarks/active_dormant_heads.py`.

1. Drawing Bigram-Backcopy sequences: a batch at a time against a Python loop that draws token by token (bar: 100x).
2. ReLU attention against fused softmax attention, forward and backward, at several lengths (outputs are compared first).
3. A Llama of 25M parameters (random weights) trained bare, and under a watch with the extreme-token probe: whole runs in turns,
   budget 0.02; what the watch charges of the processor's time, when it looks, and its bound; the bar is 1.02x the time. And
   one look of the probe, against a bare step.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from interleaved import medians, tell
from torch import Tensor

import dynascope
from dynascope.data.bigram_backcopy import BigramBackcopy, dirichlet_bigram
from dynascope.nn.relu_attention import masked_logits, relu_attention, relu_weights
from dynascope.probes.extreme_tokens import ExtremeTokens
from dynascope.watching.schedule import Budget
from dynascope.watching.shadow import shadow_pass

BUDGET = 0.02


def token_by_token(task: BigramBackcopy, count: int, random: np.random.Generator) -> Tensor:
    laws, triggers = task.laws.numpy(), set(task.triggers.tolist())
    sequences = []
    for _ in range(count):
        sequence = [task.bos]
        while len(sequence) <= task.seq_len:
            if sequence[-1] in triggers:
                sequence.append(sequence[-2])
            else:
                sequence.append(int(random.choice(task.vocab_size, p=laws[sequence[-1]])))
        sequences.append(sequence)
    return torch.tensor(sequences)


def drawing(turns: int) -> None:
    task = BigramBackcopy(dirichlet_bigram(65), 3, 256)
    generator, random = torch.Generator().manual_seed(0), np.random.default_rng(0)
    frequencies = [
        torch.bincount(x.flatten(), minlength=task.vocab_size) / x.numel()
        for x in (task.sample(2000, generator), token_by_token(task, 100, random))
    ]
    print(f"largest difference of token frequencies {float((frequencies[0] - frequencies[1]).abs().max()):.3f}")
    print("\ndrawing sequences of 257 tokens, time for 512 (the others are scaled)")
    counts = {"512 at a time": 512, "4096 at a time": 4096, "token by token": 16}
    measured = medians(
        {
            "512 at a time": lambda: task.sample(512, generator),
            "4096 at a time": lambda: task.sample(4096, generator),
            "token by token": lambda: token_by_token(task, 16, random),
        },
        turns,
    )
    tell({name: seconds * 512 / counts[name] for name, seconds in measured.items()}, "4096 at a time")


def attention(turns: int) -> None:
    for length in (256, 1024, 2048):
        operands = [torch.randn(1, 8, length, 64, requires_grad=True) for _ in range(3)]
        expected = relu_weights(masked_logits(*operands[:2], is_causal=True)) @ operands[2]
        error = float((relu_attention(*operands, is_causal=True) - expected).detach().abs().max())

        def both_ways(function: object, operands: list[Tensor] = operands) -> None:
            function(*operands, is_causal=True).sum().backward()  # type: ignore[operator]

        print(
            f"\n{length} tokens, 8 heads of 64, forward and backward (largest difference from the dense formula {error:.1e})"
        )
        ways = {
            "softmax, fused": lambda: both_ways(F.scaled_dot_product_attention),
            "ReLU, blocks of 512": lambda: both_ways(relu_attention),
        }
        tell(medians(ways, turns), "softmax, fused")


def llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes, max_position_embeddings=256))


def run(num_steps: int, watched: bool) -> None:
    torch.manual_seed(0)
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    tokens = torch.randint(256, (4, 128))

    def train() -> None:
        for _ in range(num_steps):
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()

    if not watched:
        train()
        return
    charged: list[float] = []
    charge = Budget.spent

    def spent(self: Budget, costs: Mapping[str, float], shared: float = 0.0) -> None:
        charged.append(sum(costs.values()) + shared)
        charge(self, costs, shared)

    # The controller counts processor time too, so that its account and ours are of the same thing.
    clock = mock.patch("time.perf_counter", time.process_time)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Budget, "spent", spent), clock:
        probes, began = [ExtremeTokens(model)], time.process_time()
        with dynascope.watch(model, optimizer, run=Path(folder) / "run", budget=BUDGET, probes=probes):
            train()
        whole = time.process_time() - began
        looks = dynascope.open(Path(folder) / "run")["extreme/sink_score"].step.values
    print(f"  looks before steps {', '.join(map(str, looks))}; the dearest {max(charged):.2f} s", end="; ")
    print(f"charged {sum(charged):.2f} s of {whole:.1f} s, {sum(charged) / whole:.1%}", end="; ")
    print(f"bound {BUDGET * whole + max(charged):.2f} s (the budget and one look)")


def watching(num_steps: int, turns: int) -> None:
    model = llama().train()
    print(f"\nLlama of {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, 4 x 128 tokens")
    tokens, probe = torch.randint(256, (4, 128)), ExtremeTokens(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    def look() -> None:
        shadow_pass(model, (), {"input_ids": tokens}, probe.needs, lambda need, view: probe.measure(view) and None)

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=tokens)

    tell(
        medians({"bare step": step, "forward pass": forward, "one look of the probe": look}, 2 * turns + 1), "bare step"
    )
    print(f"\nwhole runs of {num_steps} steps, wall time; bar 1.02x, beside the first look")
    processor: dict[str, list[float]] = {"bare": [], "watched": []}

    def whole(name: str) -> None:
        began = time.process_time()
        run(num_steps, name == "watched")
        processor[name].append(time.process_time() - began)

    tell(medians({name: lambda name=name: whole(name) for name in processor}, turns, warmup=0), "bare")
    print("processor time of the same runs, which other processes of the machine disturb less")
    tell({name: statistics.median(every) for name, every in processor.items()}, "bare")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", choices=["drawing", "attention", "watching"], help="one of the three")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    if options.only in (None, "drawing"):
        drawing(options.turns)
    if options.only in (None, "attention"):
        attention(options.turns)
    if options.only in (None, "watching"):
        watching(options.steps, options.turns)
    print(f"\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
