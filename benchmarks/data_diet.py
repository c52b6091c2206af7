"""Per-example gradient norms by ghost norms, by torch.func.vmap, and one by one: `python benchmarks/data_diet.py`.

Batch 128, on a small convolutional net and on a two-layer transformer; the values are compared first. Opacus' per-sample
gradients and BackPACK's batch norms stand beside them on the convolutional net where they are installed.
"""

import argparse
import importlib.util
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from interleaved import medians, tell
from torch import Tensor, nn

from dynascope.data import per_example_gradient_norms

BATCH = 128


class Layer(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm2(x))


def convolutional() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10)),
    )


def transformer() -> nn.Module:
    return nn.Sequential(nn.Embedding(256, 64), Layer(64, 4), Layer(64, 4), nn.LayerNorm(64), nn.Linear(64, 256))


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)


def by_opacus(model: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[], Tensor]:
    from opacus import GradSampleModule

    wrapped = GradSampleModule(model, loss_reduction="sum")

    def norms() -> Tensor:
        wrapped.zero_grad()
        F.cross_entropy(wrapped(inputs), targets, reduction="sum").backward()
        samples = [parameter.grad_sample.flatten(1) for parameter in wrapped.parameters()]
        return torch.stack([one.square().sum(1) for one in samples]).sum(0).sqrt()

    return norms


def by_backpack(model: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[], Tensor]:
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    extended, loss_fn = extend(model), extend(nn.CrossEntropyLoss(reduction="sum"))

    def norms() -> Tensor:
        extended.zero_grad()
        with backpack(BatchL2Grad()):
            loss_fn(extended(inputs), targets).backward()
        return torch.stack([parameter.batch_l2 for parameter in extended.parameters()]).sum(0).sqrt()

    return norms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    images, labels = torch.randn(BATCH, 1, 8, 8), torch.randint(10, (BATCH,))
    tokens, next_tokens = torch.randint(256, (BATCH, 32)), torch.randint(256, (BATCH, 32))
    cases = {
        "convolutional net": (convolutional, partial(F.cross_entropy, reduction="none"), images, labels),
        "two-layer transformer": (transformer, token_loss, tokens, next_tokens),
    }
    for title, (make, loss_fn, inputs, targets) in cases.items():
        model = make()
        contenders = {
            way: partial(per_example_gradient_norms, model, loss_fn, inputs, targets, method=way)
            for way in ("ghost", "vmap", "loop")
        }
        if title == "convolutional net":
            for package, peer in {"opacus": by_opacus, "backpack": by_backpack}.items():
                if importlib.util.find_spec(package) is None:
                    print(f"{package} is not installed")
                else:
                    same = convolutional()
                    same.load_state_dict(model.state_dict())
                    contenders[package] = peer(same, inputs, targets)
        expected = contenders["loop"]()
        for name, norms in contenders.items():
            torch.testing.assert_close(
                norms(), expected, rtol=1e-4, atol=1e-5, msg=lambda told, name=name: f"{name}: {told}"
            )
        print(f"{title}, batch {BATCH}; bars: loop ≥ 20x, vmap ≥ 3x the time of ghost")
        tell(medians(contenders, options.turns), base="ghost")


if __name__ == "__main__":
    main()
