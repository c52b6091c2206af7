"""Real text, word by word: does attention fall from uniform, freeze, and move to the words that tell what follows?"""

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from dynascope.data import TokenStats, python_sources, read_text, token_stats, word_ids
from dynascope.nn import YZStack, YZTransformer
from dynascope.probes.probe import Need
from dynascope.probes.scan_snap import ScanSnap, attention_on_tokens
from dynascope.probes.views import AttentionCall, ModuleOutput
from dynascope.record import Series
from dynascope.studies.harness import StudyRecord, descend, log_steps
from dynascope.studies.scan_and_snap.synthetic import Arm, Config
from dynascope.watching.shadow import shadow_pass

LR = {"transformer": 3e-3, "yz": 1e-2, "yz-stack": 1e-2}
"""Adam's; the paper's real text is trained with Adam too."""
NUM_LAYERS = 2
"""Of the stack."""
NUM_LOOKED, MORE_WINDOWS, ROWS = 28, 10, 14
"""Windows read at each look; windows a step of the model with one target each, over the other's; windows read at once."""


class OneLayer(nn.Module):
    """One causal transformer layer with one head, without positions: the paper's ordinary baseline.

    >>> OneLayer(2000, 64)(torch.randint(2000, (8, 35))).shape
    torch.Size([8, 35, 2000])
    """

    def __init__(self, vocab: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.dropout = nn.Dropout(dropout)
        self.decoder = nn.Linear(width, vocab)

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length vocab"]:
        x = self.dropout(self.embedding(tokens))
        normed = self.norms[0](x)
        query, key, value = (part(normed)[:, None] for part in (self.query, self.key, self.value))
        x = x + self.dropout(self.out(scaled_dot_product_attention(query, key, value, is_causal=True)[:, 0]))
        x = x + self.dropout(self.mlp(self.norms[1](x)))
        logits: Tensor = self.decoder(self.norms[2](x))
        return logits


TextModel = OneLayer | YZTransformer | YZStack


def attention_calls(model: TextModel, windows: Int[Tensor, "count length"]) -> Iterator[AttentionCall]:
    """What every token of some windows attends to, a few windows at a time."""
    for tokens in windows.split(ROWS):
        yield from [_bag_attention(model, tokens)] if isinstance(model, YZTransformer) else _seen(model, tokens)


def _bag_attention(model: YZTransformer, tokens: Int[Tensor, "count length"]) -> AttentionCall:
    """The paper's model as if each token of a window were the last one."""
    with torch.no_grad():
        query, key = (factor[tokens][:, None] for factor in (model.Z_query, model.Z_key))
    is_earlier = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril(-1)[None, None]
    return AttentionCall("yz", query, key, key, scale=1.0, mask=is_earlier, tokens=tokens)


def _seen(model: OneLayer | YZStack, tokens: Int[Tensor, "count length"]) -> list[AttentionCall]:
    calls: list[AttentionCall] = []

    def keep(need: Need, view: ModuleOutput | AttentionCall) -> None:
        assert isinstance(view, AttentionCall)
        calls.append(view)

    shadow_pass(model, (tokens,), {}, frozenset({Need.ATTENTION}), keep)
    return calls


def split_at_median(stats: TokenStats, text: Tensor) -> TokenStats:
    """The statistics with half of the text's words on each side of the threshold."""
    return dataclasses.replace(stats, threshold=float(stats.commonness[text].nanmedian()))


def train_on_text(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """Next-word prediction on windows of a text; attention is read from its last tenth."""
    torch.manual_seed(seed)
    source = read_text(config.data) if config.data else python_sources(config.num_bytes)
    text, _ = word_ids(source[: config.num_bytes], config.vocab)
    if len(text) < 20 * config.window:
        raise ValueError(f"the text has {len(text)} words; give one of at least {20 * config.window}")
    seen, held = text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]
    stats = token_stats(seen, config.vocab, window=config.window, fewest=10 * config.window)
    stats = split_at_median(stats, seen)
    windows = held.unfold(0, config.window, max(1, (len(held) - config.window) // config.num_windows))
    probe = ScanSnap(stats)
    for series in probe.series:
        record.declare(series)

    model: TextModel
    if arm.model == "transformer":
        model = OneLayer(config.vocab, config.width, config.dropout)
    elif arm.model == "yz-stack":
        model = YZStack(config.vocab, config.width, NUM_LAYERS)
    else:
        model = YZTransformer(config.vocab, init="uniform", rank=config.width)
    has_one_target = isinstance(model, YZTransformer)
    count = config.text_batch * (MORE_WINDOWS if has_one_target else 1)
    within = torch.arange(config.window + 1)

    def loss() -> Tensor:
        tokens = seen[torch.randint(len(seen) - config.window, (count, 1)) + within]
        if has_one_target:
            return cross_entropy(model(tokens[:, :-1]), tokens[:, -1])
        return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def sought() -> Tensor:
        """Log of the attention that each word gets, in all layers, over what is uniform; NaN where it is not seen."""
        parts = [attention_on_tokens(call, config.vocab) for call in attention_calls(model, windows)]
        received, uniform = (torch.stack([part[side] for part in parts]).sum(0) for side in (0, 1))
        return torch.where(uniform > 1, torch.log(received / uniform), torch.nan)

    def look(step: int) -> None:
        looked = windows[:: max(1, len(windows) // NUM_LOOKED)]
        layers: dict[str, list[Mapping[str, Tensor]]] = {}
        for call in attention_calls(model, looked):
            layers.setdefault(call.name, []).append(probe.measure(call))
        means = {
            series.name: torch.stack(
                [torch.stack([one[series.name] for one in of]).nanmean(0) for of in layers.values()]
            )
            for series in probe.series
        }
        with torch.no_grad():
            record.add(step, {**means, "loss": loss()})

    start = sought()
    num_steps = config.stack_steps if arm.model == "yz-stack" else config.text_steps
    looks = log_steps(num_steps, per_decade=10)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR[arm.model])
    descend(optimizer, loss, num_steps, looks=looks, look=look, max_norm=config.clip)
    # The unknown word stands for many, and so is none.
    change = (sought() - start)[1:]
    record.declare(Series("attention_change", ("word",), description="Change of log attention over uniform."))
    record.add(num_steps, {"commonness": stats.commonness[1:], "attention_change": change})
