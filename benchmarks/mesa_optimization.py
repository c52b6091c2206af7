"""Linear attention over prefixes by carried sums against recomputing every prefix: `python benchmarks/mesa_optimization.py`.

5 dimensions, 100 tokens. The recipe forms E_t E_tᴴ anew for every prefix and draws its sequences one matrix product a
token, sequence by sequence; outputs are compared first.
"""

import argparse
import resource
import sys

import torch
from interleaved import medians, tell
from torch import Tensor

from dynascope.data.in_context.ar_process import ARProcess
from dynascope.nn.linear_attention import LinearCausalAttention

DIM, LENGTH = 5, 100


def recipe(model: LinearCausalAttention, x: Tensor) -> Tensor:
    tokens = torch.cat([x, torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)], 2)
    predictions = []
    for t in range(2, x.shape[1]):
        prefix = tokens[:, :t].mT
        gram = prefix @ prefix.mH / (t - 1)
        predictions.append((model.pv @ gram @ model.kq @ tokens[:, t - 1, :, None])[..., 0])
    return torch.stack(predictions, 1)


def one_by_one(count: int, generator: torch.Generator) -> Tensor:
    sequences = []
    for _ in range(count):
        turn = torch.diag(torch.polar(torch.ones(DIM), 6.2831853 * torch.rand(DIM, generator=generator)))
        tokens = [torch.randn(DIM, generator=generator).to(turn.dtype)]
        for _ in range(LENGTH - 1):
            tokens.append(turn @ tokens[-1])
        sequences.append(torch.stack(tokens))
    return torch.stack(sequences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=2000)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    process = ARProcess(DIM, LENGTH)
    x = process.sample(options.sequences, generator, torch.complex64)
    model = LinearCausalAttention(DIM, dtype=torch.complex64)
    found, expected = model(x), recipe(model, x)
    print(f"relative difference {float((found - expected).abs().max() / expected.abs().max()):.1e}")
    print(f"\nforward and backward, {options.sequences} sequences")
    tell(
        medians(
            {
                "carried sums": lambda: model(x).abs().square().sum().backward(),
                "every prefix anew": lambda: recipe(model, x).abs().square().sum().backward(),
            },
            options.turns,
        ),
        "carried sums",
    )
    print("\ndrawing 200 sequences")
    tell(
        medians(
            {"closed form": lambda: process.sample(200, generator), "one by one": lambda: one_by_one(200, generator)},
            options.turns,
        ),
        "closed form",
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"\npeak memory {peak / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
