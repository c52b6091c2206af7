"""One row a group: the prompt once, then all its completions; and where everything lies in it (arXiv 2506.05433).

    [ P P P P | R1 R1 R1 | R2 | R3 R3 | pad ]

Position-wise layers need no change. Positions restart after the prompt for every completion, and attention follows
`dynascope.nn.shared_prefix.attention`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SharedPrefix:
    """How B prompts and their N completions are packed into B rows; prompts have P columns at most, completions R.

    Completions of a prompt stand beside each other. Rows are padded on the right. What a layout holds is data, on the
    device of the masks that it was made from: nothing of it is kept in a model.

    Raises ValueError for a prompt without a token, or group sizes that do not add up to the completions.

    >>> layout = SharedPrefix.of(prompt_mask, completion_mask, group_sizes=8)
    >>> rows = layout.pack(prompt_ids, completion_ids)
    """

    prompt_mask: Bool[Tensor, "B P"]
    """Where prompts have tokens; on whichever side they are padded."""
    completion_mask: Bool[Tensor, "N R"]
    group_sizes: Int[Tensor, " B"]
    block_masks: dict[int | None, Any] = field(default_factory=dict, repr=False)
    """What FlexAttention made of this layout, by sliding window: made once for all layers of a model."""

    @classmethod
    def of(
        cls,
        prompt_mask: Shaped[Tensor, "B P"],
        completion_mask: Shaped[Tensor, "N R"],
        group_sizes: int | Sequence[int] | Int[Tensor, " B"],
    ) -> "SharedPrefix":
        """From masks of the batch that is not grouped: one row a prompt, one row a completion."""
        prompts, completions = prompt_mask.bool(), completion_mask.bool()
        num = len(prompts)
        if isinstance(group_sizes, int):
            group_sizes = [group_sizes] * num
        sizes = torch.as_tensor(group_sizes, device=prompts.device).long()
        if len(sizes) != num or int(sizes.sum()) != len(completions) or int(sizes.min()) < 1:
            raise ValueError(
                f"{num} prompts with group sizes {sizes.tolist()[:8]} do not make {len(completions)} completions"
            )
        if not bool(prompts.any(1).all()):
            raise ValueError(
                "a prompt has no token, so nothing predicts the first one of its completions; give it a BOS"
            )
        return cls(prompts, completions, sizes)

    @cached_property
    def prompt_lengths(self) -> Int[Tensor, " B"]:
        """Tokens of each prompt."""
        return self.prompt_mask.sum(1)

    @cached_property
    def completion_lengths(self) -> Int[Tensor, " N"]:
        """Tokens of each completion; 0 is allowed."""
        return self.completion_mask.sum(1)

    @cached_property
    def group_of(self) -> Int[Tensor, " N"]:
        """The row of each completion."""
        rows = torch.arange(len(self.group_sizes), device=self.group_sizes.device)
        return rows.repeat_interleave(self.group_sizes)

    @cached_property
    def place_in_group(self) -> Int[Tensor, " N"]:
        """Number of each completion in its group, from 0."""
        first = self.group_sizes.cumsum(0) - self.group_sizes
        return torch.arange(len(self.group_of), device=first.device) - first[self.group_of]

    @cached_property
    def starts(self) -> Int[Tensor, " N"]:
        """The column at which each completion begins."""
        before = self.completion_lengths.cumsum(0) - self.completion_lengths
        first = before[self.place_in_group == 0]
        return self.prompt_lengths[self.group_of] + before - first[self.group_of]

    @cached_property
    def num_columns(self) -> int:
        """Columns of the packed rows."""
        inside = torch.zeros_like(self.prompt_lengths).index_add_(0, self.group_of, self.completion_lengths)
        return int((self.prompt_lengths + inside).max())

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.group_sizes), self.num_columns

    @property
    def longest(self) -> int:
        """Positions from the first to the last, at most."""
        return self.sizes[0] + self.sizes[2]

    @cached_property
    def last_cells(self) -> Int[Tensor, " N"]:
        """The flat cell of each completion's last token, from which reward models and classifiers read; of the prompt's last
        where a completion is empty."""
        last = torch.where(
            self.completion_lengths > 0, self.starts + self.completion_lengths, self.prompt_lengths[self.group_of]
        )
        return self.group_of * self.num_columns + last - 1

    @cached_property
    def sizes(self) -> tuple[int, int, int]:
        """The longest prompt, the largest group and the longest completion: what padded tensors are made for."""
        longest = int(self.completion_lengths.max()) if len(self.completion_lengths) else 0
        return int(self.prompt_lengths.max()), int(self.group_sizes.max()), max(1, longest)

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all prompts, groups and completions are as long as each other, so that slices do for gathering."""
        prompt, group, completion = self.sizes
        return bool(
            (self.prompt_lengths == prompt).all()
            and (self.group_sizes == group).all()
            and (self.completion_lengths == completion).all()
        )

    @cached_property
    def segment_ids(self) -> Int[Tensor, "B T"]:
        """0 for the prompt, 1 … G for completions, -1 for padding."""
        columns = torch.arange(self.num_columns, device=self.starts.device)
        segments = torch.where(columns < self.prompt_lengths[:, None], 0, -1)
        rows, at = self._completion_cells
        segments[rows, at] = (self.place_in_group + 1)[self._completion_of]
        return segments

    @cached_property
    def padding_mask(self) -> Bool[Tensor, "B T"]:
        """Where packed rows have tokens."""
        return self.segment_ids >= 0

    @cached_property
    def position_ids(self) -> Int[Tensor, "B T"]:
        """The position that each token has in the batch that repeats prompts."""
        columns = torch.arange(self.num_columns, device=self.starts.device).expand(len(self.prompt_lengths), -1)
        positions = columns.clone()
        rows, at = self._completion_cells
        offset = self.starts - self.prompt_lengths[self.group_of]
        positions[rows, at] = at - offset[self._completion_of]
        return positions.masked_fill(~self.padding_mask, 0)

    @cached_property
    def target_index(self) -> Int[Tensor, "N R"]:
        """For every token of a completion, the flat cell (of B · T) that predicts it; its first one is predicted by the
        prompt's last. 0 where there is no token."""
        offsets = self.completion_mask.long().cumsum(1) - 1
        inside = self.starts[:, None] + offsets - 1
        last = (self.prompt_lengths - 1)[self.group_of][:, None]
        columns = torch.where(offsets == 0, last, inside)
        cells = self.group_of[:, None] * self.num_columns + columns
        return cells.masked_fill(~self.completion_mask, 0)

    @cached_property
    def logit_positions(self) -> Int[Tensor, " cells"]:
        """The flat cells that predict something, each once: all that the output head has to see."""
        cells: Tensor = self.target_index[self.completion_mask].unique()
        return cells

    @cached_property
    def _completion_of(self) -> Int[Tensor, " tokens"]:
        numbers = torch.arange(len(self.group_of), device=self.starts.device)
        return numbers.repeat_interleave(self.completion_lengths)

    @cached_property
    def _completion_cells(self) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]]:
        """Row and column of every token of a completion, in the order of the completions."""
        number = self._completion_of
        before = (self.completion_lengths.cumsum(0) - self.completion_lengths)[number]
        inside = torch.arange(len(number), device=number.device) - before
        return self.group_of[number], self.starts[number] + inside

    @cached_property
    def _prompt_cells(self) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]]:
        rows = torch.arange(len(self.prompt_lengths), device=self.starts.device).repeat_interleave(self.prompt_lengths)
        before = (self.prompt_lengths.cumsum(0) - self.prompt_lengths)[rows]
        return rows, torch.arange(len(rows), device=rows.device) - before

    def pack(
        self, prompts: Shaped[Tensor, "B P *more"], completions: Shaped[Tensor, "N R *more"], pad: float = 0
    ) -> Shaped[Tensor, "B T *more"]:
        """Token ids, embeddings or anything else of the two padded tensors as packed rows.

        >>> layout.pack(prompt_ids, completion_ids, pad=tokenizer.pad_token_id)
        """
        packed: Tensor = prompts.new_full((len(prompts), self.num_columns, *prompts.shape[2:]), pad)
        packed = packed.index_put(self._prompt_cells, prompts[self.prompt_mask])
        return packed.index_put(self._completion_cells, completions[self.completion_mask])

    def split(
        self, packed: Shaped[Tensor, "B T *more"]
    ) -> tuple[Shaped[Tensor, "B P *more"], Shaped[Tensor, "N R *more"]]:
        """What `pack` undoes: prompts and completions where their masks say, and zeros elsewhere."""
        prompts = packed.new_zeros((*self.prompt_mask.shape, *packed.shape[2:]))
        completions = packed.new_zeros((*self.completion_mask.shape, *packed.shape[2:]))
        prompts = prompts.index_put(self.prompt_mask.nonzero(as_tuple=True), packed[self._prompt_cells])
        cells = self.completion_mask.nonzero(as_tuple=True)
        return prompts, completions.index_put(cells, packed[self._completion_cells])

    @cached_property
    def unfold_index(self) -> Int[Tensor, "B cells"]:
        """The column of each cell of the padded arrangement [longest prompt | largest group × longest completion]."""
        prompt, group, completion = self.sizes
        device = self.starts.device
        columns = torch.arange(prompt, device=device).expand(len(self.prompt_lengths), -1)
        starts = torch.zeros(len(self.prompt_lengths), group, dtype=torch.long, device=device)
        starts[self.group_of, self.place_in_group] = self.starts
        inside = starts[:, :, None] + torch.arange(completion, device=device)
        both = torch.cat([columns, inside.flatten(1)], 1)
        return both.clamp(max=self.num_columns - 1)

    @cached_property
    def fold_index(self) -> Int[Tensor, "B T"]:
        """The cell of the padded arrangement that each column of a packed row is; 0 for padding."""
        prompt, _, completion = self.sizes
        folded = torch.arange(self.num_columns, device=self.starts.device).expand(len(self.prompt_lengths), -1).clone()
        rows, at = self._completion_cells
        number = self._completion_of
        folded[rows, at] = prompt + self.place_in_group[number] * completion + at - self.starts[number]
        return folded.masked_fill(~self.padding_mask, 0)

    def dense_mask(self) -> Bool[Tensor, "B T T"]:
        """The attention rule as a mask (query, key): a prompt sees itself causally; a completion the whole prompt, and
        itself causally, but no other completion. Padding sees itself alone, so that no row is empty.

        >>> scores.masked_fill(~layout.dense_mask()[:, None], -torch.inf)
        """
        segments = self.segment_ids
        query, key = segments[:, :, None], segments[:, None, :]
        causal = torch.ones(self.num_columns, self.num_columns, dtype=torch.bool, device=segments.device).tril()
        allowed = causal & (key >= 0) & (query >= 0) & ((key == 0) | (key == query))
        return allowed | torch.eye(self.num_columns, dtype=torch.bool, device=segments.device)
