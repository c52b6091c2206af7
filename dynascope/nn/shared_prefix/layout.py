"""A prompt once, then all its completions; and where everything lies in such a row (arXiv 2506.05433).

    [ P P P P | R1 R1 R1 | R2 | R3 R3 | pad ]

A row holds one such group, or several behind each other.

Position-wise layers need no change. Positions restart after the prompt for every completion, and attention follows
`dynascope.nn.shared_prefix.attention`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from dynascope.nn.shared_prefix.varlen import Runs

Rule: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(row, query, key) -> which queries see which keys, numbers of columns that broadcast. Compilers look into it, so it is a bare
function of tensors."""


@dataclass(frozen=True, eq=False)
class SharedPrefix:
    """How B prompts and their N completions are packed into rows; prompts have P columns at most, completions R.

    Completions of a prompt stand beside each other. A group has a row of its own, or with `row_length` shares it. Rows are
    padded on the right. What a layout holds is data, on the device of the masks that it was made from: nothing of it is
    kept in a model.

    Raises ValueError for a prompt without a token, group sizes that do not add up to the completions, or a group longer than
    `row_length`.

    >>> layout = SharedPrefix.of(prompt_mask, completion_mask, group_sizes=8)
    >>> rows = layout.pack(prompt_ids, completion_ids)
    """

    prompt_mask: Bool[Tensor, "B P"]
    """Where prompts have tokens; on whichever side they are padded."""
    completion_mask: Bool[Tensor, "N R"]
    group_sizes: Int[Tensor, " B"]
    row_of: Int[Tensor, " B"]
    """The row in which each group stands."""
    block_masks: dict[int | None, Any] = field(default_factory=dict, repr=False)
    """What FlexAttention made of this layout, by sliding window: made once for all layers of a model."""

    @classmethod
    def of(
        cls,
        prompt_mask: Shaped[Tensor, "B P"],
        completion_mask: Shaped[Tensor, "N R"],
        group_sizes: int | Sequence[int] | Int[Tensor, " B"],
        *,
        row_length: int | None = None,
    ) -> "SharedPrefix":
        """From masks of the batch that is not grouped: one row a prompt, one row a completion.

        With `row_length` groups share rows of at most so many tokens, the longest group first and each into the first row
        that has room, a prompt counted once.

        >>> SharedPrefix.of(torch.ones(3, 4), torch.ones(6, 2), 2, row_length=16).row_of
        tensor([0, 0, 1])
        """
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
        each = torch.arange(num, device=prompts.device)
        layout = cls(prompts, completions, sizes, each)
        return layout if row_length is None else replace(layout, row_of=_rows_with_room(layout._num_tokens, row_length))

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
        """The number of each completion's group."""
        rows = torch.arange(len(self.group_sizes), device=self.group_sizes.device)
        return rows.repeat_interleave(self.group_sizes)

    @cached_property
    def place_in_group(self) -> Int[Tensor, " N"]:
        """Number of each completion in its group, from 0."""
        first = self.group_sizes.cumsum(0) - self.group_sizes
        return torch.arange(len(self.group_of), device=first.device) - first[self.group_of]

    @cached_property
    def _num_tokens(self) -> Int[Tensor, " B"]:
        return self.prompt_lengths.index_add(0, self.group_of, self.completion_lengths)

    @cached_property
    def prompt_starts(self) -> Int[Tensor, " B"]:
        """The column at which each prompt begins: behind the groups before it in its row."""
        order = self.row_of.argsort(stable=True)
        before = self._num_tokens[order].cumsum(0) - self._num_tokens[order]
        rows = self.row_of[order]
        is_first = torch.ones_like(rows, dtype=torch.bool)
        is_first[1:] = rows[1:] != rows[:-1]
        in_row = before - before[is_first].repeat_interleave(rows.unique_consecutive(return_counts=True)[1])
        return torch.empty_like(in_row).index_copy(0, order, in_row)

    @cached_property
    def starts(self) -> Int[Tensor, " N"]:
        """The column at which each completion begins."""
        before = self.completion_lengths.cumsum(0) - self.completion_lengths
        first = before[self.place_in_group == 0]
        return (self.prompt_starts + self.prompt_lengths - first)[self.group_of] + before

    @cached_property
    def num_columns(self) -> int:
        """Columns of the packed rows."""
        return int((self.prompt_starts + self._num_tokens).max())

    @cached_property
    def num_rows(self) -> int:
        """Packed rows."""
        return int(self.row_of.max()) + 1

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.num_rows, self.num_columns

    @property
    def longest(self) -> int:
        """Positions from the first to the last, at most."""
        return self.sizes[0] + self.sizes[2]

    @cached_property
    def last_cells(self) -> Int[Tensor, " N"]:
        """The flat cell of each completion's last token, from which reward models and classifiers read; of the prompt's last
        where a completion is empty."""
        ends = torch.where(
            self.completion_lengths > 0, self.starts + self.completion_lengths, self._prompt_ends[self.group_of]
        )
        return self.row_of[self.group_of] * self.num_columns + ends - 1

    @property
    def _prompt_ends(self) -> Int[Tensor, " B"]:
        return self.prompt_starts + self.prompt_lengths

    @cached_property
    def sizes(self) -> tuple[int, int, int]:
        """The longest prompt, the largest group and the longest completion: what padded tensors are made for."""
        longest = int(self.completion_lengths.max()) if len(self.completion_lengths) else 0
        return int(self.prompt_lengths.max()), int(self.group_sizes.max()), max(1, longest)

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all prompts, groups and completions are as long as each other and each group has a row, so that slices do
        for gathering."""
        prompt, group, completion = self.sizes
        return self.num_rows == len(self.group_sizes) and bool(
            (self.prompt_lengths == prompt).all()
            and (self.group_sizes == group).all()
            and (self.completion_lengths == completion).all()
        )

    @cached_property
    def segment_ids(self) -> Int[Tensor, "rows T"]:
        """0 for prompts, 1 … G for completions of a group, -1 for padding."""
        segments = torch.full(self.shape, -1, device=self.starts.device)
        segments[self._prompt_cells] = 0
        segments[self._completion_cells] = (self.place_in_group + 1)[self._completion_of]
        return segments

    @cached_property
    def group_ids(self) -> Int[Tensor, "rows T"]:
        """The number of each token's group, 0 at padding."""
        groups = torch.zeros(self.shape, dtype=torch.long, device=self.starts.device)
        groups[self._prompt_cells] = self._prompt_of
        groups[self._completion_cells] = self.group_of[self._completion_of]
        return groups

    @cached_property
    def padding_mask(self) -> Bool[Tensor, "rows T"]:
        """Where packed rows have tokens."""
        return self.segment_ids >= 0

    @cached_property
    def position_ids(self) -> Int[Tensor, "rows T"]:
        """The position that each token has in the batch that repeats prompts."""
        return self.positions_behind(self._prompt_places)

    def positions_behind(self, prompt_positions: Int[Tensor, "*axes B P"]) -> Int[Tensor, "*axes rows T"]:
        """Positions of packed rows whose prompts have positions of their own, such as M-RoPE's three axes for images.

        Every completion goes on from one behind the largest position of its prompt, over all axes alike (2409.12191,
        section 2.1). What `prompt_positions` hold at padding plays no part.

        >>> shared_prefix_forward(model, rows, layout, position_ids=layout.positions_behind(rope_positions))
        """
        seen = prompt_positions.masked_fill(~self.prompt_mask, -1)
        first = seen.flatten(0, -3).amax((0, 2)) + 1 if seen.ndim > 2 else seen.amax(1) + 1
        positions = prompt_positions.new_zeros((*prompt_positions.shape[:-2], *self.shape))
        positions[..., *self._prompt_cells] = prompt_positions[..., self.prompt_mask]
        number = self._completion_of
        positions[..., *self._completion_cells] = first[self.group_of[number]] + self._place_in_completion
        return positions

    @cached_property
    def _prompt_places(self) -> Int[Tensor, "B P"]:
        return self.prompt_mask.long().cumsum(1) - 1

    @cached_property
    def target_index(self) -> Int[Tensor, "N R"]:
        """For every token of a completion, the flat cell (of rows · T) that predicts it; its first one is predicted by the
        prompt's last. 0 where there is no token."""
        offsets = self.completion_mask.long().cumsum(1) - 1
        inside = self.starts[:, None] + offsets - 1
        last = (self._prompt_ends - 1)[self.group_of][:, None]
        columns = torch.where(offsets == 0, last, inside)
        cells = self.row_of[self.group_of][:, None] * self.num_columns + columns
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
        return self.row_of[self.group_of[number]], self.starts[number] + self._place_in_completion

    @cached_property
    def _place_in_completion(self) -> Int[Tensor, " tokens"]:
        number = self._completion_of
        before = (self.completion_lengths.cumsum(0) - self.completion_lengths)[number]
        return torch.arange(len(number), device=number.device) - before

    @cached_property
    def _prompt_of(self) -> Int[Tensor, " tokens"]:
        numbers = torch.arange(len(self.prompt_lengths), device=self.starts.device)
        return numbers.repeat_interleave(self.prompt_lengths)

    @cached_property
    def _prompt_cells(self) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]]:
        number = self._prompt_of
        before = (self.prompt_lengths.cumsum(0) - self.prompt_lengths)[number]
        inside = torch.arange(len(number), device=number.device) - before
        return self.row_of[number], self.prompt_starts[number] + inside

    def pack(
        self, prompts: Shaped[Tensor, "B P *more"], completions: Shaped[Tensor, "N R *more"], pad: float = 0
    ) -> Shaped[Tensor, "rows T *more"]:
        """Token ids, embeddings or anything else of the two padded tensors as packed rows.

        >>> layout.pack(prompt_ids, completion_ids, pad=tokenizer.pad_token_id)
        """
        packed: Tensor = prompts.new_full((*self.shape, *prompts.shape[2:]), pad)
        packed = packed.index_put(self._prompt_cells, prompts[self.prompt_mask])
        return packed.index_put(self._completion_cells, completions[self.completion_mask])

    def split(
        self, packed: Shaped[Tensor, "rows T *more"]
    ) -> tuple[Shaped[Tensor, "B P *more"], Shaped[Tensor, "N R *more"]]:
        """What `pack` undoes: prompts and completions where their masks say, and zeros elsewhere."""
        prompts = packed.new_zeros((*self.prompt_mask.shape, *packed.shape[2:]))
        completions = packed.new_zeros((*self.completion_mask.shape, *packed.shape[2:]))
        prompts = prompts.index_put(self.prompt_mask.nonzero(as_tuple=True), packed[self._prompt_cells])
        cells = self.completion_mask.nonzero(as_tuple=True)
        return prompts, completions.index_put(cells, packed[self._completion_cells])

    @cached_property
    def unfold_index(self) -> Int[Tensor, "B cells"]:
        """The column, in its group's row, of each cell of the padded arrangement
        [longest prompt | largest group × longest completion]."""
        prompt, group, completion = self.sizes
        device = self.starts.device
        columns = self.prompt_starts[:, None] + torch.arange(prompt, device=device)
        starts = torch.zeros(len(self.prompt_lengths), group, dtype=torch.long, device=device)
        starts[self.group_of, self.place_in_group] = self.starts
        inside = starts[:, :, None] + torch.arange(completion, device=device)
        both = torch.cat([columns, inside.flatten(1)], 1)
        return both.clamp(max=self.num_columns - 1)

    @cached_property
    def fold_index(self) -> Int[Tensor, "rows T"]:
        """The cell of the padded arrangement of its group that each column of a packed row is; 0 for padding."""
        prompt, _, completion = self.sizes
        folded = torch.zeros(self.shape, dtype=torch.long, device=self.starts.device)
        folded[self._prompt_cells] = self._prompt_places[self.prompt_mask]
        behind = prompt + self.place_in_group * completion
        folded[self._completion_cells] = behind[self._completion_of] + self._place_in_completion
        return folded

    @property
    def allows(self) -> Rule:
        """Whether the token at column `query` sees that at `key` of the same row: a prompt sees itself causally; a completion
        its whole prompt, and itself causally, but no other completion and no other group. Padding sees itself alone, so
        that no softmax is empty.
        """
        segments, groups = self.segment_ids, self.group_ids
        return lambda row, query, key: (
            (query == key)
            | (key <= query)
            & (segments[row, query] >= 0)
            & ((segments[row, key] == 0) | (segments[row, key] == segments[row, query]))
            & (groups[row, key] == groups[row, query])
        )

    def dense_mask(self) -> Bool[Tensor, "rows T T"]:
        """`allows` as a mask (query, key).

        >>> scores.masked_fill(~layout.dense_mask()[:, None], -torch.inf)
        """
        rows, columns = (torch.arange(size, device=self.starts.device) for size in self.shape)
        return self.allows(rows[:, None, None], columns[:, None], columns)

    @cached_property
    def stretches(self) -> list[tuple[int, int, int, int]]:
        """Prompts and completions: the row, the first column, that behind, and that behind all that sees the stretch."""
        of, ends = self.group_of, self.starts + self.completion_lengths
        prompts = self.row_of, self.prompt_starts, self._prompt_ends, self.prompt_starts + self._num_tokens
        completions = self.row_of[of], self.starts, ends, ends
        both = [torch.cat(pair).tolist() for pair in zip(prompts, completions, strict=True)]
        return [one for one in zip(*both, strict=True) if one[2] > one[1]]

    @cached_property
    def mean_stretch(self) -> float:
        """Tokens of a prompt or completion, on average."""
        return int(self._num_tokens.sum()) / len(self.stretches)

    @cached_property
    def runs(self) -> Runs:
        """Prompts, and completions behind the keys of their prompts, for flash attention."""
        firsts, (prompt, _, completion) = self.row_of * self.num_columns, self.sizes
        prompts, is_prompt = _cells(firsts + self.prompt_starts, self.prompt_lengths, prompt)
        own, is_own = _cells(firsts[self.group_of] + self.starts, self.completion_lengths, completion)
        is_there = self.completion_lengths > 0
        paths = torch.cat([prompts[self.group_of], own], 1)
        is_key = torch.cat([is_prompt[self.group_of], is_own], 1) & is_there[:, None]
        behind = self.completion_lengths[is_there]
        return Runs(
            torch.cat([prompts[is_prompt], own[is_own]]),
            torch.cat([self.prompt_lengths, behind]),
            torch.cat([prompts[is_prompt], paths[is_key]]),
            torch.cat([self.prompt_lengths, self.prompt_lengths[self.group_of][is_there] + behind]),
        )


def _cells(firsts: Tensor, lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Flat cells of stretches from their first ones, padded to the longest, and which of them are there."""
    places = torch.arange(longest, device=firsts.device)
    return firsts[:, None] + places, places < lengths[:, None]


def _rows_with_room(num_tokens: Int[Tensor, " B"], row_length: int) -> Int[Tensor, " B"]:
    """The longest first, each into the first row that has room for it."""
    if int(num_tokens.max()) > row_length:
        raise ValueError(f"a group of {int(num_tokens.max())} tokens does not fit into rows of row_length={row_length}")
    rows = torch.zeros_like(num_tokens)
    room: list[int] = []
    for group in num_tokens.argsort(descending=True, stable=True).tolist():
        size = int(num_tokens[group])
        row = next((row for row, left in enumerate(room) if left >= size), len(room))
        if row == len(room):
            room.append(row_length)
        room[row] -= size
        rows[group] = row
    return rows
