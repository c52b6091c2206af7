"""Which sequences of a batch begin alike, when nobody said so."""

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor


def automatic_prefix_groups(
    input_ids: Int[Tensor, "N S"], attention_mask: Shaped[Tensor, "N S"], *, min_shared: int = 16
) -> list[tuple[Int[Tensor, " rows"], int]]:
    """Sequences that share their first tokens, as (row numbers, tokens shared); others are groups of their own.

    A group's members agree in at least `min_shared` tokens, and each keeps a token behind what is shared. Sequences are
    sorted, so that neighbours share most: a group ends where the next one shares fewer. Rows are padded on either side.

    Raises ValueError for `min_shared` below 1, or a row without a token.

    >>> automatic_prefix_groups(torch.tensor([[5, 6, 7], [1, 2, 3], [5, 6, 8]]), torch.ones(3, 3), min_shared=2)
    [(tensor([1]), 2), (tensor([0, 2]), 2)]
    """
    if min_shared < 1:
        raise ValueError(f"min_shared={min_shared} must be at least 1")
    tokens, lengths = without_padding(input_ids, attention_mask.bool())
    rows = sorted_rows(tokens)
    kept = lengths[rows]
    agree = torch.minimum(common_with_the_one_before(tokens[rows], kept), torch.minimum(kept[1:], kept[:-1]) - 1)

    groups: list[tuple[Tensor, int]] = []
    members, shared = [0], int(kept[0]) - 1
    for number, common in enumerate(agree.tolist(), 1):
        if common >= min_shared:
            members.append(number)
            shared = min(shared, common)
        else:
            groups.append((rows[members].sort().values, max(1, shared)))
            members, shared = [number], int(kept[number]) - 1
    return [*groups, (rows[members].sort().values, max(1, shared))]


def without_padding(
    input_ids: Int[Tensor, "N S"], mask: Bool[Tensor, "N S"]
) -> tuple[Int[Tensor, "N S"], Int[Tensor, " N"]]:
    """Sequences moved to the left, −1 behind them, and their lengths. Raises ValueError for a row without a token.

    >>> without_padding(torch.tensor([[0, 7, 8]]), torch.tensor([[False, True, True]]))
    (tensor([[ 7,  8, -1]]), tensor([2]))
    """
    lengths = mask.sum(1)
    if not bool(lengths.all()):
        raise ValueError("a row has no token; leave it out")
    # A stable sort brings padding on the left to the right.
    order = (~mask).int().argsort(dim=1, stable=True)
    return input_ids.gather(1, order).masked_fill(~mask.gather(1, order), -1), lengths


def sorted_rows(tokens: Int[Tensor, "N S"]) -> Int[Tensor, " N"]:
    """Row numbers in the order of dictionaries.

    >>> sorted_rows(torch.tensor([[5, 6], [1, 9], [5, 2]]))
    tensor([1, 2, 0])
    """
    # From the last column to the first; each sort keeps what it finds.
    rows = torch.arange(len(tokens), device=tokens.device)
    for column in reversed(range(tokens.shape[1])):
        rows = rows[tokens[rows, column].argsort(stable=True)]
    return rows


def common_with_the_one_before(tokens: Int[Tensor, "N S"], lengths: Int[Tensor, " N"]) -> Int[Tensor, " N-1"]:
    """How many first tokens each row but the first has in common with the row before.

    >>> common_with_the_one_before(torch.tensor([[1, 2, 3], [1, 2, 4]]), torch.tensor([3, 3]))
    tensor([2])
    """
    agree: Tensor = (tokens[1:] == tokens[:-1]).int().cumprod(1).sum(1)
    return torch.minimum(agree, torch.minimum(lengths[1:], lengths[:-1]))
