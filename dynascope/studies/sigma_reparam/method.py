"""Transformers whose attention entropy collapses go unstable, and σReparam prevents both (arXiv 2303.06296).

A byte-level decoder on real text, without warmup, over learning rates: pre-LN and post-LN baselines, query-key
normalisation, and σReparam with no normalisation at all. A patch encoder on real digits: the same without layer norm,
warmup or weight decay, also under SGD. And one intervention: a healthy run whose attention logits are multiplied by 8.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import dynascope
from dynascope.data.text import python_sources, read_text
from dynascope.nn import sigma_reparam
from dynascope.record import Series
from dynascope.studies.harness import StudyRecord


@dataclass(frozen=True)
class Config:
    """Sizes and lengths; `lrs` of the arms are factors of `lr`."""

    width: int = 64
    depth: int = 4
    num_heads: int = 4
    context: int = 64
    batch_size: int = 12
    num_steps: int = 140
    num_vision_steps: int = 400
    lr: float = 1e-3
    look_every: int = 5
    """Steps between two looks at the attention of the text arms; the vision arms, whose claims ask for none, take ten
    times as many."""
    text: str | None = None
    """A text file (default: the standard library's sources)."""


@dataclass(frozen=True)
class Arm:
    """What differs between the arms."""

    norm: Literal["pre", "post", "none"] = "pre"
    is_sigma: bool = False
    has_qk_norm: bool = False
    lr_factor: float = 1.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    is_vision: bool = False
    has_warmup: bool = False
    weight_decay: float = 0.0
    logit_factor: float = 1.0
    """Attention logits are multiplied by this from half of the steps on."""


LR_FACTORS = (1.0, 3.0, 10.0, 30.0)
TEXT_ARMS = {
    "pre-ln": Arm(),
    "post-ln": Arm("post"),
    "qk-norm": Arm(has_qk_norm=True),
    "sigma": Arm("none", is_sigma=True),
}
BASELINES = ("pre-ln", "post-ln")


def at(name: str, factor: float) -> str:
    """The name of an arm at one learning rate."""
    return f"{name}-lr-x{factor:g}"


# The model


class Block(nn.Module):
    """Attention and MLP, each with its norm before (pre), after the sum (post), or nowhere."""

    def __init__(self, config: Config, arm: Arm, *, is_causal: bool) -> None:
        super().__init__()
        width = config.width
        self.num_heads, self.is_causal, self.placement = config.num_heads, is_causal, arm.norm
        self.norm1, self.norm2 = (nn.Identity() if arm.norm == "none" else nn.LayerNorm(width) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        head_width = width // config.num_heads
        self.query_norm, self.key_norm = (
            nn.LayerNorm(head_width) if arm.has_qk_norm else nn.Identity() for _ in range(2)
        )
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.logit_factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        if self.placement == "post":
            x = self.norm1(x + self.attend(x))
            return self.norm2(x + self.mlp(x))  # type: ignore[no-any-return]
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]

    def attend(self, x: Tensor) -> Tensor:
        """Multi-head attention."""
        query, key, value = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        query, key = self.query_norm(query) * self.logit_factor, self.key_norm(key)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.is_causal)
        return self.out(attended.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Tokens (or patches) in, logits and loss out."""

    def __init__(self, config: Config, arm: Arm, *, num_classes: int, length: int, patch_size: int | None) -> None:
        super().__init__()
        self.is_causal = patch_size is None
        self.embed = (
            nn.Embedding(num_classes, config.width) if patch_size is None else nn.Linear(patch_size, config.width)
        )
        self.position = nn.Parameter(torch.zeros(length, config.width))
        self.blocks = nn.ModuleList(Block(config, arm, is_causal=self.is_causal) for _ in range(config.depth))
        self.norm = nn.Identity() if arm.norm == "none" else nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, num_classes)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        if arm.is_sigma:
            # Embeddings keep unit scale, as no norm brings them to it.
            nn.init.normal_(self.position, std=1.0)
            if isinstance(self.embed, nn.Embedding):
                nn.init.normal_(self.embed.weight, std=1.0)
            sigma_reparam(self)

    def each_block(self) -> list[Block]:
        """The blocks from the first to the last."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        logits = self.head(x if self.is_causal else x.mean(1))
        return logits, F.cross_entropy(logits.flatten(0, -2), targets.flatten())


# The training


def train(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """One arm: the same batches and the same initial draws for every arm of a seed."""
    generator = torch.Generator().manual_seed(seed)
    if arm.is_vision:
        batches, evaluate = digits(config, generator)
        model = Transformer(config, arm, num_classes=10, length=16, patch_size=4)
        num_steps = config.num_vision_steps
    else:
        batches, evaluate = text(config, generator)
        model = Transformer(config, arm, num_classes=256, length=config.context, patch_size=None)
        num_steps = config.num_steps
    lr = config.lr * arm.lr_factor
    optimizer: torch.optim.Optimizer
    if arm.optimizer == "adamw":
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=arm.weight_decay, fused=True
        )
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=arm.weight_decay)
    warmup = max(1, num_steps // 10) if arm.has_warmup else 1
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))

    record.declare(
        Series("growth/qk", ("layer", "map"), "", "Spectral norm of query and key maps now over at the start.")
    )
    start = query_key_norms(model)
    every = config.look_every * (10 if arm.is_vision else 1)
    with dynascope.watch(model, optimizer, run=record, every=every, probes=["gradients", "attention"]):
        for step in range(num_steps):
            if step == num_steps // 2:
                for block in model.each_block():
                    block.logit_factor = arm.logit_factor
            _, loss = model(*batches())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    record.add(num_steps - 1, {"growth/qk": query_key_norms(model) / start})
    if arm.is_vision:
        record.add(num_steps - 1, {"accuracy": evaluate(model)})


def text(
    config: Config, generator: torch.Generator
) -> tuple[Callable[[], tuple[Tensor, Tensor]], Callable[..., float]]:
    """Batches of real text, next byte as target."""
    source = (read_text(config.text) if config.text else python_sources(1_000_000)).long()

    def batch() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(source) - config.context - 1, (config.batch_size,), generator=generator)
        rows = source[starts[:, None] + torch.arange(config.context + 1)]
        return rows[:, :-1], rows[:, 1:]

    return batch, lambda model: math.nan


def digits(
    config: Config, generator: torch.Generator
) -> tuple[Callable[[], tuple[Tensor, Tensor]], Callable[..., float]]:
    """Batches of 8 x 8 digits as 16 patches of 2 x 2, and the accuracy on 500 that are held out."""
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = ((images.float() - 4.88) / 6.02).view(-1, 4, 2, 4, 2).transpose(2, 3).flatten(3).flatten(1, 2)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out, used = order[:500], order[500:]

    def batch() -> tuple[Tensor, Tensor]:
        chosen = used[torch.randint(len(used), (4 * config.batch_size,), generator=generator)]
        return images[chosen], labels[chosen]

    @torch.no_grad()
    def accuracy(model: nn.Module) -> float:
        logits, _ = model.eval()(images[held_out], labels[held_out])
        return float((logits.argmax(-1) == labels[held_out]).float().mean())

    return batch, accuracy


@torch.no_grad()
def query_key_norms(model: Transformer) -> Tensor:
    """(layer, 2): spectral norms of the maps that make queries and keys, as they act."""
    maps = [[block.query.weight, block.key.weight] for block in model.each_block()]
    return torch.stack([torch.stack([torch.linalg.matrix_norm(one, ord=2) for one in pair]) for pair in maps])
