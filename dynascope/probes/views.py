"""What probes are shown of a run: plain dataclasses of tensors, built by the watch and easy to build by hand."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class StepView:
    """One optimizer step, seen right after it: parameters by name, what moved them, and what the optimizer keeps.

    A parameter without a gradient in this step has no entry in `gradients`. `updates` is parameter after minus
    parameter before. `previous_gradients` are those of the step before. `states` is the optimizer's own state of each
    parameter (`exp_avg_sq`, …) and `groups` its settings (`lr`, `eps`, …). `num_examples` is the batch size of the
    step where known. Under sharding (FSDP2) every tensor is this process's shard; `sum_over_shards` adds what the
    shards contribute, and `whole` gathers one tensor; `full_shapes` are the shapes before sharding.
    """

    step: int
    parameters: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    previous_gradients: Mapping[str, Tensor]
    updates: Mapping[str, Tensor]
    states: Mapping[str, Mapping[str, Any]]
    groups: Mapping[str, Mapping[str, Any]]
    num_examples: int | None = None
    sum_over_shards: Callable[[Sequence[str], Tensor], Tensor] = lambda names, contributions: contributions
    gather: Callable[[str], Tensor] | None = None

    full_shapes: Mapping[str, torch.Size] | None = None

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """The shape of each whole parameter."""
        return self.full_shapes or {name: parameter.shape for name, parameter in self.parameters.items()}

    def whole(self, name: str) -> Tensor:
        """One parameter, gathered from its shards if it has any."""
        return self.parameters[name] if self.gather is None else self.gather(name)

    def squared_norms(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, " parameter"]:
        """Squared norm of each parameter's tensor in float32, in the order of `parameters`; NaN where there is none."""
        return self.per_parameter(tensors.keys(), stacked(foreach_norm(list(tensors.values()))).square())

    def per_parameter(
        self, names: Iterable[str], contributions: Float[Tensor, " given"]
    ) -> Float[Tensor, " parameter"]:
        """One value a parameter, summed over shards; NaN for parameters not among `names`."""
        names = list(names)
        place = {name: index for index, name in enumerate(self.parameters)}
        total = self.sum_over_shards(names, contributions)
        if names == list(place):
            return total
        index = torch.tensor([place[name] for name in names], device=contributions.device)
        return contributions.new_full((len(place),), float("nan")).index_copy(0, index, total)


def foreach_norm(tensors: list[Tensor]) -> list[Float[Tensor, ""]]:
    """Euclidean norm of each tensor in float32, in one multi-tensor pass."""
    return list(torch._foreach_norm(tensors, 2, dtype=torch.float32)) if tensors else []


def stacked(scalars: list[Tensor]) -> Float[Tensor, " count"]:
    """Zero-dimensional tensors as one vector; none give an empty one."""
    return torch.stack(scalars) if scalars else torch.empty(0)


@dataclass(frozen=True)
class CurvatureView:
    """The loss of one batch as a function of the parameters: products with its Hessian, and the learning rate.

    `hessian_product(v)` takes and gives one flat vector over all trainable parameters (`size` entries); each call
    costs about two forward and backward passes.
    """

    step: int
    size: int
    hessian_product: Callable[[Float[Tensor, " size"]], Float[Tensor, " size"]]
    lr: float
    device: torch.device


@dataclass(frozen=True)
class ModelView:
    """The model itself with the first rows of the step's batch, to be called in whatever way a probe needs.

    The model is uncompiled and in evaluation mode, under `no_grad` (a probe that differentiates opens
    `torch.enable_grad()` or uses `torch.func`); random state, buffers and modes are put back after the probe. Parameters
    and their `grad` must be left as they are. Under sharding (FSDP2) a probe sees sharded parameters. `lr` is that of the
    first parameter group.

    >>> view.model(*view.args, **view.kwargs)
    """

    step: int
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    lr: float
    name: str = ""
    """What stands before the names of the model's modules, where it is a part of something larger."""

    def __call__(self) -> Any:
        """What the model returns for these rows."""
        return self.model(*self.args, **self.kwargs)


@dataclass(frozen=True)
class ModuleOutput:
    """What one module, activation function or residual block returned in the shadow pass.

    `tensor` keeps the module's own shape: (rows, positions, features), (rows, features) or (rows, channels, *space).
    `is_channels_first` is True where features are the second axis (convolutions). `kind` names the activation function
    ("relu", "gelu", …) where the view is one's output.
    """

    name: str
    module: nn.Module | None
    tensor: Tensor
    is_channels_first: bool = False
    kind: str = ""

    def by_unit(self) -> Float[Tensor, "positions units"]:
        """The output as one row a position and one column a unit, in float32."""
        tensor = self.tensor.movedim(1, -1) if self.is_channels_first else self.tensor
        return tensor.reshape(-1, tensor.shape[-1]).float()


@dataclass(frozen=True)
class AttentionCall:
    """One call of attention as the shadow pass saw it, whichever way the model computes it.

    `key` and `value` may have fewer heads than `query` (grouped-query attention). `mask` broadcasts to
    (rows, heads, queries, keys): bool (True = visible) or float (added to the logits).
    `is_causal` aligns the first query with the first key, as `scaled_dot_product_attention` does. `tokens` are the
    token ids that the model was called with, where it was called with such. `kind` is how logits become weights:
    "softmax", "relu" (over the number of visible keys) or "sigmoid".
    """

    name: str
    query: Float[Tensor, "rows heads queries head_dim"]
    key: Float[Tensor, "rows kv_heads keys head_dim"]
    value: Float[Tensor, "rows kv_heads keys value_dim"]
    scale: float
    is_causal: bool = False
    mask: Bool[Tensor, "#rows #heads #queries #keys"] | Float[Tensor, "#rows #heads #queries #keys"] | None = None
    tokens: Int[Tensor, "rows positions"] | None = None
    kind: str = "softmax"


@dataclass(frozen=True)
class ExampleBatch:
    """Examples of one training batch with their identity, as handed to `Watch.examples`."""

    step: int
    ids: Int[Tensor, " batch"]
    logits: Float[Tensor, "batch classes"]
    labels: Int[Tensor, " batch"]


@dataclass(frozen=True)
class AttentionBlock:
    """Some consecutive queries of an attention call: masked logits (-inf where hidden) in float32."""

    first_query: int
    logits: Float[Tensor, "rows heads block keys"]
    kind: str = "softmax"

    @cached_property
    def visible(self) -> Bool[Tensor, "rows heads block keys"]:
        """Which keys each query sees."""
        return self.logits > -math.inf

    @cached_property
    def num_visible(self) -> Int[Tensor, "rows heads block"]:
        """How many they are."""
        return self.visible.sum(-1)

    @cached_property
    def weights(self) -> Float[Tensor, "rows heads block keys"]:
        """What each query gives to each key; 0 where hidden, and in rows that see no key."""
        if self.kind == "softmax":
            # Several times faster than exp of its logarithm, which is slow where keys are hidden.
            return self.logits.softmax(-1).nan_to_num_(nan=0.0)
        if self.kind == "relu":
            return self.logits.clamp(min=0) / self.num_visible.unsqueeze(-1).clamp(min=1)
        return self.logits.sigmoid()

    @cached_property
    def shares(self) -> Float[Tensor, "rows heads block keys"]:
        """Each key's share of what its row attends; 0 where the row attends to nothing."""
        if self.kind == "softmax":
            return self.weights
        return (self.weights / self.weights.sum(-1, keepdim=True)).nan_to_num(nan=0.0)

    def log_weights(self) -> Float[Tensor, "rows heads block keys"]:
        """Log of the attention weights; rows that see no key are all -inf, never NaN."""
        if self.kind == "relu":
            return self.weights.log()
        if self.kind == "sigmoid":
            return torch.nn.functional.logsigmoid(self.logits)
        return torch.log_softmax(self.logits, dim=-1).nan_to_num_(nan=-math.inf, neginf=-math.inf)

    def log_shares(self) -> Float[Tensor, "rows heads block keys"]:
        """Log of each key's share of what its row attends; all -inf where the row attends to nothing."""
        log_weights = self.log_weights()
        if self.kind == "softmax":
            return log_weights
        relative = log_weights - log_weights.logsumexp(-1, keepdim=True)
        return relative.nan_to_num(nan=-math.inf, neginf=-math.inf)


def attention_blocks(call: AttentionCall, block: int = 128, most: int | None = None) -> Iterator[AttentionBlock]:
    """The call's logits a block of queries at a time, so that no queries × keys map of the whole call is kept.

    Memory: rows × heads × block × keys floats. Works for grouped-query attention, causal and any broadcastable mask. In
    self-attention a position that the mask hides from every query is padding, and sees nothing itself. With `most` only
    so many queries of each row are looked at, in blocks at even distances of which the last is at the end.

    >>> for part in attention_blocks(call, block=64):
    ...     part.weights.sum(-1)  # ones
    """
    num_heads, num_queries, num_keys = call.query.shape[1], call.query.shape[2], call.key.shape[2]
    groups = num_heads // call.key.shape[1]
    key = call.key.float().repeat_interleave(groups, dim=1).transpose(-2, -1)
    key_position = torch.arange(num_keys, device=key.device)
    shown = None if call.mask is None else shown_by(call.mask)
    padding = None if shown is None or num_queries != num_keys else ~shown.any(-2, keepdim=True).mT
    if most is not None and most < num_queries:
        # Eight places at least, as attention early in a row is another thing than late.
        block = max(1, min(block, most // 8))
        count = max(1, most // block)
        firsts = [num_queries * part // count - block for part in range(1, count + 1)]
    else:
        firsts = list(range(0, num_queries, block))
    for first in firsts:
        last = min(first + block, num_queries)
        logits = (call.query[:, :, first:last].float() * call.scale) @ key
        if call.is_causal:
            query_position = torch.arange(first, last, device=key.device)
            hidden = key_position > query_position[:, None]
            logits += torch.zeros_like(hidden, dtype=logits.dtype).masked_fill(hidden, float("-inf"))
        if call.mask is not None and shown is not None:
            part, visible = (
                whole if whole.shape[-2] == 1 else whole[..., first:last, :] for whole in (call.mask, shown)
            )
            bias = torch.zeros_like(part, dtype=logits.dtype) if part.dtype == torch.bool else part.float()
            logits += bias.masked_fill(~visible, float("-inf"))
        if padding is not None:
            logits.masked_fill_(padding if padding.shape[-2] == 1 else padding[..., first:last, :], float("-inf"))
        yield AttentionBlock(first, logits, call.kind)


def shown_by(mask: Bool[Tensor, "*shape"] | Float[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """Where an attention mask lets be seen: True, or an addition far above the lowest number of half precision.

    A mask of single precision may have been made in half.
    """
    return mask if mask.dtype == torch.bool else mask > torch.finfo(torch.float16).min / 2
