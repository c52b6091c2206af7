"""What hidden rewards cost: `python benchmarks/token_hidden_reward.py`.

A whole step of training with and without the slot; and the score itself, by the double sum over pairs of tokens that defines
it, as a matrix one prompt after the other, and as it is done here, all prompts at once and a chunk at a time.
"""

import argparse
import copy
from collections.abc import Callable

import torch
from interleaved import medians, tell
from torch import Tensor

from dynascope.rl import PolicyObjective, grpo, thr, token_hidden_reward
from dynascope.rl.loop import LoopConfig, train
from dynascope.rl.tasks.arithmetic import Arithmetic
from dynascope.rl.tasks.base_model import BaseModel, base_model


def step(objective: PolicyObjective, start: torch.nn.Module) -> Callable[[], None]:
    """One step of training of a copy that goes on from call to call."""
    model = copy.deepcopy(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    generator = torch.Generator().manual_seed(0)
    amount = LoopConfig(num_steps=1, num_prompts=32)
    return lambda: train(model, objective, Arithmetic(), optimizer, amount, generator=generator)


class Completions:
    """Random ones: 8 a prompt, half of them right."""

    def __init__(self, num_groups: int, width: int, vocabulary: int, length: int = 64) -> None:
        num = 8 * num_groups
        self.hidden, self.unembedding = torch.randn(num, length, width), torch.randn(vocabulary, width) / width**0.5
        self.tokens = torch.randint(vocabulary, (num, length))
        self.mask = torch.arange(length) < torch.randint(length // 2, length + 1, (num, 1))
        self.correct, self.groups = torch.arange(num) % 2 == 0, torch.arange(num) // 8

    def at_once(self, vocabulary: str = "full") -> Tensor:
        return token_hidden_reward(
            self.hidden, self.tokens, self.mask, self.correct, self.groups,
            unembedding=self.unembedding, vocabulary=vocabulary,
        ).influence  # fmt: skip

    def one_by_one(self) -> Tensor:
        return torch.cat([self._matrix(self.groups == group) for group in self.groups.unique()])

    def by_pairs(self) -> Tensor:
        return torch.cat([self._pairs(self.groups == group) for group in self.groups.unique()])

    def _errors(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        probs = (self.hidden[rows] @ self.unembedding.T).softmax(-1)
        error = (torch.nn.functional.one_hot(self.tokens[rows], probs.shape[-1]) - probs) * self.mask[rows][..., None]
        return error, self.hidden[rows]

    def _matrix(self, rows: Tensor) -> Tensor:
        error, hidden = self._errors(rows)
        right = self.correct[rows]
        matrix = torch.einsum("ntv,ntd->vd", error[right], hidden[right])
        return torch.einsum("ntv,vd,ntd->nt", error, matrix, hidden)

    def _pairs(self, rows: Tensor) -> Tensor:
        error, hidden = self._errors(rows)
        right = self.correct[rows]
        alike = torch.einsum("ntv,msv->ntms", error, error[right])
        return (alike * torch.einsum("ntd,msd->ntms", hidden, hidden[right])).sum((2, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=11)
    turns = parser.parse_args().turns
    torch.manual_seed(0)
    start = base_model(BaseModel(num_steps=200), seed=0)
    print("a step of training, 32 prompts of 8 answers, 2 layers of width 64")
    tell(medians({"grpo": step(grpo, start), "thr": step(thr, start)}, turns), "grpo")
    for num_groups, width, vocabulary in ((32, 64, 15), (8, 128, 1000), (2, 256, 32_000)):
        one = Completions(num_groups, width, vocabulary)
        error = (one.at_once() - one.by_pairs()).abs().max() / one.by_pairs().abs().max()
        print(f"\n{num_groups} prompts, width {width}, vocabulary {vocabulary}; relative difference {error:.1e}")
        contenders: dict[str, Callable[[], object]] = {
            "all at once": one.at_once,
            "columns of the group's tokens": lambda one=one: one.at_once("group"),  # type: ignore[misc]
            "a matrix a prompt": one.one_by_one,
            "pairs of tokens": one.by_pairs,
        }
        tell(medians(contenders, turns), "all at once")


if __name__ == "__main__":
    main()
