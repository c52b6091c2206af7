"""The selective scan in pieces against the loop of Hugging Face's slow path: `python benchmarks/mamba_icl_outliers.py`.

One layer of mamba-130m's size (1536 channels, 16 states) on 1024 positions, CPU. Then the one-layer gated attention, which
works from the query's side, against the recurrence that forms a state for every token. Outputs are compared first.
"""

import argparse
import os
import resource
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from interleaved import medians, tell
from torch import Tensor
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from dynascope.data.in_context.outliers import OutlierICL
from dynascope.nn.gated_linear_attention import GatedLinearAttentionICL
from dynascope.nn.selective_scan import selective_scan

CHANNELS, STATES, LENGTH, SHORT = 1536, 16, 1024, 128


def slow_path(u: Tensor, steps: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    by_channel = (one.transpose(1, 2) for one in (B, C))
    return mamba_selective_scan(u.transpose(1, 2), steps.transpose(1, 2), A, *by_channel, D=D, delta_softplus=True).mT


def naive(model: GatedLinearAttentionICL, prompts: Tensor) -> Tensor:
    """Every token's state of (state × width) numbers, weighed and summed."""
    assert model.w is not None
    logits = prompts @ model.w
    entering, passing = torch.sigmoid(logits), torch.sigmoid(-logits)
    inputs = torch.einsum("blw,bls->blws", prompts, prompts @ model.W_B.T)
    state = torch.zeros_like(inputs[:, 0])
    for i in range(prompts.shape[1]):
        state = passing[:, i, None, None] * state + entering[:, i, None, None] * inputs[:, i]
    return torch.einsum("bws,bs->bw", state, prompts[:, -1] @ model.W_C.T)[:, -1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    u, steps = normal(1, LENGTH, CHANNELS), normal(1, LENGTH, CHANNELS) - 4
    B, C, D = normal(1, LENGTH, STATES), normal(1, LENGTH, STATES), normal(CHANNELS)
    A = -torch.arange(1.0, STATES + 1).expand(CHANNELS, -1).contiguous()

    def ours() -> Tensor:
        return selective_scan(u, F.softplus(steps), A, B, C, D, discretization="euler")

    with torch.no_grad():
        print(f"largest difference {float((ours() - slow_path(u, steps, A, B, C, D)).abs().max()):.1e}")
        print(f"\nscan of {LENGTH} positions, {CHANNELS} channels, {STATES} states")
        peer = {"in pieces": ours, "Hugging Face, slow path": lambda: slow_path(u, steps, A, B, C, D)}
        tell(medians(peer, options.turns), "in pieces")
    # Of the slow path's backward pass every position costs a whole gradient of zeros: 1024 of them take minutes.
    u, steps, B, C = (one[:, :SHORT].clone() for one in (u, steps, B, C))
    leaves = [one.requires_grad_() for one in (u, steps, A, B, C, D)]

    def descend_of(scan: Tensor) -> None:
        torch.autograd.grad(scan.square().sum(), leaves)

    print(f"\nthe same of {SHORT} positions, forward and backward")
    both = {
        "in pieces": lambda: descend_of(ours()),
        "Hugging Face, slow path": lambda: descend_of(slow_path(u, steps, A, B, C, D)),
    }
    tell(medians(both, max(1, options.turns // 2)), "in pieces")

    model = GatedLinearAttentionICL(30)
    prompts = OutlierICL().train_batch(1024).prompts
    with torch.no_grad():
        found, expected = model(prompts), naive(model, prompts)
    difference = (found - expected).abs().max() / expected.abs().max()
    print(f"\nrelative difference of the layer {float(difference):.1e}")
    print("\none gated layer, 1024 prompts of 21 tokens, forward and backward")
    layer = {
        "from the query's side": lambda: model(prompts).sum().backward(),
        "every token's state": lambda: naive(model, prompts).sum().backward(),
    }
    tell(medians(layer, options.turns), "from the query's side")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"\npeak memory {peak / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
