"""Active and dormant heads: which heads park on the sink, on which kind of text, and does the loss notice their going?

Source: 2410.13835, sections 3 and 4.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dynascope.nn.head_intervention import HeadIntervention, HeadState, attention_layers, num_heads
from dynascope.probes.attention import EARLY_QUERIES

DORMANT, ACTIVE = 0.89, 0.5
"""Mean attention to the sink above which a head is dormant (the cut-off of 2410.13835), and below which active (ours)."""
UNNOTICED = 0.02
"""Nats a token by which zeroing a dormant head may raise the loss (ours)."""

Batch: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""Tokens (rows, positions), or these and a bool mask of the positions whose queries and predictions count."""


@dataclass(frozen=True)
class HeadActivity:
    """What one head does on each domain."""

    layer: int
    head: int
    sink_score: Mapping[str, float]
    """Mean attention to the sink, by domain."""
    loss_change: Mapping[str, float] = field(default_factory=dict)
    """Loss with the head zeroed less the loss without, in nats a token, by domain; empty without the causal check."""

    def state(self, domain: str) -> Literal["dormant", "active", "between"]:
        """What the head is on a domain, by its attention."""
        score = self.sink_score[domain]
        return "dormant" if score > DORMANT else "active" if score < ACTIVE else "between"

    def is_confirmed(self, domain: str) -> bool:
        """Whether zeroing the head leaves the loss as it is where it is dormant, and raises it where it is active.

        Raises ValueError when there was no causal check.
        """
        if not self.loss_change:
            raise ValueError("there was no causal check; call classify_heads with is_causal_check=True")
        is_unnoticed = self.loss_change[domain] < UNNOTICED
        return is_unnoticed if self.state(domain) == "dormant" else not is_unnoticed

    @property
    def is_active_dormant(self) -> bool:
        """Dormant on one domain and active on another."""
        states = {self.state(domain) for domain in self.sink_score}
        return {"dormant", "active"} <= states


@torch.no_grad()
def classify_heads(
    model: nn.Module,
    domains: Mapping[str, Iterable[Batch]],
    *,
    is_causal_check: bool = True,
    logits: Callable[[Any], Tensor] = lambda output: output if isinstance(output, Tensor) else output.logits,
) -> list[HeadActivity]:
    """Where each head attends on each domain, and what its absence costs there, in the order of layers and heads.

    The sink is each row's first key; its first five queries are left out. Batches are gone through once for the attention,
    once for the loss, and once a head for the loss without it, so give lists, not generators. `logits` reads next-token
    logits from what the model returns. The model is left as it was, in evaluation mode meanwhile.

    Raises ValueError for a domain without batches, or a model whose heads cannot be reached. Source: 2410.13835, section 4.

    >>> for head in classify_heads(model, {"code": code_batches, "prose": prose_batches}):
    ...     print(head.layer, head.head, head.state("code"), head.loss_change["code"])
    """
    batches = {domain: [_parts(batch) for batch in given] for domain, given in domains.items()}
    empty = [domain for domain, given in batches.items() if not given]
    if empty or not batches:
        raise ValueError(f"no batches of {', '.join(empty) or 'any domain'}; give at least one a domain")
    layers = attention_layers(model)
    was_training = model.training
    model.eval()
    try:
        scores = {domain: _sink_scores(model, given) for domain, given in batches.items()}
        heads = [(layer, head) for layer, module in layers.items() for head in range(num_heads(module))]
        changes: dict[tuple[int, int], dict[str, float]] = {}
        if is_causal_check:
            before = {domain: _loss(model, given, logits) for domain, given in batches.items()}
            for place in heads:
                with HeadIntervention(model, [place], "zero"):
                    changes[place] = {
                        domain: _loss(model, given, logits) - before[domain] for domain, given in batches.items()
                    }
    finally:
        model.train(was_training)
    return [
        HeadActivity(
            layer,
            head,
            {domain: float(scores[domain][layer][head]) for domain in batches},
            changes.get((layer, head), {}),
        )
        for layer, head in heads
    ]


def _parts(batch: Batch) -> tuple[Tensor, Bool[Tensor, "rows positions"]]:
    tokens, counted = batch if isinstance(batch, tuple) else (batch, torch.ones_like(batch, dtype=torch.bool))
    return tokens, counted


def _sink_scores(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[int, Float[Tensor, " heads"]]:
    """Mean attention of each layer's heads to the sink."""
    sums: dict[int, Tensor] = {}
    number = 0
    for tokens, counted in batches:
        counted = counted.clone()
        counted[:, :EARLY_QUERIES] = False
        number += int(counted.sum())
        seen: list[Tensor] = []

        def look(state: HeadState, seen: list[Tensor] = seen, counted: Tensor = counted) -> HeadState:
            to_sink = (state.weights * state.at_sink()).sum(-1)
            seen.append((to_sink * counted[:, None]).sum((0, 2)))
            return state

        with HeadIntervention(model, None, look):
            model(tokens)
        for layer, one in zip(attention_layers(model), seen, strict=True):
            sums[layer] = sums.get(layer, torch.zeros_like(one)) + one
    return {layer: one / max(number, 1) for layer, one in sums.items()}


def _loss(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], logits: Callable[[Any], Tensor]) -> float:
    """Mean next-token cross-entropy over the positions that count."""
    total, number = torch.zeros(()), 0
    for tokens, counted in batches:
        predicted = logits(model(tokens))[:, :-1]
        losses = F.cross_entropy(predicted.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
        chosen = counted[:, :-1].flatten()
        total, number = total.to(losses.device) + losses[chosen].sum(), number + int(chosen.sum())
    return float(total) / max(number, 1)
