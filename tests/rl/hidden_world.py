"""A small world of completions with hidden states, for tests of hidden rewards and of the slots that steer by them."""

from typing import Any

import torch
from torch import Tensor

from dynascope.rl.advantages import group_z_score
from dynascope.rl.batch import PolicyBatch
from dynascope.rl.hidden_reward import HiddenReward, token_hidden_reward

VOCABULARY, WIDTH = 7, 4


class World:
    """Groups of sizes 4, 3 and 2, interleaved: mixed, mixed, all right; float64."""

    def __init__(self, length: int = 5) -> None:
        generator = torch.Generator().manual_seed(0)
        self.group_ids = torch.tensor([5, 5, 2, 5, 2, 9, 5, 2, 9])
        self.correct = torch.tensor([True, False, True, True, False, True, False, False, True])
        lengths = torch.randint(1, length + 1, (9,), generator=generator)
        self.mask = torch.arange(length) < lengths[:, None]
        self.tokens = torch.randint(VOCABULARY, (9, length), generator=generator)
        self.hidden = torch.randn(9, length, WIDTH, generator=generator, dtype=torch.float64)
        self.unembedding = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)

    @property
    def advantage(self) -> Tensor:
        return group_z_score(self.correct.double(), self.group_ids, std="population", eps=0.0)

    def measure(self, **changes: Any) -> HiddenReward:
        given = {"group_ids": self.group_ids, "unembedding": self.unembedding, **changes}
        return token_hidden_reward(self.hidden, self.tokens, self.mask, self.correct, **given)

    def batch(self, **changes: Any) -> PolicyBatch:
        return PolicyBatch(
            **{
                "mask": self.mask,
                "rewards": self.correct.float(),
                "group_ids": self.group_ids,
                "correct": self.correct,
                "hidden": self.hidden,
                "unembedding": self.unembedding,
                "tokens": self.tokens,
                "entropy": torch.rand(self.mask.shape),
                **changes,
            }
        )
