"""What σReparam costs in a training step of a GPT: `python benchmarks/sigma_reparam.py`.

Forward, backward and AdamW's step of a 25M-parameter GPT: plain, with sigma_reparam (iterating each forward, and once a
step), and with PyTorch's own spectral_norm on the same layers, in turns. The bar is 1.05x the plain step.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from interleaved import medians, tell
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from dynascope.nn import iterate_each_step, sigma_reparam

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from train_gpt import GPT

SIZES = {"1M": (128, 4, 4), "25M": (512, 8, 8)}


def with_torch(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            spectral_norm(module)
    return model


def step_of(model: nn.Module, batch: torch.Tensor, *, each_step: bool = False) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    if each_step:
        iterate_each_step(model, optimizer)

    def step() -> None:
        _, loss = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="25M")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    width, depth, num_heads = SIZES[options.size]
    batch = torch.randint(256, (options.batch_size, 129))
    make = partial(GPT, 256, 128, width, depth, num_heads)
    contenders = {
        "plain": step_of(make(), batch),
        "sigma_reparam, each forward": step_of(sigma_reparam(make()), batch),
        "sigma_reparam, each step": step_of(sigma_reparam(make()), batch, each_step=True),
        "torch spectral_norm": step_of(with_torch(make()), batch),
    }
    num_parameters = sum(parameter.numel() for parameter in make().parameters())
    print(f"GPT of {num_parameters / 1e6:.1f}M parameters, {options.batch_size} x 128 tokens; bar: 1.05x")
    tell(medians(contenders, options.turns), base="plain")


if __name__ == "__main__":
    main()
