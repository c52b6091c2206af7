"""The YZ transformer without one-hot tensors against the one-hot recipe: `python benchmarks/scan_and_snap.py`.

2000 tokens in the vocabulary, 128 in a sequence. The recipe multiplies one-hot sequences (batch, length, vocab) with the
attention matrix by batched products, and draws its sequences one by one; outputs and gradients are compared first.
"""

import argparse
import resource
import sys

import torch
from interleaved import medians, tell
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from dynascope.data import SequenceClassData
from dynascope.nn import YZTransformer
from dynascope.theory.scan_snap import sample_gradients

VOCAB, LENGTH = 2000, 128


def recipe(model: YZTransformer, tokens: Tensor) -> Tensor:
    bag = one_hot(tokens, VOCAB).float()
    keys, query = bag[:, :-1] @ model.Z.T, bag[:, -1]
    weights = torch.bmm(keys, query[:, :, None])[..., 0].softmax(1)
    mixture = torch.bmm(weights[:, None], bag[:, :-1])[:, 0]
    return (mixture / mixture.norm(dim=1, keepdim=True)) @ model.Y.T


def one_by_one(data: SequenceClassData, count: int, generator: torch.Generator) -> Tensor:
    classes, sequences = data.classes, []
    for _ in range(count):
        chosen = classes[int(torch.randint(len(classes), (1,), generator=generator))]
        context = torch.multinomial(chosen.probs, data.length - 1, replacement=True, generator=generator)
        sequences.append(torch.cat([context, torch.tensor([chosen.query])]))
    return torch.stack(sequences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (options.batch, LENGTH), generator=generator)
    targets = torch.randint(VOCAB, (options.batch,), generator=generator)
    model = YZTransformer(VOCAB, init="uniform")
    counts = torch.zeros(options.batch, VOCAB).scatter_add_(1, tokens[:, :-1], torch.ones(options.batch, LENGTH - 1))

    def gradients(logits: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(cross_entropy(logits, targets), (model.Y, model.Z))

    ours, theirs = gradients(model(tokens)), gradients(recipe(model, tokens))
    gap = max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(ours, theirs, strict=True))
    print(f"relative difference of gradients {gap:.1e}")
    with torch.no_grad():
        print(f"\nforward, batch {options.batch}, on {torch.get_num_threads()} threads")
        forward = {"gathered": lambda: model(tokens), "one-hot": lambda: recipe(model, tokens)}
        tell(medians(forward, options.turns), "gathered")
    print("\nforward and backward")
    both = {
        "gathered": lambda: gradients(model(tokens)),
        "counts, gradients in closed form, per sample": lambda: sample_gradients(
            model.Y.detach(), model.Z.detach(), counts, tokens[:, -1], targets
        ),
        "one-hot": lambda: gradients(recipe(model, tokens)),
    }
    tell(medians(both, options.turns), "gathered")
    data = SequenceClassData(10, 2, length=LENGTH)
    print("\ndrawing 1000 sequences of 20 classes")
    draws = {
        "class by class": lambda: data.sample(1000, generator),
        "one by one": lambda: one_by_one(data, 1000, generator),
    }
    tell(medians(draws, options.turns), "class by class")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"\npeak memory, nearly all of it one-hot's, {peak / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
