"""Circuits: what every head compares (KQ) and passes on (OV), and how near the two are to in-context gradient descent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dynascope.nn.circuits import AttentionWeights, Circuits, attention_weights, find_attention
from dynascope.probes.probe import Need, Probe
from dynascope.probes.views import ModelView
from dynascope.record import Series


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
    same inside a transformer. Leading axes (layers, steps, networks) are kept. Source: 2503.12734, section 3.

    Raises ValueError when KQ has no diagonal to compare with (keys and queries of other widths), or no inputs are left.

    >>> kq = torch.stack([torch.eye(3), -torch.eye(3)])
    >>> pattern_scores(kq, torch.tensor([[[0.0, 0.0, 2.0]], [[0.0, 0.0, -2.0]]])).zero_sum
    tensor([0.])
    """
    identity, same = (torch.eye(size, dtype=kq.dtype, device=kq.device) for size in (kq.shape[-2], ov.shape[-2]))
    whole = AttentionWeights(
        query=kq,
        key=identity.expand(*kq.shape[:-1], -1),
        value=ov,
        out=same.expand(*ov.shape[:-1], -1),
        scale=1.0,
    )
    return factored_pattern_scores(whole, num_inputs, dummy=dummy)


def factored_pattern_scores(
    weights: AttentionWeights, num_inputs: int | None = None, *, dummy: float = 0.05
) -> PatternScores:
    """The same from a layer's matrices, whose products it never forms: heads · head width² · width operations.

    >>> factored_pattern_scores(attention_weights(model.layers[0].self_attn)).omega
    """
    width, read = weights.query.shape[-1], weights.value.shape[-1]
    if weights.key.shape[-1] != width:
        raise ValueError(f"keys of width {weights.key.shape[-1]} and queries of width {width} have no common diagonal")
    if num_inputs is None:
        num_inputs = read - weights.out.shape[-2] if weights.out.shape[-2] < read else read
    if not 0 < num_inputs <= width:
        raise ValueError(f"num_inputs={num_inputs} must lie between 1 and the width {width}")
    has_labels = num_inputs < read
    query, key, value, out = (_exactly(one) for one in (weights.query, weights.key, weights.value, weights.out))
    query = query[..., :num_inputs] * weights.scale
    kq_diagonal = (key[..., :num_inputs] * query).sum(-2)
    kq_norm = _norm_of_product(key, query)
    # Of two equal norms a difference of squares leaves the root of the rounding: hence the double precision above.
    off_diagonal = (kq_norm.square() - kq_diagonal.square().sum(-1)).clamp_min(0).sqrt()
    labels = value[..., num_inputs:] if has_labels else value
    shorter = min(out.shape[-2], labels.shape[-1])
    ov_diagonal = (out.mT[..., :shorter] * labels[..., :shorter]).sum(-2)
    ov_norm = _norm_of_product(out.mT, value)
    mu = ov_diagonal if has_labels else ov_diagonal.mean(-1, keepdim=True)
    omega, size = kq_diagonal.mean(-1), mu.abs().amax(-1)
    is_dummy = size < dummy * size.amax(-1, keepdim=True)
    counted = torch.where(is_dummy, torch.nan, omega.abs())
    mean = counted.nanmean(-1, keepdim=True)
    scores = {
        "omega": omega,
        "mu": mu,
        "off_diagonal": off_diagonal / kq_norm,
        "last_entry_share": _norm_of_product(out.mT, labels) / ov_norm if has_labels else ov_norm * torch.nan,
        "homogeneity": (counted - mean).square().nanmean(-1).sqrt() / mean[..., 0],
        "zero_sum": mu.sum(-2).abs() / mu.abs().sum(-2),
    }
    return PatternScores(**{name: score.float() for name, score in scores.items()}, is_dummy=is_dummy)


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
        raise ValueError(
            f"{len(tasks)} tasks want the circuits of one layer with as many outputs, not {tuple(ov.shape)}"
        )
    if not all(task and min(task) >= 0 and max(task) < num_inputs for task in tasks):
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


class HeadCircuits(Probe):
    """The scores of `pattern_scores` for every attention layer that can be read, by head, from weights alone.

    A layer's name is followed by what acts in it beside the two products (`nn.circuits.Circuits.left_out`): with
    "rotary" KQ is that of a token and itself, and turns with distance. Heads that a layer does not have are NaN, and so is
    the share of labels in layers without labels. `circuits/mu` and `circuits/zero_sum` are means over outputs. Networks
    trained side by side are a layer each. Cross-attention between streams of other widths is left out.

    Cost: heads · head width² · width operations a layer. Source: 2503.12734, section 3.

    >>> dynascope.watch(model, optimizer, probes=["default", "circuits"])
    """

    name = "circuits"
    needs = frozenset({Need.MODEL})
    default = False
    series = (
        Series("circuits/omega", ("layer", "head"), description="Mean diagonal entry of KQ."),
        Series(
            "circuits/mu", ("layer", "head"), description="What the outputs take of their own coordinate through OV."
        ),
        Series("circuits/off_diagonal", ("layer", "head"), description="Share of KQ's norm beside its diagonal."),
        Series("circuits/last_entry_share", ("layer", "head"), description="Share of OV's norm on the labels."),
        Series("circuits/homogeneity", ("layer",), description="Standard deviation over mean of |omega| among heads."),
        Series("circuits/zero_sum", ("layer",), description="|sum of mu| over sum of |mu|: 0 where heads cancel."),
    )

    def coords(self, view: ModelView) -> Mapping[str, Sequence[str]]:
        """The layers' names, with what is left out of their circuits."""
        return {"layer": [name for name, _ in _layers(view)]}

    def measure(self, view: ModelView) -> Mapping[str, Tensor]:
        """Every score of every layer; nothing of a model without attention."""
        found = [factored_pattern_scores(weights) for _, weights in _layers(view)]
        if not found:
            return {}
        return {
            "circuits/omega": _stacked([one.omega for one in found]),
            "circuits/mu": _stacked([one.mu.mean(-1) for one in found]),
            "circuits/off_diagonal": _stacked([one.off_diagonal for one in found]),
            "circuits/last_entry_share": _stacked([one.last_entry_share for one in found]),
            "circuits/homogeneity": torch.stack([one.homogeneity for one in found]),
            "circuits/zero_sum": torch.stack([one.zero_sum.mean(-1) for one in found]),
        }


def _layers(view: ModelView) -> list[tuple[str, AttentionWeights]]:
    """The layers that have a diagonal, one a network."""
    layers = []
    for name, module in find_attention(view.model).items():
        weights = attention_weights(module)
        if weights.key.shape[-1] != weights.query.shape[-1]:
            continue
        whole = (view.name + name).rstrip(".") or type(module).__name__
        label = f"{whole} ({', '.join(weights.left_out)})" if weights.left_out else whole
        if weights.query.ndim == 3:
            layers.append((label, weights))
            continue
        stacks = zip(*(one.flatten(0, -4) for one in _matrices(weights)), strict=True)
        layers += [
            (f"{label} {index}", replace(weights, query=query, key=key, value=value, out=out))
            for index, (query, key, value, out) in enumerate(stacks)
        ]
    return layers


def _matrices(weights: AttentionWeights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return weights.query, weights.key, weights.value, weights.out


def _stacked(by_layer: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, "layers most_heads"]:
    """One row a layer, NaN behind the heads of layers that have fewer than others."""
    return torch.nn.utils.rnn.pad_sequence(list(by_layer), batch_first=True, padding_value=torch.nan)


def _exactly(matrix: Tensor) -> Tensor:
    return matrix.float() if matrix.device.type == "mps" else matrix.double()


def _norm_of_product(
    left: Float[Tensor, "*batch rank a"], right: Float[Tensor, "*batch rank b"]
) -> Float[Tensor, "*batch"]:
    """Frobenius norm of leftᵀ right from two rank × rank Gram matrices."""
    squared: Tensor = ((left @ left.mT) * (right @ right.mT)).sum((-2, -1))
    return squared.clamp_min(0).sqrt()
