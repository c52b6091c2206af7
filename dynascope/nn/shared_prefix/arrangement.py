"""Packed rows as padded tensors of prompts and of completions, and back."""

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from dynascope.nn.shared_prefix.layout import SharedPrefix


def unfold(
    x: Shaped[Tensor, "rows H T d"], layout: SharedPrefix
) -> tuple[Shaped[Tensor, "B H P d"], Shaped[Tensor, "B G H R d"]]:
    """Prompts, and completions by their groups, padded to the longest of each.

    >>> own_keys, keys = unfold(key, layout)
    """
    prompt, group, completion = layout.sizes
    if not layout.is_uniform:
        x = x.transpose(1, 2)[layout.row_of[:, None], layout.unfold_index].transpose(1, 2)
    inside = x[:, :, prompt:].unflatten(2, (group, completion))
    return x[:, :, :prompt], inside.transpose(1, 2)


def fold(
    prompts: Shaped[Tensor, "B H P d"], completions: Shaped[Tensor, "B G H R d"], layout: SharedPrefix
) -> Shaped[Tensor, "rows H T d"]:
    """The inverse of `unfold`.

    >>> fold(*unfold(x, layout), layout)
    """
    inside = completions.transpose(1, 2).flatten(2, 3)
    both = torch.cat([prompts, inside], 2)
    if layout.is_uniform:
        return both
    return both.transpose(1, 2)[layout.group_ids, layout.fold_index].transpose(1, 2)


def prompt_key_mask(layout: SharedPrefix) -> Bool[Tensor, "B P"] | None:
    """Where padded prompts have keys; None where all are as long.

    >>> prompt_key_mask(SharedPrefix.of(torch.tensor([[0, 1], [1, 1]]), torch.ones(2, 1), 1))
    tensor([[ True, False],
            [ True,  True]])
    """
    longest = layout.sizes[0]
    if bool((layout.prompt_lengths == longest).all()):
        return None
    return torch.arange(longest, device=layout.prompt_lengths.device) < layout.prompt_lengths[:, None]


def as_many(x: Shaped[Tensor, "B K T d"], num_heads: int) -> Shaped[Tensor, "B H T d"]:
    """Key or value heads repeated for the query heads that share them.

    >>> as_many(torch.zeros(1, 2, 3, 8), num_heads=4).shape
    torch.Size([1, 4, 3, 8])
    """
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], 1)
