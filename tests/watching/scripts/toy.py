"""What the scripts share: a tiny transformer, data, and a way to say how the training ended, to the last bit."""

import random
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, LENGTH, STEPS = 11, 8, 6


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        query, key, value = self.qkv(self.norm(x)).view(rows, length, 3, 2, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.mlp(x)


class Toy(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def seed(value: int = 0) -> None:
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def batch(rows: int = 6) -> Tensor:
    return torch.randint(VOCABULARY, (rows, LENGTH))


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def finish(losses: list[Tensor], *models: nn.Module, optimizers: tuple = (), **extra: object) -> None:
    torch.save(
        {
            "losses": [loss.detach() for loss in losses],
            "weights": [{name: value.clone() for name, value in model.state_dict().items()} for model in models],
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "random": [torch.get_rng_state(), repr(random.getstate()), repr(np.random.get_state())],
            **extra,
        },
        sys.argv[1],
    )
