"""From a loss at every token to one number: which denominator, by name.

The names say what is divided by. Where an optimizer step is made of several micro-batches or ranks, give the counts of
the whole step, and the parts add up to what one large batch would give.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

Denominator = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "group-token-mean", "max-length", "microbatch"
]


def aggregate(
    values: Float[Tensor, "N _"],
    mask: Bool[Tensor, "N T"],
    denominator: str = "token-mean",
    *,
    num_tokens: int | Shaped[Tensor, ""] | None = None,
    num_completions: int | Shaped[Tensor, ""] | None = None,
    max_length: int | None = None,
    group_ids: Int[Tensor, " N"] | None = None,
) -> Float[Tensor, ""]:
    """The mean of `values` where `mask` is True, in the sense of the denominator; an empty mask gives 0.

    Values are of tokens (N, T), or one for all tokens of a completion (N, 1).

    - "token-mean" (DAPO, 2503.14476): every token of the step weighs the same; divides by `num_tokens`.
    - "seq-mean-token-mean" (GRPO, 2402.03300): the mean over completions of their token means.
    - "seq-mean-token-sum": the mean over completions of their sums, as when a completion is one action.
    - "group-token-mean": the mean over prompts of the token mean over the prompt's completions; needs `group_ids`.
    - "max-length" (Dr. GRPO, 2503.20783): sums over completions divided by the length limit `max_length`.
    - "microbatch": the token mean of this batch alone; micro-batches weigh by their completions, whatever their length.

    `num_tokens` and `num_completions` default to this batch's own. Raises ValueError for another name, or a missing
    `max_length` or `group_ids`.

    >>> values, mask = torch.tensor([[2.0, 0, 0], [1, 1, 1]]), torch.tensor([[True, False, False], [True, True, True]])
    >>> [aggregate(values, mask, name).item() for name in ("token-mean", "seq-mean-token-mean")]
    [1.25, 1.5]
    """
    # What is the same at every token needs no (N, T) of its own.
    values = values * (mask if values.shape == mask.shape else mask.sum(1, keepdim=True))
    completions = len(values) if num_completions is None else num_completions
    if denominator == "token-mean":
        count = mask.sum() if num_tokens is None else num_tokens
        return values.sum() / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))
    if denominator == "seq-mean-token-mean":
        return (values.sum(1) / mask.sum(1).clamp(min=1)).sum() / completions
    if denominator == "seq-mean-token-sum":
        return values.sum() / completions
    if denominator == "microbatch":
        return values.sum() / mask.sum().clamp(min=1) * (len(values) / completions)
    if denominator == "max-length":
        if max_length is None:
            raise ValueError("the denominator max-length needs max_length, the length limit in tokens")
        return values.sum() / (completions * max_length)
    if denominator == "group-token-mean":
        if group_ids is None:
            raise ValueError("the denominator group-token-mean needs group_ids")
        return (values.sum(1) * _group_weights(mask, group_ids)).sum()
    raise ValueError(f"there is no denominator {denominator!r}; there are {', '.join(get_args(Denominator))}")


def _group_weights(mask: Bool[Tensor, "N T"], group_ids: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """1 / (number of groups · tokens of the completion's group), without waiting for the device to count groups."""
    is_same = (group_ids[:, None] == group_ids).to(torch.float32)
    num_groups = (1 / is_same.sum(1)).sum()
    return 1 / ((is_same @ mask.sum(1).to(torch.float32)).clamp(min=1) * num_groups)
