"""Reading attention's algorithm off its weights: what each head compares (KQ), and what it passes on (OV).

With tokens as columns, a head's logit between a key token z and a query token q is zᵀ KQ q, and what it adds to the
output for attending to z is OV z. These two products are all that a head does; its query, key, value and output matrices
are not determined by it one by one. Patterns of them as in 2503.12734: KQ a multiple of the identity on the inputs, OV
reading labels only, heads of one size and both signs whose outputs cancel.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

_SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
)
_FUSED = ("c_attn", "qkv_proj", "qkv", "Wqkv")
_OUT = ("o_proj", "out_proj", "c_proj", "to_out", "wo", "proj", "dense", "out")
# One fused projection whose rows are grouped head by head, each with its query, key and value.
_BY_HEAD = ("GPTNeoXAttention", "BloomAttention")
_UNSCALED = ("GPTNeoSelfAttention",)
_HEADS = ("num_heads", "n_head", "n_heads", "num_attention_heads", "heads")
_HEAD_WIDTH = ("head_dim", "head_size", "attention_head_size")


@dataclass(frozen=True)
class Circuits:
    """The two products of every head: logit = zᵀ KQ q for key token z and query token q, output = Σ_heads OV z.

    KQ contains the attention's scale. `left_out` names what acts beside them: "rotary" (KQ is then that of a token and
    itself; at other distances it is turned), "bias", "query-key norm", "logit cap".
    """

    kq: Float[Tensor, "*stack heads key_width query_width"]
    ov: Float[Tensor, "*stack heads out value_width"]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class AttentionWeights:
    """One attention layer's matrices by head, grouped-query heads repeated, however the layer stores them.

    `circuits()` multiplies them out; `pattern_scores()` tells the same as `pattern_scores(kq, ov)` without forming a
    width × width matrix: heads · head width² · width operations instead of heads · head width · width².
    """

    query: Float[Tensor, "*stack heads rank query_width"]
    key: Float[Tensor, "*stack heads rank key_width"]
    value: Float[Tensor, "*stack heads value_rank value_width"]
    out: Float[Tensor, "*stack heads out value_rank"]
    scale: float
    left_out: tuple[str, ...] = ()

    def circuits(self) -> Circuits:
        """KQ and OV of every head."""
        return Circuits(self.key.mT @ (self.query * self.scale), self.out @ self.value, self.left_out)

    def pattern_scores(self, num_inputs: int | None = None, *, dummy: float = 0.05) -> "PatternScores":
        """As the function of that name."""
        inputs, labels = _inputs_and_labels(
            self.key.shape[-1], self.query.shape[-1], self.value.shape[-1], self.out.shape[-2], num_inputs
        )
        query, key, value, out = (
            part.float() if part.element_size() < 4 else part for part in (self.query, self.key, self.value, self.out)
        )
        query, read = query[..., inputs] * self.scale, value[..., labels]
        kq_diagonal = (key[..., inputs] * query).sum(-2)
        kq_norm = _norm_of_product(key, query)
        shorter = min(out.shape[-2], read.shape[-1])
        ov_diagonal = (out.mT[..., :shorter] * read[..., :shorter]).sum(-2)
        ov_norms = [_norm_of_product(out.mT, part) for part in (read, value)]
        off_diagonal = (kq_norm.square() - kq_diagonal.square().sum(-1)).clamp_min(0).sqrt()
        return _scores(kq_diagonal, off_diagonal, kq_norm, ov_diagonal, *ov_norms, labels, dummy)


@runtime_checkable
class HasAttentionWeights(Protocol):
    """A module that says itself what its heads' matrices are."""

    def attention_weights(self) -> AttentionWeights:
        """The matrices of every head."""


@dataclass(frozen=True)
class PatternScores:
    """How far the heads of a layer are from the pattern of in-context gradient descent; see `pattern_scores`."""

    omega: Float[Tensor, "*stack heads"]
    """ω, the mean diagonal entry of KQ on the inputs."""
    mu: Float[Tensor, "*stack heads outputs"]
    """μ, what each output takes of its own label; of a layer without labels the mean diagonal entry of OV."""
    off_diagonal: Float[Tensor, "*stack heads"]
    """Norm of what acts in KQ beside its diagonal, over that of all that acts."""
    last_entry_share: Float[Tensor, "*stack heads"]
    """Norm of OV on the labels over its whole norm; NaN of a layer without labels."""
    homogeneity: Float[Tensor, "*stack"]
    """Standard deviation over mean of |ω| among heads that are no dummies: 0 when all are of one size."""
    zero_sum: Float[Tensor, "*stack outputs"]
    """|Σ μ| / Σ |μ| over heads: 0 when the heads cancel, 1 when all have one sign."""
    is_dummy: Bool[Tensor, "*stack heads"]
    """Heads whose |μ| is below a share of the largest."""

    @property
    def signs(self) -> Float[Tensor, "*stack heads"]:
        """The sign of each head's ω, 0 for a dummy."""
        return self.omega.sign().masked_fill(self.is_dummy, 0.0)


@dataclass(frozen=True)
class Allocation:
    """Which head serves which task; see `task_head_allocation`."""

    share: Float[Tensor, "heads tasks"]
    serves: Bool[Tensor, "heads tasks"]
    regime: Literal["dedicated", "superposition", "shared"]


def kq_ov_circuits(module: nn.Module, *, num_heads: int | None = None, scale: float | None = None) -> Circuits:
    """KQ and OV of every head of an attention layer.

    Reads our own models, `nn.MultiheadAttention`, and layers with separate or fused projections under the usual names:
    GPT-2 (Conv1D), Llama, Mistral and Qwen (grouped queries), OPT, GPT-NeoX, BERT, ViT, timm, nanoGPT. `num_heads` and `scale`
    override what the layer says. Circuits are differentiable functions of the weights.

    Memory: heads × width² numbers for each of the two; `attention_weights` keeps the factors.
    Raises ValueError for a module that is no attention layer, or whose number of heads is not to be found.
    Source: 2503.12734, section 3; 2021 "A mathematical framework for transformer circuits".

    >>> kq_ov_circuits(nn.MultiheadAttention(16, 4)).kq.shape
    torch.Size([4, 16, 16])
    """
    return attention_weights(module, num_heads=num_heads, scale=scale).circuits()


def attention_weights(
    module: nn.Module, *, num_heads: int | None = None, scale: float | None = None
) -> AttentionWeights:
    """The query, key, value and output matrices of every head of an attention layer; see `kq_ov_circuits`.

    >>> attention_weights(nn.MultiheadAttention(16, 4)).query.shape
    torch.Size([4, 4, 16])
    """
    if isinstance(module, HasAttentionWeights):
        return module.attention_weights()
    found = _projections(module)
    if found is None:
        raise ValueError(f"{type(module).__name__} has no query, key, value and output projections that are known")
    query, key, value, out = found
    heads = num_heads if num_heads is not None else _num_heads(module, query.shape[0])
    if heads is None or heads < 1 or query.shape[0] % heads:
        raise ValueError(
            f"{heads} heads do not divide the {query.shape[0]} rows of {type(module).__name__}'s query projection; "
            "give num_heads"
        )
    if type(module).__name__ in _BY_HEAD:
        rows = torch.cat([query, key, value]).unflatten(0, (heads, 3, -1))
        query, key, value = (part.flatten(0, 1) for part in rows.unbind(1))
    width = query.shape[0] // heads
    groups = heads // (key.shape[0] // width)
    key, value = (part.unflatten(0, (heads // groups, -1)).repeat_interleave(groups, dim=0) for part in (key, value))
    return AttentionWeights(
        query.unflatten(0, (heads, width)),
        key,
        value,
        out.unflatten(1, (heads, -1)).movedim(1, 0),
        _scale(module, width) if scale is None else scale,
        _left_out(module),
    )


def find_attention(model: nn.Module) -> dict[str, nn.Module]:
    """Every attention layer of a model that can be read, by name, from the first to the last.

    >>> list(find_attention(nn.TransformerEncoderLayer(16, 4)))
    ['self_attn']
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") or outer == "" for outer in found):
            continue
        if isinstance(module, HasAttentionWeights):
            found[name] = module
            continue
        projections = _projections(module)
        heads = _num_heads(module, projections[0].shape[0]) if projections is not None else None
        if projections is not None and heads and projections[0].shape[0] % heads == 0:
            found[name] = module
    return found


def pattern_scores(
    kq: Float[Tensor, "*stack heads key_width query_width"],
    ov: Float[Tensor, "*stack heads out value_width"],
    num_inputs: int | None = None,
    *,
    dummy: float = 0.05,
) -> PatternScores:
    """How near the heads are to in-context gradient descent: KQ = ω I on the inputs, OV = μ on the labels, Σ μ = 0.

    Args:
        num_inputs: How many coordinates of a token come before its labels. By default width - out where the layer gives
            out fewer numbers than it takes; otherwise the layer is taken to have no labels, as one inside a transformer,
            and every coordinate counts.
        dummy: Heads whose |μ| is below this share of the largest are dummies.

    The query's labels are zero, so the columns of KQ behind the inputs never act and are not looked at; its rows for the
    labels do act, and count as off the diagonal. Multiples of the identity are so in every basis, so the scores mean the
    same inside a transformer. Leading axes (layers, steps, seeds) are kept. Source: 2503.12734, section 3.

    Raises ValueError when KQ has no diagonal to compare with (keys and queries of other widths).

    >>> kq = torch.stack([torch.eye(3), -torch.eye(3)])
    >>> pattern_scores(kq, torch.tensor([[[0.0, 0.0, 2.0]], [[0.0, 0.0, -2.0]]])).zero_sum
    tensor([0.])
    """
    inputs, labels = _inputs_and_labels(kq.shape[-2], kq.shape[-1], ov.shape[-1], ov.shape[-2], num_inputs)
    acting, read = kq[..., inputs], ov[..., labels]
    kq_diagonal = acting.diagonal(dim1=-2, dim2=-1)
    # Subtracted entry by entry: a difference of squared norms would leave rounding of an exact diagonal.
    beside = acting.clone()
    beside.diagonal(dim1=-2, dim2=-1).zero_()
    norms = [one.flatten(-2).norm(dim=-1) for one in (beside, acting, read, ov)]
    ov_diagonal = read.diagonal(dim1=-2, dim2=-1)
    return _scores(kq_diagonal, norms[0], norms[1], ov_diagonal, norms[2], norms[3], labels, dummy)


def task_head_allocation(circuits: Circuits, tasks: Sequence[Sequence[int]], *, serving: float = 0.2) -> Allocation:
    """Which heads do which of several regression tasks that share inputs, and in which regime they divide the work.

    Task n lives on the input coordinates `tasks[n]`, and its label is coordinate width - len(tasks) + n. A head's part in
    it is |μ| (what output n takes of label n) times the mean |diagonal of KQ| on the task's coordinates; `share` divides
    by the sum over heads. A head serves a task when its part is at least `serving` of the largest.

    "dedicated": every head in use serves one task. "shared": every head in use serves all. "superposition": else.
    Raises ValueError when the outputs are not as many as the tasks, or an index is out of range.
    Source: 2503.12734, section on multiple tasks; the measure is ours.

    >>> allocation = task_head_allocation(model.circuits(), [(0, 1, 2, 3), (2, 3, 4, 5)])
    """
    kq, ov = circuits.kq, circuits.ov
    num_inputs = kq.shape[-1] - len(tasks)
    if kq.ndim != 3 or ov.shape[-2] != len(tasks):
        raise ValueError(f"{len(tasks)} tasks want the circuits of one layer with as many outputs, not {ov.shape}")
    if not all(task and 0 <= min(task) and max(task) < num_inputs for task in tasks):
        raise ValueError(f"each task must name coordinates from 0 to {num_inputs - 1}")
    strength = kq.diagonal(dim1=-2, dim2=-1).abs()
    on_task = torch.stack([strength[:, list(task)].mean(1) for task in tasks], dim=1)
    part = ov[..., num_inputs:].diagonal(dim1=-2, dim2=-1).abs() * on_task
    serves = part >= serving * part.amax(0)
    used = serves[serves.any(1)]
    regime: Literal["dedicated", "superposition", "shared"] = "superposition"
    if bool((used.sum(1) == 1).all()):
        regime = "dedicated"
    elif bool(used.all()):
        regime = "shared"
    return Allocation(part / part.sum(0), serves, regime)


def _inputs_and_labels(
    key_width: int, query_width: int, value_width: int, out: int, num_inputs: int | None
) -> tuple[slice, slice]:
    """The coordinates that keys and queries are compared on, and those that OV should read."""
    if key_width != query_width:
        raise ValueError(f"keys of width {key_width} and queries of width {query_width} have no common diagonal")
    if num_inputs is None:
        num_inputs = value_width - out if out < value_width else value_width
    if not 0 < num_inputs <= key_width:
        raise ValueError(f"num_inputs={num_inputs} must lie between 1 and the width {key_width}")
    has_labels = num_inputs < value_width
    return slice(num_inputs), slice(num_inputs, None) if has_labels else slice(None)


def _scores(
    kq_diagonal: Tensor,
    off_diagonal: Tensor,
    kq_norm: Tensor,
    ov_diagonal: Tensor,
    label_norm: Tensor,
    ov_norm: Tensor,
    labels: slice,
    dummy: float,
) -> PatternScores:
    has_labels = labels.start is not None
    omega = kq_diagonal.mean(-1)
    mu = ov_diagonal if has_labels else ov_diagonal.mean(-1, keepdim=True)
    size = mu.abs().amax(-1)
    is_dummy = size < dummy * size.amax(-1, keepdim=True)
    counted = torch.where(is_dummy, torch.nan, omega.abs())
    mean = counted.nanmean(-1, keepdim=True)
    spread = (counted - mean).square().nanmean(-1).sqrt() / mean[..., 0]
    return PatternScores(
        omega=omega,
        mu=mu,
        off_diagonal=off_diagonal / kq_norm,
        last_entry_share=label_norm / ov_norm if has_labels else torch.full_like(ov_norm, torch.nan),
        homogeneity=spread,
        zero_sum=mu.sum(-2).abs() / mu.abs().sum(-2),
        is_dummy=is_dummy,
    )


def _norm_of_product(left: Float[Tensor, "*batch rank a"], right: Float[Tensor, "*batch rank b"]) -> Tensor:
    """Frobenius norm of leftᵀ right from two rank × rank Gram matrices."""
    squared: Tensor = ((left @ left.mT) * (right @ right.mT)).sum((-2, -1))
    return squared.clamp_min(0).sqrt()


def _projections(module: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Query, key, value (rows × width) and output (out × rows) of a layer, if it has such."""
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is not None:
            return (*module.in_proj_weight.chunk(3), module.out_proj.weight)
        return module.q_proj_weight, module.k_proj_weight, module.v_proj_weight, module.out_proj.weight
    inner = next(
        (part for name in ("self", "attention") if isinstance(part := getattr(module, name, None), nn.Module)), None
    )
    place = module if inner is None else inner
    out = _weight(module, _OUT)
    if out is None:
        out = _weight(getattr(module, "output", None), ("dense",))
    if out is None:
        return None
    for names in _SEPARATE:
        three = [_weight(place, (name,)) for name in names]
        if all(one is not None and one.shape[1] > 0 for one in three):
            query, key, value = (one for one in three if one is not None)
            return (query, key, value, out) if query.shape[0] == out.shape[1] else None
    cross = _weight(place, ("q_attn",))
    fused = _weight(place, (*_FUSED, "query_key_value") if type(module).__name__ in _BY_HEAD else _FUSED)
    if fused is None:
        return None
    if cross is not None:
        return (cross, *fused.chunk(2), out)
    # What is left beside the queries belongs to keys and values in equal parts, fewer where heads share them.
    rows = out.shape[1]
    rest = fused.shape[0] - rows
    if rest < 2 or rest % 2:
        return None
    query, key, value = fused.split([rows, rest // 2, rest // 2])
    return query, key, value, out


def _weight(module: object, names: Sequence[str]) -> Tensor | None:
    """The matrix, out × in, of the first of these linear maps that the module has."""
    for name in names:
        part = getattr(module, name, None)
        if isinstance(part, (nn.ModuleList, nn.Sequential)) and len(part):
            part = part[0]
        weight = getattr(part, "weight", None) if isinstance(part, nn.Module) else None
        if isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(part, nn.Embedding):
            return weight.T if type(part).__name__ == "Conv1D" else weight
    return None


def _stated(module: nn.Module, names: Sequence[str], kind: type | tuple[type, ...]) -> float | None:
    """The first of these attributes that the layer, the layer inside it or its configuration states."""
    places = [
        module,
        getattr(module, "self", None),
        getattr(module, "attention", None),
        getattr(module, "config", None),
    ]
    for place in places:
        for name in names:
            value = getattr(place, name, None)
            if isinstance(value, kind) and not isinstance(value, bool):
                return float(value)  # type: ignore[arg-type]
    return None


def _num_heads(module: nn.Module, rows: int) -> int | None:
    width = _stated(module, _HEAD_WIDTH, int)
    if width:
        return rows // int(width)
    heads = _stated(module, _HEADS, int)
    return None if heads is None else int(heads)


def _scale(module: nn.Module, width: int) -> float:
    stated = _stated(module, ("scaling", "softmax_scale", "scale"), float)
    if stated is not None:
        return stated
    is_unscaled = type(module).__name__ in _UNSCALED or getattr(module, "scale_attn_weights", True) is False
    return 1.0 if is_unscaled else width**-0.5


def _left_out(module: nn.Module) -> tuple[str, ...]:
    """What acts on this layer's logits or values beside its matrices."""
    parts = dict(module.named_modules())
    names = {name.rpartition(".")[2] for name in parts}
    arguments = inspect.signature(module.forward).parameters
    left_out = []
    if "position_embeddings" in arguments or any(
        name.startswith(("rotary", "rope")) for name in names | {*vars(module)}
    ):
        left_out.append("rotary")
    if any(part._parameters.get(name) is not None for part in parts.values() for name in ("bias", "in_proj_bias", "bias_k")):
        left_out.append("bias")
    norms = ("q_norm", "k_norm", "query_norm", "key_norm", "q_layernorm", "k_layernorm")
    if any(
        isinstance(getattr(module, name, None), nn.Module) and type(getattr(module, name)) is not nn.Identity
        for name in norms
    ):
        left_out.append("query-key norm")
    if getattr(module, "attn_logit_softcapping", None) is not None:
        left_out.append("logit cap")
    return tuple(left_out)
