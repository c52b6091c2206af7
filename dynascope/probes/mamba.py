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

_PARTS = {1: ("in_proj", "conv1d", "act", "dt_bias"), 2: ("in_proj", "conv1d", "act", "x_proj", "dt_proj")}
"""What a layer has whose `A_log` has so many axes: of Mamba-2 and Mamba."""


@dataclass(frozen=True)
class HiddenAttention:
    """A selective scan as attention: outputs are Σ_k hidden[…, q, k] · values[…, k] of each channel.

    A channel is what has a step of its own; of Mamba-2 that is a head, whose values are vectors. Where all states of a
    channel decay alike, as in Mamba-2, `hidden` is `attention * gate`. Elsewhere it is so only nearly: `decay` is then the
    mean over states, each with the size of its part in the attention for its weight.
    """

    hidden: Float[Tensor, "rows channels queries keys"]
    attention: Float[Tensor, "rows #channels queries keys"]  # noqa: F821
    """C_q · B_k: of Mamba the same for every channel, of Mamba-2 for every head of a group."""
    decay: Float[Tensor, "rows channels queries keys"]
    """What is left at q of what entered at k, in [0, 1]."""
    steps: Float[Tensor, "rows keys channels"]
    """Δ_k, with which token k enters."""
    values: Float[Tensor, "rows keys channels *head_dim"]
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

    `module` is a mixer of Hugging Face's Mamba, FalconMamba or Jamba, of its Mamba-2 or a hybrid with such layers (Bamba,
    FalconH1, GraniteMoeHybrid, NemotronH, Zamba2), or a `Mamba` or `Mamba2` of mamba-ssm (which is not imported), and `inputs`
    is what it is called with; `mask` is True for tokens that count. `channels` (of Mamba-2: heads) and `queries` (negative
    ones count from the end) choose what to look at: memory is rows · channels · queries · positions numbers, several times.
    Source: 2510.00399, eq. 6 to 8; 2403.01590 (hidden attention); 2405.21060, section 3 (of Mamba-2).

    Raises ValueError for any other module.

    >>> parts = decompose_mamba_layer(model.backbone.layers[0].mixer, hidden_states, queries=[-1])
    >>> parts.attention.shape, parts.gate.shape
    """
    if not _is_mixer(module):
        raise ValueError(f"{type(module).__name__} is no Mamba layer; give the mixer of one")
    layer: Any = module
    read = _read_heads if layer.A_log.ndim == 1 else _read_channels
    scan = read(layer, inputs, mask, channels)
    length = inputs.shape[1]
    places = torch.arange(length, device=inputs.device)
    seen = places if queries is None else places[torch.as_tensor(queries, device=inputs.device)]
    is_past = seen[:, None] >= places

    since = scan.steps.cumsum(1).mT
    passed = (since[:, :, seen, None] - since[:, :, None]).clamp_min(0)
    C = scan.C[:, seen]
    if scan.rates.shape[1] == 1:
        attention = torch.einsum("rqcn,rkcn->rcqk", C, scan.B) * is_past
        decay = torch.exp(passed * scan.rates[:, :, None]) * is_past
        hidden = attention * decay
    else:
        products = torch.einsum("rqcn,rkcn->nrcqk", C, scan.B) * is_past
        attention, sizes = products.sum(0), products.abs().sum(0)
        hidden, kept = torch.zeros_like(passed), torch.zeros_like(passed)
        for rates, part in zip(scan.rates.T, products, strict=True):
            left = torch.exp(passed * rates[:, None, None])
            hidden += left * part
            kept += left * part.abs()
        decay = torch.where(sizes > 0, kept / sizes, 0.0)
    return HiddenAttention(hidden * scan.steps.mT[:, :, None], attention, decay, scan.steps, scan.values)


def mamba_scores(model: nn.Module, inputs: Any) -> Scores:
    """How the last position sees every token in each Mamba layer of a model, (layers, rows, positions).

    `attention` (C·B) and `gate` are means over channels. Raises ValueError for a model without Mamba layers.

    >>> mamba_scores(hf_model, {"inputs_embeds": embed(prompts)}).gate.shape
    """
    mixers = [one for one in model.modules() if _is_mixer(one)]
    if not mixers:
        raise ValueError(
            f"{type(model).__name__} has no Mamba layers; give it a method scores(prompts), or use another model"
        )
    found: dict[nn.Module, Scores] = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering = args[0] if args else kwargs["hidden_states"]
        parts = decompose_mamba_layer(module, entering, queries=[-1])
        found[module] = Scores(parts.attention.mean(1)[:, 0], parts.gate.mean(1)[:, 0])

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


@dataclass(frozen=True)
class _Scan:
    """What a layer's scan is made of, in float32: rates are A, one a channel or one for each of its states."""

    steps: Float[Tensor, "rows keys channels"]
    rates: Float[Tensor, "channels rates"]
    B: Float[Tensor, "rows keys #channels states"]
    C: Float[Tensor, "rows keys #channels states"]
    values: Float[Tensor, "rows keys channels *head_dim"]


def _is_mixer(module: nn.Module) -> bool:
    logs = getattr(module, "A_log", None)
    return isinstance(logs, Tensor) and all(hasattr(module, part) for part in _PARTS.get(logs.ndim, ("no layer",)))


def _read_channels(layer: Any, inputs: Tensor, mask: Tensor | None, channels: Sequence[int] | None) -> _Scan:
    """Of Mamba: a step for every channel, and a rate for each of its states."""
    projected, _ = layer.in_proj(_counted(inputs, mask)).chunk(2, dim=-1)
    values = _convolved(layer, projected, mask)
    rank, num_states = layer.dt_proj.in_features, layer.A_log.shape[1]
    steps, B, C = _normalized(layer, *layer.x_proj(values).split([rank, num_states, num_states], dim=-1))
    which = _chosen(channels, values.shape[2], values.device)
    # In the scan's own precision, and only of the channels that are looked at.
    bias = None if layer.dt_proj.bias is None else layer.dt_proj.bias[which].float()
    delta = F.softplus(F.linear(steps.float(), layer.dt_proj.weight[which].float(), bias))
    rates = -torch.exp(layer.A_log[which].float())
    return _Scan(delta, rates, B[:, :, None].float(), C[:, :, None].float(), values[..., which].float())


def _read_heads(layer: Any, inputs: Tensor, mask: Tensor | None, heads: Sequence[int] | None) -> _Scan:
    """Of Mamba-2: a step and a rate for every head, B and C for every group of heads."""
    # FalconH1 scales what goes into its projection and what comes out.
    inputs = _counted(inputs, mask) * getattr(layer, "ssm_in_multiplier", 1.0)
    projected = layer.in_proj(inputs) * getattr(layer, "mup_vector", 1.0)
    num_heads, num_mixed = len(layer.A_log), layer.conv1d.out_channels
    head_dim, num_groups, limit = (
        getattr(layer, name, None) or getattr(layer, in_mamba_ssm)
        for name, in_mamba_ssm in (("head_dim", "headdim"), ("n_groups", "ngroups"), ("time_step_limit", "dt_limit"))
    )
    # What comes before are gates.
    mixed, steps = projected[..., -num_mixed - num_heads :].split([num_mixed, num_heads], dim=-1)
    width = num_heads * head_dim
    values, *both = _convolved(layer, mixed, mask).split([width, *[(num_mixed - width) // 2] * 2], dim=-1)
    which = _chosen(heads, num_heads, inputs.device)
    group = which.remainder(num_heads) // (num_heads // num_groups)
    B, C = (one.unflatten(-1, (num_groups, -1))[:, :, group].float() for one in both)
    delta = F.softplus((steps + layer.dt_bias)[..., which].float()).clamp(*limit)
    rates = -torch.exp(layer.A_log[which].float())[:, None]
    return _Scan(delta, rates, B, C, values.unflatten(-1, (num_heads, head_dim))[:, :, which].float())


def _counted(inputs: Tensor, mask: Tensor | None) -> Tensor:
    return inputs if mask is None else inputs * mask[..., None]


def _convolved(layer: Any, projected: Tensor, mask: Tensor | None) -> Tensor:
    return _counted(layer.act(layer.conv1d(projected.mT)[..., : projected.shape[1]]).mT, mask)


def _chosen(wanted: Sequence[int] | None, number: int, device: torch.device) -> Tensor:
    return torch.arange(number, device=device) if wanted is None else torch.as_tensor(wanted, device=device)


def _normalized(layer: Any, steps: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Step, B and C as they are, or normalized as Jamba and FalconMamba do."""
    if hasattr(layer, "dt_layernorm"):
        return layer.dt_layernorm(steps), layer.b_layernorm(B), layer.c_layernorm(C)
    if hasattr(layer, "rms_eps"):
        steps, B, C = (F.rms_norm(one, one.shape[-1:], eps=layer.rms_eps) for one in (steps, B, C))
    return steps, B, C
