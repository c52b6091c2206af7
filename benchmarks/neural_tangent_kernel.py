"""The empirical kernel against the torch.func recipe: `python benchmarks/neural_tangent_kernel.py`.

512 × 512 examples and 10 outputs, on an MLP and two convolutional nets; values are compared first, and peak memory is
told. The recipe takes the whole Jacobian (vmap of jacrev) and contracts it parameter by parameter. neural_tangents
stands beside it where it is installed. Then the MLP and a transformer block over numbers of examples and outputs.
"""

import argparse
import importlib.util
import resource
import sys

import torch
from interleaved import medians, tell
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from dynascope.kernels import ntk, ntk_trace, ntk_vp, top_eigenvalue


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def convolutional() -> nn.Sequential:
    """With dense layers behind the convolutions."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def pooled() -> nn.Sequential:
    """Nothing but convolutions and a pooled head, where the contraction is most of the work for everyone."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


class Block(nn.Module):
    """A transformer block of 4 heads over 16 tokens of width 64, whose mean is read."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(64, 64) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        self.head = nn.Linear(64, outputs)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norms[0](x)
        heads = (part(normed).unflatten(2, (4, 16)).transpose(1, 2) for part in (self.query, self.key, self.value))
        query, key, value = heads
        attended = (query @ key.mT / 4).softmax(-1) @ value
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return self.head((x + self.mlp(self.norms[1](x))).mean(1))


def grid(turns: int) -> None:
    """Both ways over numbers of examples and outputs, as far as the recipe's Jacobian stays below half a GiB."""
    for outputs in (1, 10, 100):
        mlp = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, outputs))
        for name, model, shape in (("MLP", mlp, (64,)), ("transformer block", Block(outputs), (16, 64))):
            for examples in (32, 128):
                if 4 * examples * outputs * sum(one.numel() for one in model.parameters()) > 2**29:
                    continue
                x = torch.randn(examples, *shape)
                gap = float((ntk(model, x) - recipe(model, x)).norm() / recipe(model, x).norm())
                ways = {
                    "ours": lambda model=model, x=x: ntk(model, x),
                    "theirs": lambda model=model, x=x: recipe(model, x),
                }
                ours, theirs = medians(ways, turns).values()
                told = f"{name}, {examples} examples, {outputs} outputs"
                print(f"{told:46} {1e3 * ours:10.2f} ms, the recipe {theirs / ours:6.1f}x; difference {gap:.0e}")


def recipe(model: nn.Module, x: Tensor) -> Tensor:
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    jacobian = vmap(
        jacrev(lambda values, one: functional_call(model, values, one[None])[0]), in_dims=(None, 0), chunk_size=64
    )(parameters, x)
    flat = [one.flatten(2) for one in jacobian.values()]
    kernel = torch.einsum("naf,mbf->nmab", flat[0], flat[0])
    for one in flat[1:]:
        kernel += torch.einsum("naf,mbf->nmab", one, one)
    return kernel


def by_neural_tangents(x: Tensor):
    import neural_tangents as nt
    from jax import jit, random
    from neural_tangents import stax

    layers = [stax.Dense(512), stax.Relu(), stax.Dense(512), stax.Relu(), stax.Dense(10)]
    init, apply, _ = stax.serial(*layers)
    _, params = init(random.PRNGKey(0), (-1, 64))
    kernel = jit(
        nt.empirical_ntk_fn(
            apply, trace_axes=(), vmap_axes=0, implementation=nt.NtkImplementation.STRUCTURED_DERIVATIVES
        )
    )
    inputs = x.numpy()
    return lambda: kernel(inputs, None, params).block_until_ready()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--only", choices=["grid"], help="one part")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.only == "grid":
        grid(options.turns)
        return
    cases = {
        "MLP 64-512-512-10": (perceptron(), torch.randn(options.examples, 64)),
        "conv net, dense head": (convolutional(), torch.randn(options.examples, 1, 8, 8)),
        "conv net, pooled head": (pooled(), torch.randn(options.examples, 1, 8, 8)),
    }
    for name, (model, x) in cases.items():
        print(f"\n{name}: {options.examples} x {options.examples} examples, 10 outputs")
        few = x[:32]
        expected = recipe(model, few)
        print(f"relative difference {float((ntk(model, few) - expected).norm() / expected.norm()):.1e}")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ntk(model, x)
        layered = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        contenders = {"layer by layer": lambda model=model, x=x: ntk(model, x)}
        if name.startswith("MLP") and importlib.util.find_spec("neural_tangents"):
            contenders["neural_tangents, structured"] = by_neural_tangents(x)
        contenders["torch.func recipe"] = lambda model=model, x=x: recipe(model, x)
        measured = medians(contenders, options.turns, warmup=1)
        tell(measured, "layer by layer")
        unit = 1 if sys.platform == "darwin" else 1024
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(
            f"peak memory: {before * unit / 2**30:.1f} GiB before, {layered * unit / 2**30:.1f} layer by layer, ",
            end="",
        )
        print(f"{after * unit / 2**30:.1f} with the recipe")
    print("\nwithout forming the kernel, MLP")
    model, x = cases["MLP 64-512-512-10"]
    start = torch.randn(len(x) * 10)
    product = lambda v: ntk_vp(model, x, v.view(-1, 10)).flatten()  # noqa: E731
    measured = medians(
        {
            "whole kernel": lambda: ntk(model, x),
            "its trace": lambda: ntk_trace(model, x),
            "its top eigenvalue (10 products)": lambda: top_eigenvalue(product, start, iterations=10),
        },
        turns=3,
    )
    tell(measured, "whole kernel")
    print()
    grid(options.turns)


if __name__ == "__main__":
    main()
