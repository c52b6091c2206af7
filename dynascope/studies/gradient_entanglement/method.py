"""Margin losses pull both responses of a pair the same way, the more they share (arXiv 2410.13828).

A small transformer reads a prompt, then a label and a suffix. Chosen and rejected responses differ in the label alone; the
suffix is random and shared, so that it cannot be learnt and its gradients stay. A short supervised phase teaches labels
and suffixes; then one margin loss takes plain gradient steps, one pair at a time. Before each step the gradients of the
pair's two log-probabilities predict how the step moves them; after it, they are evaluated again. Remedies are DPO's: other
weights of the two responses, or weights of tokens, by a diff of the two or learnt with a penalty from the start model's states.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynascope.losses import (
    MarginLoss,
    PreferencePairs,
    SparseTokenMask,
    contrastive_token_mask,
    disentangled_weights,
    margin_loss,
    masked_pairs,
    normalized_weights,
    token_log_probs,
)
from dynascope.losses.preference import Coefficients
from dynascope.probes.entanglement import (
    PairProducts,
    PreferenceBatch,
    entanglement,
    products_of,
    response_log_probs,
    summarized,
    token_map,
)
from dynascope.record import Series
from dynascope.studies.harness import StudyRecord

NUM_LABELS, FIRST_SUFFIX = 2, 2
"""Token ids: two labels, then the tokens of suffixes, then those of prompts."""


@dataclass(frozen=True)
class Config:
    """Sizes, and how long the phases are."""

    width: int = 48
    num_layers: int = 2
    num_heads: int = 4
    prompt_length: int = 8
    num_suffix_tokens: int = 16
    num_prompt_tokens: int = 16
    num_pairs: int = 64
    sft_steps: int = 150
    sft_batch: int = 32
    sft_lr: float = 1e-3
    num_steps: int = 256
    """Steps of the preference phase, one pair each."""
    rate: float = 1e-3
    """The learning rate times the larger of the loss's two coefficients at the start, so that no loss takes large steps."""
    mask_lr: float = 20.0
    """Of the learnt mask, by plain gradient steps: those of Adam make it vanish before there is a margin to learn from."""
    mask_penalty: float = 3e-4
    """Of a token's whole weight in the learnt mask."""
    look_every: int = 32

    def __post_init__(self) -> None:
        if min(self.num_pairs, self.sft_steps, self.num_steps, self.look_every, self.prompt_length) < 1:
            raise ValueError("every number of pairs, steps and tokens must be at least 1")
        if self.rate <= 0 or self.width % self.num_heads:
            raise ValueError("rate must be positive, and width a multiple of num_heads")


@dataclass(frozen=True)
class Arm:
    """A loss, its settings, how many suffix tokens both responses share, and what is done to its weights."""

    loss: str = "dpo"
    suffix: int = 8
    remedy: str = ""
    """"normalized" or "disentangled" weights, the "diff" mask or the learnt "sparse" one; "" is the loss as it is."""


SUFFIXES = (0, 2, 8)


class Transformer(nn.Module):
    """A causal transformer on token ids."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        size = FIRST_SUFFIX + config.num_suffix_tokens + config.num_prompt_tokens
        self.embed = nn.Embedding(size, config.width)
        self.position = nn.Embedding(config.prompt_length + 1 + max(SUFFIXES), config.width)
        self.blocks = nn.ModuleList(_Block(config.width, config.num_heads) for _ in range(config.num_layers))
        self.norm, self.head = nn.LayerNorm(config.width), nn.Linear(config.width, size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (sequences, positions, vocabulary)."""
        logits: Tensor = self.head(self.hidden(tokens))
        return logits

    def hidden(self, tokens: Tensor) -> Tensor:
        """States before the head (sequences, positions, width)."""
        # A row of positions for each sequence, so that each has gradients of its own.
        hidden = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]).expand_as(tokens))
        for block in self.blocks:
            hidden = block(hidden)
        normed: Tensor = self.norm(hidden)
        return normed


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        heads = self.qkv(self.norms[0](hidden)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(2))
        forward: Tensor = hidden + self.down(F.gelu(self.up(self.norms[1](hidden))))
        return forward


def sentiment_suffix(config: Config, suffix: int, count: int, generator: torch.Generator) -> PreferenceBatch:
    """Pairs whose label is the sentiment of a random prompt, and the other one; then `suffix` shared random tokens.

    The sentiment is whether most of the prompt's tokens come from the upper half of their alphabet.
    """
    first_prompt = FIRST_SUFFIX + config.num_suffix_tokens
    words = torch.randint(config.num_prompt_tokens, (count, config.prompt_length), generator=generator)
    label = (words.float().mean(1) > (config.num_prompt_tokens - 1) / 2).long()
    shared = torch.randint(config.num_suffix_tokens, (count, suffix), generator=generator) + FIRST_SUFFIX
    tokens = torch.cat([torch.cat([words + first_prompt, one[:, None], shared], 1) for one in (label, 1 - label)])
    mask = torch.ones_like(tokens)
    mask[:, : config.prompt_length] = 0
    return PreferenceBatch(tokens, mask)


def train(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """Supervised training on both labels, then one pair at a time down the margin loss."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = Transformer(config)
    supervise(config, arm.suffix, model, generator)
    pairs = sentiment_suffix(config, arm.suffix, config.num_pairs, generator)
    order = torch.cat([torch.randperm(config.num_pairs, generator=generator) for _ in range(_epochs(config))])
    with torch.no_grad():
        reference = tokenwise(model, pairs)
    preference(config, arm, model, pairs, reference, order, record)
    if arm.suffix and not arm.remedy:
        found = token_map(model, pairs.pair(0), parameters="head|blocks.1")
        record.declare(Series("token_map", ("chosen_token", "rejected_token")))
        record.add(config.num_steps, {"token_map": found})


def _epochs(config: Config) -> int:
    return math.ceil(config.num_steps / config.num_pairs)


def supervise(config: Config, suffix: int, model: nn.Module, generator: torch.Generator) -> None:
    """Learn both labels with fresh pairs."""
    optimizer = torch.optim.Adam(model.parameters(), lr=config.sft_lr)
    for _ in range(config.sft_steps):
        batch = sentiment_suffix(config, suffix, config.sft_batch // 2, generator)
        optimizer.zero_grad()
        (-response_log_probs(model, batch).mean()).backward()
        optimizer.step()


def tokenwise(model: nn.Module, batch: PreferenceBatch) -> Tensor:
    """log π of each token (sequences, positions − 1); 0 off the responses."""
    return token_log_probs(model(batch.tokens), batch.tokens, batch.mask)


def preference(
    config: Config,
    arm: Arm,
    model: Transformer,
    pairs: PreferenceBatch,
    reference: Tensor,
    order: Tensor,
    record: StudyRecord,
) -> None:
    """Steps of gradient descent, one pair each, with what they should have done and what they did."""
    parameters = list(model.parameters())
    loss = loss_of(arm.loss)
    lr = learning_rate(config.rate, loss, pairs, reference.sum(1))
    counts = Counts(config, arm, model, pairs)
    predicted: list[Tensor] = []
    realised: list[Tensor] = []
    geometry: list[PairProducts] = []
    record.declare(
        Series("log_prob", ("side",), "nat", "Mean over all pairs.", coords={"side": ["chosen", "rejected"]})
    )

    def look(step: int) -> None:
        with torch.no_grad():
            means = response_log_probs(model, pairs).view(2, -1).mean(1)
        record.add(step, {"log_prob": means})

    for step, index in enumerate(order[: config.num_steps].tolist()):
        if step % config.look_every == 0:
            look(step)
        pair, ref = pairs.pair(index), reference[[index, config.num_pairs + index]]
        weights, tokens = counts.of(index), tokenwise(model, pair)
        log_probs = (tokens * weights).sum(1)
        sides = list(_gradients(log_probs, parameters))
        products = products_of(*(torch.cat([one.flatten() for one in side])[None].double() for side in sides))
        pull, push = _weights(arm, products, loss.coefficients(weighted(tokens.detach(), weights, ref)))
        outcome = entanglement(products, (pull, push), float(lr))
        with torch.no_grad():
            for parameter, up, down in zip(parameters, *sides, strict=True):
                parameter += lr * (pull[0].float() * up - push[0].float() * down)
            realised.append((tokenwise(model, pair) * weights).sum(1) - log_probs)
        counts.learn(index, loss, tokens.detach(), ref)
        predicted.append(torch.cat([outcome.chosen_change, outcome.rejected_change]))
        geometry.append(products)
    look(config.num_steps)
    if arm.remedy:
        record.declare(Series("token_weight", ("token",), description="Of chosen responses, mean over pairs."))
        kept = torch.stack([counts.of(index)[0] for index in range(config.num_pairs)]).mean(0)
        record.add(config.num_steps, {"token_weight": kept[config.prompt_length - 1 :]})
    _tell(record, config, torch.stack(predicted), torch.stack(realised), geometry)


def learning_rate(rate: float, loss: MarginLoss, pairs: PreferenceBatch, known: Tensor) -> Tensor:
    """`rate` over the larger coefficient at the reference and a little below it, where DPOP pulls harder."""
    seen = [loss.coefficients(pairs.pairs(one, known)) for one in (known, known - 1e-3)]
    return rate / torch.cat([*seen[0], *seen[1]]).abs().max()


def loss_of(name: str) -> MarginLoss:
    """A loss with the study's settings."""
    return margin_loss(name, **SETTINGS.get(name, {}))


SETTINGS: dict[str, dict[str, Any]] = {"kto": {"baseline": 0.05}, "dpop": {"weight": 5.0}}


class Counts:
    """How much each token of a pair counts in the margin, (2, positions − 1): by a mask of the pair, or one that learns."""

    def __init__(self, config: Config, arm: Arm, model: Transformer, pairs: PreferenceBatch) -> None:
        self.pairs, self.is_diff, self.mask = pairs, arm.remedy == "diff", None
        if arm.remedy == "sparse":
            self.mask = SparseTokenMask(config.width, penalty=config.mask_penalty)
            self.optimizer = torch.optim.SGD(self.mask.parameters(), lr=config.mask_lr)
            with torch.no_grad():
                states = model.hidden(pairs.tokens)
            # What all tokens share would move all of their weights together.
            self.states = states - states[pairs.mask.bool()].mean(0)

    def of(self, index: int) -> Tensor:
        """Without a gradient."""
        with torch.no_grad():
            return self._of(index)

    def _of(self, index: int) -> Tensor:
        pair = self.pairs.pair(index)
        mask = pair.mask
        if self.mask is not None:
            weights: Tensor = self.mask(self.states[[index, self.pairs.num_pairs + index]], mask)
            return weights[:, 1:]
        if self.is_diff:
            mask = torch.cat(contrastive_token_mask(pair.tokens[:1], pair.tokens[1:], mask[:1], mask[1:]))
        return mask[:, 1:].float()

    def learn(self, index: int, loss: MarginLoss, tokens: Tensor, reference: Tensor) -> None:
        """A step of a learnt mask, down the pair's loss and what its weights cost."""
        if self.mask is None:
            return
        self.optimizer.zero_grad()
        weights = self._of(index)
        (
            loss(weighted(tokens, weights, reference)).sum()
            + self.mask.cost(weights, self.pairs.pair(index).mask[:, 1:])
        ).backward()
        self.optimizer.step()


def weighted(tokens: Tensor, weights: Tensor, reference: Tensor) -> PreferencePairs:
    """A pair as a loss sees it, from log-probabilities token by token, (2, positions − 1) each."""
    return masked_pairs(tokens[:1], tokens[1:], weights[:1], weights[1:], reference[:1], reference[1:])


def _gradients(log_probs: Tensor, parameters: list[nn.Parameter]) -> Iterator[tuple[Tensor, ...]]:
    for side in range(2):
        yield torch.autograd.grad(log_probs[side], parameters, retain_graph=side == 0, materialize_grads=True)


def _weights(arm: Arm, products: PairProducts, weights: Coefficients) -> Coefficients:
    weights = weights[0].double(), weights[1].double()
    if arm.remedy == "normalized":
        return normalized_weights(products.chosen, products.rejected, weights)
    if arm.remedy == "disentangled":
        return disentangled_weights(products.inner, products.chosen, products.rejected, weights)
    return weights


def _tell(
    record: StudyRecord, config: Config, predicted: Tensor, realised: Tensor, geometry: list[PairProducts]
) -> None:
    """Changes step by step (steps, side), and the geometry of all pairs at the steps at which they were seen."""
    whole = PairProducts(("all",), torch.cat([one.table for one in geometry], 2))
    ones = torch.ones_like(whole.inner)
    for name, values in (("predicted", predicted), ("realised", realised)):
        record.declare(Series(name, ("update", "side"), "nat", coords={"side": ["chosen", "rejected"]}))
        record.add(config.num_steps, {name: values})
    record.declare(Series("cosine", ("update",), description="Of the pair's two gradients, before each update."))
    record.declare(Series("entanglement/case_share", ("case",), description="Shares of pairs under equal weights."))
    even = entanglement(whole, (ones, ones))
    record.add(config.num_steps, {"cosine": even.cosine, **summarized(even)})
