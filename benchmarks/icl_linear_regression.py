"""The two products of every head against its four projections, and Monte Carlo in one call against a loop over prompts.

`python benchmarks/icl_linear_regression.py`; 5 inputs, 40 examples, 256 prompts a step, one thread unless told otherwise.
The recipe projects queries, keys and values of all tokens as the authors' layer does, each network by itself, with its
prompts drawn one tensor after the other; outputs are compared first.
"""

import argparse
import resource
import sys
from collections.abc import Sequence

import numpy as np
import torch
from interleaved import medians, tell
from scipy.special import softmax
from torch import Tensor, nn

from dynascope.data.in_context.linear_regression import LinearRegressionICL, Prompts
from dynascope.nn.icl_attention import MultiHeadSoftmaxICL
from dynascope.theory.in_context_regression import (
    debiased_gd_predict,
    gd_predict,
    ridge_predict,
    softmax_heads_predict,
)

DIM, LENGTH, NOISE, BATCH = 5, 40, 0.1, 256


class Projections(nn.Module):
    """The straightforward layer: query, key, value and output projections, every head as wide as the token."""

    def __init__(self, model: MultiHeadSoftmaxICL, network: int) -> None:
        super().__init__()
        parts = [part[network] for part in (model.query, model.key, model.value, model.out)]
        self.num_heads, _, self.width = parts[0].shape
        wide = self.num_heads * self.width
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(self.width, wide, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(wide, parts[3].shape[1], bias=False)
        with torch.no_grad():
            for linear, part in zip((self.q_proj, self.k_proj, self.v_proj), parts[:3], strict=True):
                linear.weight.copy_(part.flatten(0, 1))
            self.o_proj.weight.copy_(parts[3].movedim(0, 1).flatten(1))

    def forward(self, context: Tensor, query: Tensor) -> Tensor:
        shape = (self.num_heads, self.width)
        queries = self.q_proj(query)[:, None].unflatten(2, shape).transpose(1, 2)
        keys, values = (part(context).unflatten(2, shape).transpose(1, 2) for part in (self.k_proj, self.v_proj))
        weights = (queries @ keys.mT / self.width**0.5).softmax(-1)
        out: Tensor = self.o_proj((weights @ values).transpose(1, 2).flatten(1))
        return out


def drawn(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of prompts, a tensor at a time."""
    beta = torch.randn(count, DIM, 1, generator=generator) / DIM**0.5
    x, query = torch.randn(count, LENGTH, DIM, generator=generator), torch.randn(count, DIM, generator=generator)
    y = x @ beta + NOISE**0.5 * torch.randn(count, LENGTH, 1, generator=generator)
    target = (query[:, None] @ beta)[:, 0] + NOISE**0.5 * torch.randn(count, 1, generator=generator)
    return torch.cat([x, y], 2), torch.cat([query, torch.zeros(count, 1)], 1), target


def recipe_step(layer: Projections, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> float:
    context, query, target = drawn(BATCH, generator)
    optimizer.zero_grad()
    loss = (layer(context, query) - target).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()  # as the authors' progress bar reads it at every step


def our_step(
    model: MultiHeadSoftmaxICL,
    optimizer: torch.optim.Optimizer,
    sampler: LinearRegressionICL,
    generator: torch.Generator,
) -> None:
    batch = sampler.sample(BATCH, generator)
    optimizer.zero_grad()
    (model(batch.context, batch.query) - batch.target).square().mean((1, 2)).sum().backward()
    optimizer.step()


def answers_to_one(x: np.ndarray, y: np.ndarray, query: np.ndarray) -> np.ndarray:
    """What two heads, one head, and three estimators say of one query, in NumPy and SciPy as the authors have it."""
    logits, inverse = x @ query, np.linalg.inv(x.T @ x + NOISE * DIM * np.eye(DIM))
    pair = sum(mu * (y @ softmax(omega * logits)) for omega, mu in ((0.13, 3.45), (-0.13, -3.45)))
    descent = 0.9 * (y @ logits) / len(x)
    bias = 0.9 * y.sum() * (x.mean(0) @ query) / len(x)
    return np.array([pair, 1.63 * (y @ softmax(0.45 * logits)), descent, descent - bias, query @ inverse @ x.T @ y])


def risks_by_loop(lengths: Sequence[int], count: int, random: np.random.Generator) -> np.ndarray:
    """Risk of each at each length, prompt by prompt."""
    risks = np.zeros((len(lengths), 5))
    for place, length in enumerate(lengths):
        for _ in range(count):
            beta, query = random.normal(0, DIM**-0.5, DIM), random.normal(0, 1, DIM)
            x = random.normal(0, 1, (length, DIM))
            y = x @ beta + random.normal(0, NOISE**0.5, length)
            target = query @ beta + random.normal(0, NOISE**0.5)
            risks[place] += (answers_to_one(x, y, query) - target) ** 2 / count
    return risks


def answers_at_once(batch: Prompts, lengths: Sequence[int]) -> Tensor:
    """The same of all prompts, (lengths, predictors, prompts): a shorter prompt is the beginning of a longer one."""
    x, y, query = batch.x.contiguous(), batch.y[..., 0].contiguous(), batch.query_x
    said = [
        softmax_heads_predict(x, y, query, torch.tensor([0.13, -0.13]), torch.tensor([3.45, -3.45]), lengths),
        softmax_heads_predict(x, y, query, torch.tensor([0.45]), torch.tensor([1.63]), lengths),
        gd_predict(x, y, query, 0.9, lengths),
        debiased_gd_predict(x, y, query, 0.9, lengths),
        ridge_predict(x, y, query, NOISE, lengths),
    ]
    return torch.stack(said, 1)


def risks_at_once(
    lengths: Sequence[int], count: int, sampler: LinearRegressionICL, generator: torch.Generator
) -> Tensor:
    batch = sampler.sample(count, generator, length=max(lengths))
    return (answers_at_once(batch, lengths) - batch.target[:, 0]).square().mean(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sampler, generator = LinearRegressionICL(DIM, LENGTH, NOISE), torch.Generator().manual_seed(0)
    context, query, _ = drawn(BATCH, generator)
    for heads, networks in ((2, 1), (2, 10), (8, 1)):
        model = MultiHeadSoftmaxICL(DIM, heads, num_networks=networks, generator=generator)
        layers = [Projections(model, network) for network in range(networks)]
        expected = torch.stack([layer(context, query) for layer in layers])
        print(f"\n{heads} heads, {networks} networks: largest difference", end=" ")
        print(
            f"{float((model(context, query) - expected).detach().abs().max()):.1e}; {options.steps} steps of training"
        )
        ours = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        theirs = [torch.optim.Adam(layer.parameters(), lr=1e-3) for layer in layers]
        contenders = {
            "two products, networks side by side": lambda model=model, ours=ours: [
                our_step(model, ours, sampler, generator) for _ in range(options.steps)
            ],
            "of which its prompts": lambda: [sampler.sample(BATCH, generator) for _ in range(options.steps)],
            "four projections, one by one": lambda layers=layers, theirs=theirs: [
                recipe_step(layer, optimizer, generator)
                for layer, optimizer in zip(layers, theirs, strict=True)
                for _ in range(options.steps)
            ],
        }
        tell(medians(contenders, options.turns), "two products, networks side by side")
    lengths, few = range(10, 101, 5), max(1, options.prompts // 100)
    random = np.random.default_rng(0)
    batch = sampler.sample(20, generator, length=max(lengths))
    one_by_one = [
        [answers_to_one(x[:length], y[:length, 0], query) for x, y, query in zip(*parts, strict=True)]
        for parts in [[one.double().numpy() for one in (batch.x, batch.y, batch.query_x)]]
        for length in lengths
    ]
    gap = float((answers_at_once(batch, lengths) - torch.tensor(np.array(one_by_one)).mT).abs().max())
    print(
        f"\nMonte Carlo, {options.prompts} prompts, {len(lengths)} lengths, five predictors; largest difference",
        end=" ",
    )
    print(f"of answers {gap:.0e}; the loop does a hundredth of the prompts, and is scaled")
    monte_carlo = {
        "all lengths at once": lambda: risks_at_once(lengths, options.prompts, sampler, generator),
        "prompt by prompt": lambda: risks_by_loop(lengths, few, random),
    }
    measured = medians(monte_carlo, options.turns)
    measured["prompt by prompt"] *= options.prompts / few
    tell(measured, "all lengths at once")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"\npeak memory {peak / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
