"""Completions by the prompts that they share, from whatever a batch looks like."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from dynascope.nn.shared_prefix.grouping import automatic_prefix_groups
from dynascope.nn.shared_prefix.layout import SharedPrefix


@dataclass(frozen=True, eq=False)
class PromptGroups:
    """B prompts, padded on the left, and N completions, padded on the right, those of a prompt beside each other.

    >>> groups = PromptGroups(prompts, prompt_mask, completions, completion_mask, group_sizes=torch.full((len(prompts),), 8))
    """

    prompts: Int[Tensor, "B P"]
    prompt_mask: Bool[Tensor, "B P"]
    completions: Int[Tensor, "N R"]
    mask: Bool[Tensor, "N R"]
    group_sizes: Int[Tensor, " B"]
    row_length: int | None = None
    """Tokens up to which groups share a packed row; None gives each a row, padded to the longest group's."""

    @cached_property
    def layout(self) -> SharedPrefix:
        """How they are packed."""
        return SharedPrefix.of(self.prompt_mask, self.mask, self.group_sizes, row_length=self.row_length)

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        group_sizes: int | Sequence[int],
        *,
        row_length: int | None = None,
    ) -> "PromptGroups":
        """From lists of tokens, those of a prompt's completions beside each other.

        >>> groups = PromptGroups.of([[1, 2, 3]], [[4, 5], [6]], 2)
        """
        sizes = [group_sizes] * len(prompts) if isinstance(group_sizes, int) else list(group_sizes)

        def padded(rows: Sequence[Sequence[int]], *, on_left: bool) -> tuple[Tensor, Tensor]:
            lengths = torch.tensor([len(one) for one in rows])[:, None]
            width = max(1, int(lengths.max()))
            columns = torch.arange(width)
            mask = columns >= width - lengths if on_left else columns < lengths
            flat = torch.tensor([token for one in rows for token in one], dtype=torch.long)
            return torch.zeros(mask.shape, dtype=torch.long).masked_scatter(mask, flat), mask

        both = *padded(prompts, on_left=True), *padded(completions, on_left=False)
        return cls(*both, torch.tensor(sizes), row_length)

    @classmethod
    def of_pairs(
        cls,
        tokens: Int[Tensor, "sequences positions"],
        mask: Shaped[Tensor, "sequences positions"],
        attention_mask: Shaped[Tensor, "sequences positions"],
    ) -> "PromptGroups":
        """From preference pairs as TRL collates them: chosen sequences first, as many rejected ones after; `mask` marks
        responses. Each pair's two responses stand beside each other, the chosen one first.

        Raises ValueError for a pair whose sequences have different prompts.

        >>> log_probs, _ = grouped_log_probs(model, PromptGroups.of_pairs(input_ids, completion_mask, attention_mask))
        >>> chosen, rejected = log_probs.sum(1).view(-1, 2).unbind(1)
        """
        rows = [place for pair in zip(*torch.arange(len(tokens)).chunk(2), strict=True) for place in map(int, pair)]
        prompts, completions = (
            [tokens[row][seen[row]].tolist() for row in rows]
            for seen in (attention_mask.bool() & ~mask.bool(), mask.bool())
        )
        different = [place for place in range(0, len(rows), 2) if prompts[place] != prompts[place + 1]]
        if different:
            raise ValueError(f"pair {different[0] // 2} has two prompts; a pair must share one")
        return cls.of(prompts[::2], completions, 2).to(tokens.device)

    @classmethod
    def of_sequences(
        cls, input_ids: Int[Tensor, "N S"], attention_mask: Shaped[Tensor, "N S"], *, min_shared: int = 16
    ) -> tuple["PromptGroups", Int[Tensor, " N"]]:
        """From whole sequences of which nobody said where prompts end: what they share counts as prompt, the rest as completion.

        Also gives the row of the batch that each completion had. Raises ValueError as `automatic_prefix_groups` does.

        >>> groups, rows = PromptGroups.of_sequences(torch.tensor([[5, 6, 7], [5, 6, 8]]), torch.ones(2, 3), min_shared=2)
        >>> groups.completions
        tensor([[7],
                [8]])
        """
        found = automatic_prefix_groups(input_ids, attention_mask, min_shared=min_shared)
        own = [ids[seen].tolist() for ids, seen in zip(input_ids, attention_mask.bool(), strict=True)]
        rows = torch.cat([members for members, _ in found])
        prompts = [own[int(members[0])][:shared] for members, shared in found]
        completions = [own[row][shared:] for members, shared in found for row in members.tolist()]
        return cls.of(prompts, completions, [len(members) for members, _ in found]).to(input_ids.device), rows

    def to(self, device: torch.device | str) -> "PromptGroups":
        """The same on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return PromptGroups(row_length=self.row_length, **moved)

    @classmethod
    def of_repeated(
        cls,
        prompts: Int[Tensor, "N P"],
        prompt_mask: Bool[Tensor, "N P"],
        completions: Int[Tensor, "N R"],
        mask: Bool[Tensor, "N R"],
    ) -> tuple["PromptGroups", Int[Tensor, " N"]]:
        """From a batch that repeats prompts, in any order; and the row of the batch that each completion had.

        >>> groups, rows = PromptGroups.of_repeated(prompts, prompt_mask, completions, mask)
        >>> log_probs = torch.empty_like(told).index_copy(0, rows, told)  # back in the batch's order
        """
        key = prompts.masked_fill(~prompt_mask, -1)
        unique, group, sizes = key.unique(dim=0, return_inverse=True, return_counts=True)
        rows = group.argsort(stable=True)
        seen = unique >= 0
        return cls(unique.masked_fill(~seen, 0), seen, completions[rows], mask[rows], sizes), rows
