"""Heads that have nothing to do breed attention sinks, drained values and residual peaks (arXiv 2410.13835).

Bigram-Backcopy: characters follow a bigram law, but after a trigger comes the token before it. One layer of softmax attention
learns to copy at triggers and parks on <s> elsewhere, whose value it empties; ReLU attention solves the task as well and needs
no sink. With three layers the residual state of <s> grows besides under Adam; in the paper not under SGD, nor with ReLU
attention.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dynascope.data.bigram_backcopy import BigramBackcopy, bigram_from_text, dirichlet_bigram
from dynascope.data.text import read_text
from dynascope.nn.toy_transformer import ToyTransformer
from dynascope.probes.extreme_tokens import ExtremeTokens, extreme_token_summary
from dynascope.probes.head_activity import classify_heads
from dynascope.probes.probe import Need
from dynascope.probes.views import AttentionCall, ModuleOutput, attention_blocks
from dynascope.record import Series
from dynascope.studies.harness import StudyRecord, descend, log_steps
from dynascope.watching.shadow import tap


@dataclass(frozen=True)
class Config:
    """Sizes, lengths and learning rates; each attention and optimizer at a rate that suits it.

    The defaults draw 24 sequences of 32 tokens a step, so that all arms and three seeds take minutes on two cores.
    """

    num_tokens: int = 32
    """Tokens of a random bigram law (Dirichlet, concentration 0.3), unless there is a text."""
    text: str | None = None
    """A text file whose characters and bigrams are taken instead."""
    k_triggers: int = 3
    context: int = 32
    batch_size: int = 24
    width: int = 64
    num_steps: int = 2000
    """Steps of the arms of one layer."""
    num_deep_steps: int = 1500
    """Steps of the arms of three layers; the peak is compared with that after a third of them."""
    lr: float = 3e-3
    relu_lr: float = 3e-3
    sgd_lr: float = 0.1
    num_tests: int = 128

    def __post_init__(self) -> None:
        if min(self.k_triggers, self.batch_size, self.num_tests) < 1 or min(self.num_steps, self.num_deep_steps) < 3:
            raise ValueError("triggers, batch_size and num_tests must be at least 1, and steps at least 3")
        if self.context < 8:
            raise ValueError(f"context={self.context} must be at least 8: a sink's first five queries do not count")


@dataclass(frozen=True)
class Arm:
    """Depth, attention and optimizer."""

    depth: int = 1
    attention: str = "softmax"
    optimizer: Literal["adamw", "sgd"] = "adamw"


CHUNK = 64
"""Batches drawn at once."""


def train(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """Next-token training on fresh sequences; arms of a seed share the task, and those of one shape all weights at first."""
    text = bytes(read_text(config.text).numpy()).decode() if config.text else None
    bigram = bigram_from_text(text) if text else dirichlet_bigram(config.num_tokens, seed=seed)
    task = BigramBackcopy(bigram, config.k_triggers, config.context)
    generator = torch.Generator().manual_seed(seed)
    tests = task.sample(config.num_tests, generator)
    torch.manual_seed(seed)
    model = ToyTransformer(
        task.vocab_size, config.context, width=config.width, depth=arm.depth, attention=arm.attention
    )
    num_steps = config.num_steps if arm.depth == 1 else config.num_deep_steps
    if arm.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            model.parameters(), lr=config.sgd_lr, momentum=0.9, weight_decay=1e-4
        )
    else:
        lr = config.relu_lr if arm.attention == "relu" else config.lr
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)

    drawn: list[Tensor] = []

    def loss() -> Tensor:
        if not drawn:
            drawn.extend(task.sample(CHUNK * config.batch_size, generator).split(config.batch_size))
        tokens = drawn.pop()
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    declare(record)
    inputs = tests[:, :-1]
    is_trigger = task.trigger_mask(inputs)
    judged = {num_steps // 3, num_steps}
    looks = {*log_steps(num_steps, per_decade=6), *judged}

    def watched(step: int) -> None:
        look(step, model, task, inputs if step in judged else inputs[::4], record)

    descend(optimizer, loss, num_steps, looks=looks, look=watched)

    maps: list[Tensor] = []
    tap(
        model,
        (inputs[:1],),
        {},
        frozenset({Need.ATTENTION}),
        lambda need, call: maps.append(next(attention_blocks(call, config.context)).weights[0, 0]),  # type: ignore[arg-type]
    )
    record.add(num_steps, {"map/weights": torch.stack(maps), "map/is_trigger": is_trigger[0].float()})
    domains = {"elsewhere": [(inputs, ~is_trigger)], "triggers": [(inputs, is_trigger)]}
    heads = classify_heads(model, domains)
    record.add(num_steps, {"heads/sink_score": [[one.sink_score[name] for name in domains] for one in heads]})
    record.add(num_steps, {"heads/loss_change": [[one.loss_change[name] for name in domains] for one in heads]})


def declare(record: StudyRecord) -> None:
    """The probe's own series, read elsewhere than at triggers, and what the study adds."""
    for series in ExtremeTokens.series:
        record.declare(series)
    queries = {"queries": ["elsewhere", "triggers"]}
    record.declare(Series("triggers/sink_score", ("layer", "head"), description="Sink score over triggers."))
    record.declare(Series("risk/copy", unit="nats", description="Cross-entropy against the oracle at triggers."))
    record.declare(Series("risk/copy_excess", unit="nats", description="The same less the oracle's entropy."))
    record.declare(Series("risk/markov_excess", unit="nats", description="Excess risk elsewhere."))
    record.declare(Series("map/weights", ("layer", "query", "key"), description="Attention in one sequence."))
    record.declare(Series("map/is_trigger", ("query",), description="1 where that sequence has a trigger."))
    record.declare(Series("heads/sink_score", ("head", "queries"), coords=queries, description="Attention to <s>."))
    record.declare(Series("heads/loss_change", ("head", "queries"), "nats", "Loss without the head.", coords=queries))


@torch.no_grad()
def look(step: int, model: ToyTransformer, task: BigramBackcopy, inputs: Tensor, record: StudyRecord) -> None:
    """Sinks on both kinds of queries, drains, peaks and risks of the model as it is."""
    probe = ExtremeTokens(model, sink=0)
    is_trigger = task.trigger_mask(inputs)
    measured: dict[str, list[Tensor]] = {}

    def observe(need: Need, view: AttentionCall | ModuleOutput) -> None:
        found = dict(probe.measure(view))
        if isinstance(view, AttentionCall):
            elsewhere = extreme_token_summary(view, queries=~is_trigger)
            found |= {f"extreme/{name}": elsewhere[name] for name in elsewhere if name.startswith("sink_")}
            found["triggers/sink_score"] = extreme_token_summary(view, queries=is_trigger)["sink_score"]
        for name, value in found.items():
            measured.setdefault(name, []).append(value)

    logits = tap(model, (inputs,), {}, probe.needs, observe)
    record.add(step, {name: torch.stack(values) for name, values in measured.items()})
    risks = task.risks(logits, inputs)
    record.add(step, {"risk/copy": risks.copy, "risk/copy_excess": risks.copy_excess})
    record.add(step, {"risk/markov_excess": risks.markov_excess})
