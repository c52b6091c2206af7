"""Mamba layers as attention: what each token attends to, how much of it the decay lets through, and what it learns in context."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dynascope.data.in_context.outliers import OutlierPrompts
from dynascope.kernels.layerwise import called
from dynascope.nn.gated_linear_attention import Scores
from dynascope.probes.probe import Need, Probe
from dynascope.probes.views import ModelView
from dynascope.record import Series

_PARTS = ("in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "act")


@dataclass(frozen=True)
class HiddenAttention:
    """A selective scan as attention: outputs are Σ_k hidden[…, q, k] · values[…, k] of each channel.

    Where all states of a channel decay alike, `hidden` is `attention * gate`. Elsewhere it is so only nearly: `decay` is then
    the mean over states, each with the size of its part in the attention for its weight.
    """

    hidden: Float[Tensor, "rows channels queries keys"]
    attention: Float[Tensor, "rows queries keys"]
    """C_q · B_k, the same for every channel."""
    decay: Float[Tensor, "rows channels queries keys"]
    """What is left at q of what entered at k, in [0, 1]."""
    steps: Float[Tensor, "rows keys channels"]
    """Δ_k, with which token k enters."""
    values: Float[Tensor, "rows keys channels"]
    """What the scan reads: the layer's input after its projection, convolution and activation."""

    @property
    def gate(self) -> Float[Tensor, "rows channels queries keys"]:
        """Decay times step: what a token enters with, and what remains of it."""
        return self.decay * self.steps.transpose(1, 2)[:, :, None]


def decompose_mamba_layer(
    module: nn.Module,
    inputs: Float[Tensor, "rows positions width"],
    *,
    mask: Bool[Tensor, "rows positions"] | None = None,
    channels: Sequence[int] | None = None,
    queries: Sequence[int] | None = None,
) -> HiddenAttention:
    """The hidden attention of a Mamba layer, split into C·B attention and the gate of each channel.

    `module` is a mixer of Hugging Face's Mamba, FalconMamba or Jamba, or a `Mamba` of mamba-ssm (which is not imported), and
    `inputs` is what it is called with; `mask` is True for tokens that count. `channels` and `queries` (negative ones count
    from the end) choose what to look at: memory is rows · channels · queries · positions numbers, several times.
    Source: 2510.00399, eq. 6 to 8; 2403.01590 (hidden attention).

    Raises ValueError for any other module.

    >>> parts = decompose_mamba_layer(model.backbone.layers[0].mixer, hidden_states, queries=[-1])
    >>> parts.attention.shape, parts.gate.shape
    """
    missing = [part for part in _PARTS if not hasattr(module, part)]
    if missing or module.A_log.ndim != 2:
        lacks = f"no {missing[0]}" if missing else "one decay a head (Mamba-2)"
        raise ValueError(f"{type(module).__name__} is no Mamba layer of the first kind: it has {lacks}")
    layer: Any = module
    length = inputs.shape[1]
    if mask is not None:
        inputs = inputs * mask[..., None]
    projected, _ = layer.in_proj(inputs).chunk(2, dim=-1)
    values = layer.act(layer.conv1d(projected.mT)[..., :length]).mT
    if mask is not None:
        values = values * mask[..., None]
    rank, num_states = layer.dt_proj.in_features, layer.A_log.shape[1]
    steps, B, C = _normalized(layer, *layer.x_proj(values).split([rank, num_states, num_states], dim=-1))
    which = torch.arange(values.shape[2]) if channels is None else torch.as_tensor(channels)
    which = which.to(values.device)
    # In the scan's own precision, and only of the channels that are looked at.
    bias = None if layer.dt_proj.bias is None else layer.dt_proj.bias[which].float()
    delta = F.softplus(F.linear(steps.float(), layer.dt_proj.weight[which].float(), bias))
    rates = -torch.exp(layer.A_log[which].float())
    places = torch.arange(length, device=inputs.device)
    places = places if queries is None else places[torch.as_tensor(queries, device=inputs.device)]

    since = delta.cumsum(1).mT
    passed = (since[:, :, places, None] - since[:, :, None]).clamp_min(0)
    is_seen = places[:, None] >= torch.arange(length, device=inputs.device)
    products = torch.einsum("rqn,rkn->nrqk", C[:, places].float(), B.float()) * is_seen
    hidden, kept = torch.zeros_like(passed), torch.zeros_like(passed)
    for n in range(num_states):
        part = torch.exp(passed * rates[:, n, None, None])
        hidden += part * products[n, :, None]
        kept += part * products[n, :, None].abs()
    sizes = products.abs().sum(0)[:, None]
    decay = torch.where(sizes > 0, kept / sizes, 0.0)
    hidden = hidden * delta.mT[:, :, None]
    return HiddenAttention(hidden, products.sum(0), decay, delta, values[..., which].float())


def mamba_scores(model: nn.Module, inputs: Any) -> Scores:
    """How the last position sees every token in each Mamba layer of a model, (layers, rows, positions).

    `attention` is C·B and `gate` the mean over channels. Raises ValueError for a model without Mamba layers.

    >>> mamba_scores(hf_model, {"inputs_embeds": embed(prompts)}).gate.shape
    """
    mixers = [one for one in model.modules() if all(hasattr(one, part) for part in _PARTS) and one.A_log.ndim == 2]
    if not mixers:
        raise ValueError(
            f"{type(model).__name__} has no Mamba layers; give it a method scores(prompts), or use another model"
        )
    found: dict[nn.Module, Scores] = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering = args[0] if args else kwargs["hidden_states"]
        parts = decompose_mamba_layer(module, entering, queries=[-1])
        found[module] = Scores(parts.attention[:, 0], parts.gate.mean(1)[:, 0])

    handles = [mixer.register_forward_pre_hook(look, with_kwargs=True) for mixer in mixers]
    try:
        called(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    seen = [found[mixer] for mixer in mixers if mixer in found]
    return Scores(torch.stack([one.attention for one in seen]), torch.stack([one.gate for one in seen]))


def icl_mechanism(scores: Scores, batch: OutlierPrompts) -> dict[str, Float[Tensor, "..."]]:
    """What attention and gate make of a prompt's examples; the values that `ICLMechanismProbe` records, by series.

    A layer first: share of |attention| on examples with the query's pattern; mean gate of clean examples and of outliers, over
    all and by distance from the query; and the slope of log2 gate against rank among the clean examples, nearest first: 0
    where distance is no matter, -1 where the gate halves with each. NaN where there is nothing to average.
    Source: 2510.00399, Propositions 1 and 2.

    >>> icl_mechanism(model.scores(batch.prompts), batch)["mamba/decay_slope"]
    """
    attention, gate = (one.reshape(-1, *one.shape[-2:])[..., :-1].float() for one in (scores.attention, scores.gate))
    is_same = batch.patterns[:, :-1] == batch.patterns[:, -1:]
    mass = attention.abs()
    kinds = torch.stack([~batch.is_outlier, batch.is_outlier]).float()
    rank = (~batch.is_outlier).flip(1).cumsum(1).flip(1).float()
    heights = gate.clamp_min(torch.finfo(gate.dtype).tiny).log2()
    clean = kinds[0]
    middle = (rank * clean).sum() / clean.sum()
    aside = (rank - middle) * clean
    level = (heights * clean).sum((1, 2), keepdim=True) / clean.sum()
    sums = torch.einsum("lbi,kbi->lki", gate, kinds)
    return {
        "mamba/attention_same": (mass * is_same).sum((1, 2)) / mass.sum((1, 2)),
        "mamba/gate": sums.sum(2) / kinds.sum((1, 2)),
        "mamba/gate_by_distance": (sums / kinds.sum(1)).flip(2),
        "mamba/decay_slope": ((heights - level) * aside).sum((1, 2)) / aside.square().sum(),
    }


class ICLMechanismProbe(Probe):
    """How a model that learns in context selects examples: by pattern, by the gate on outliers, and by distance.

    Args:
        batch: Prompts with known outliers and patterns (`OutlierICL.test_batch`), looked at unchanged every time.
        inputs: From prompts to what the model is called with (Hugging Face: `lambda x: {"inputs_embeds": embed(x)}`).

    A model with a method `scores(prompts)` is asked for them; of any other its Mamba layers are decomposed, one token an
    example. Source: 2510.00399, section 3.4.

    >>> dynascope.watch(model, optimizer, probes=[ICLMechanismProbe(task.test_batch(0.5, count=256))])
    """

    name = "icl-mechanism"
    needs = frozenset({Need.MODEL})
    default = False
    series = (
        Series("mamba/attention_same", ("layer",), description="Share of |attention| on the query's own pattern."),
        Series(
            "mamba/gate",
            ("layer", "kind"),
            description="Mean gate of clean examples and of outliers.",
            coords={"kind": ["clean", "outlier"]},
        ),
        Series(
            "mamba/gate_by_distance",
            ("layer", "kind", "distance"),
            description="Mean gate by distance from the query, nearest first.",
            coords={"kind": ["clean", "outlier"]},
        ),
        Series(
            "mamba/decay_slope",
            ("layer",),
            unit="log2 gate per clean example",
            description="How the gate falls with rank among clean examples; -1 halves with each.",
        ),
    )

    def __init__(self, batch: OutlierPrompts, *, inputs: Callable[[Tensor], Any] = lambda prompts: prompts) -> None:
        self.batch, self.inputs = batch, inputs

    def measure(self, view: ModelView) -> Mapping[str, Tensor]:
        """The four series."""
        inputs = self.inputs(self.batch.prompts)
        scored = getattr(view.model, "scores", None)
        return icl_mechanism(mamba_scores(view.model, inputs) if scored is None else called(scored, inputs), self.batch)


def _normalized(layer: Any, steps: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Step, B and C as they are, or normalized as Jamba and FalconMamba do."""
    if hasattr(layer, "dt_layernorm"):
        return layer.dt_layernorm(steps), layer.b_layernorm(B), layer.c_layernorm(C)
    if hasattr(layer, "rms_eps"):
        steps, B, C = (F.rms_norm(one, one.shape[-1:], eps=layer.rms_eps) for one in (steps, B, C))
    return steps, B, C
