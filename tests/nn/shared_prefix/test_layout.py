"""Where tokens lie in packed rows, what predicts what, and what is saved."""

from collections.abc import Callable

import pytest
import torch

from dynascope.nn.shared_prefix import PrefixTree, SharedPrefix, automatic_prefix_groups, estimate_savings


def test_a_row_by_hand(make: Callable[..., SharedPrefix]) -> None:
    layout = make([3], [2], [2, 1])
    assert layout.segment_ids.tolist() == [[0, 0, 0, 1, 1, 2]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert layout.target_index.tolist() == [[2, 3], [2, 0]]
    assert layout.logit_positions.tolist() == [2, 3]
    rows = layout.pack(torch.tensor([[7, 8, 9]]), torch.tensor([[1, 2], [3, 0]]))
    assert rows.tolist() == [[7, 8, 9, 1, 2, 3]]


def test_groups_share_rows_by_hand(make: Callable[..., SharedPrefix]) -> None:
    """Groups of 3, 6 and 4 tokens in rows of 8: the longest first, so [6] and [4, 3]."""
    layout = make([2, 4, 3], [1, 2, 1], [1, 1, 1, 1], 8)
    assert layout.row_of.tolist() == [1, 0, 1]
    assert layout.shape == (2, 7)
    assert layout.prompt_starts.tolist() == [0, 0, 3]
    assert layout.segment_ids.tolist() == [[0, 0, 0, 0, 1, 2, -1], [0, 0, 1, 0, 0, 0, 1]]
    assert layout.group_ids.tolist() == [[1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 2, 2, 2, 2]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 4, 0], [0, 1, 2, 0, 1, 2, 3]]
    assert layout.target_index.tolist() == [[8], [3], [3], [12]]
    assert layout.last_cells.tolist() == [9, 4, 5, 13]
    seen = layout.dense_mask()[1, 6].nonzero().flatten().tolist()
    assert seen == [3, 4, 5, 6]
    with pytest.raises(ValueError, match="group of 6 tokens does not fit into rows of row_length=5"):
        make([2, 4], [1, 2], [1, 1, 1], 5)


def test_positions_of_several_axes_go_on_behind_the_largest(make: Callable[..., SharedPrefix]) -> None:
    """An image's patches stand side by side, so that its prompt is shorter than its tokens are many."""
    layout = make([4, 2], [2, 1], [2, 1, 2])
    height, width = [[0, 1, 1, 2], [9, 9, 0, 5]], [[0, 1, 2, 2], [9, 9, 0, 3]]  # what stands at padding plays no part
    told = layout.positions_behind(torch.tensor([height, width]))
    assert told.tolist() == [
        [[0, 1, 1, 2, 3, 4, 3], [0, 5, 6, 7, 0, 0, 0]],
        [[0, 1, 2, 2, 3, 4, 3], [0, 3, 6, 7, 0, 0, 0]],
    ]
    plain = torch.arange(4).expand(2, -1) - torch.tensor([[0], [2]])
    assert torch.equal(layout.positions_behind(plain), layout.position_ids)


def test_splitting_undoes_packing(layout: SharedPrefix) -> None:
    prompts = torch.randn(*layout.prompt_mask.shape, 5) * layout.prompt_mask[..., None]
    completions = torch.randn(*layout.completion_mask.shape, 5) * layout.completion_mask[..., None]
    packed = layout.pack(prompts, completions)
    assert not packed[~layout.padding_mask].any()
    again = layout.split(packed)
    assert torch.equal(again[0], prompts)
    assert torch.equal(again[1], completions)


def test_gradients_of_packing_and_splitting(make: Callable[..., SharedPrefix]) -> None:
    layout = make([2, 3], [1, 2], [2, 1, 0])
    prompts = torch.randn(*layout.prompt_mask.shape, 2, dtype=torch.float64, requires_grad=True)
    completions = torch.randn(*layout.completion_mask.shape, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: layout.pack(a, b), (prompts, completions))
    packed = torch.randn(*layout.shape, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layout.split(x), (packed,))


def test_folding_undoes_unfolding(layout: SharedPrefix) -> None:
    cells = layout.unfold_index[layout.group_ids, layout.fold_index]
    columns = torch.arange(layout.num_columns).expand_as(cells)
    assert torch.equal(cells[layout.padding_mask], columns[layout.padding_mask])


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_the_side_of_padding_does_not_matter(side: str) -> None:
    mask = {"left": [0, 0, 1, 1, 1], "right": [1, 1, 1, 0, 0], "holes": [1, 0, 1, 0, 1]}[side]
    prompt_mask = torch.tensor([mask]).bool()
    prompts = torch.zeros(1, 5).long().masked_scatter(prompt_mask, torch.tensor([7, 8, 9]))
    layout = SharedPrefix.of(prompt_mask, torch.ones(2, 1), 2)
    assert layout.pack(prompts, torch.tensor([[1], [2]])).tolist() == [[7, 8, 9, 1, 2]]


def test_permuting_completions_permutes_their_cells(make: Callable[..., SharedPrefix]) -> None:
    one, other = make([4], [3], [3, 1, 2]), make([4], [3], [2, 3, 1])
    assert one.num_columns == other.num_columns
    assert sorted(one.completion_lengths.tolist()) == sorted(other.completion_lengths.tolist())
    assert one.starts.tolist() == [4, 7, 8]
    assert other.starts.tolist() == [4, 6, 9]


@pytest.mark.parametrize(
    ("group", "prompt", "completion", "pairs", "ratio"),
    [
        (4, 6, 3, (180, 117), 0.5),
        (8, 4096, 512, 0.3086, 0.2222),
        (16, 4096, 128, 0.1185, 0.0909),
        (2, 4096, 4096, 0.875, 0.75),
    ],
)
def test_savings_by_hand(
    group: int, prompt: int, completion: int, pairs: tuple[int, int] | float, ratio: float
) -> None:
    layout = SharedPrefix.of(torch.ones(1, prompt).bool(), torch.ones(group, completion).bool(), group)
    told = estimate_savings(layout)
    assert told.token_ratio == pytest.approx(ratio, abs=5e-5)
    if isinstance(pairs, tuple):
        assert (told.repeated_pairs, told.shared_pairs) == pairs
    else:
        assert told.pair_ratio == pytest.approx(pairs, abs=5e-5)
    assert prompt > 100 or told.shared_pairs == layout.dense_mask().sum()


def test_savings_of_a_model_lie_between_tokens_and_nothing() -> None:
    transformers = pytest.importorskip("transformers")
    layout = SharedPrefix.of(torch.ones(1, 512).bool(), torch.ones(8, 32).bool(), 8)
    told = estimate_savings(
        layout, transformers.LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2)
    )
    assert told.flops_ratio is not None
    assert told.token_ratio < told.flops_ratio < 1
    assert estimate_savings(layout, transformers.GPT2Config()).flops_ratio is not None
    # Two layers of 4 · 32 + 2 · 32 + 2 · 16 + 3 · 48 numbers a token, and logits of 50 at 12 tokens, two bytes each.
    small = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    kept = estimate_savings(SharedPrefix.of(torch.ones(1, 6), torch.ones(4, 3), 4), small)
    assert kept.repeated_bytes == 2 * (2 * 368 * 36 + 600)
    assert kept.shared_bytes == 2 * (2 * 368 * 18 + 600)


def test_groups_are_found_whatever_their_order_and_padding() -> None:
    a, b = [1, 2, 3, 4], [1, 2, 3, 5, 6]
    c, d = [9, 8, 7], [1, 2]
    width = 6
    ids = torch.zeros(4, width).long()
    mask = torch.zeros(4, width).bool()
    for row, (tokens, left) in enumerate([(a, True), (c, False), (b, False), (d, True)]):
        place = slice(width - len(tokens), width) if left else slice(0, len(tokens))
        ids[row, place], mask[row, place] = torch.tensor(tokens), True
    found = automatic_prefix_groups(ids, mask, min_shared=3)
    assert [(rows.tolist(), shared) for rows, shared in found] == [([3], 1), ([0, 2], 3), ([1], 2)]


def test_equal_sequences_keep_a_token_each() -> None:
    found = automatic_prefix_groups(torch.tensor([[1, 2, 3], [1, 2, 3]]), torch.ones(2, 3), min_shared=1)
    assert [(rows.tolist(), shared) for rows, shared in found] == [([0, 1], 2)]


def test_impossible_groups_are_told() -> None:
    with pytest.raises(ValueError, match="give it a BOS"):
        SharedPrefix.of(torch.zeros(1, 3), torch.ones(2, 1), 2)
    with pytest.raises(ValueError, match="do not make 3 completions"):
        SharedPrefix.of(torch.ones(2, 3), torch.ones(3, 1), 2)
    with pytest.raises(ValueError, match="at least 1"):
        automatic_prefix_groups(torch.ones(1, 2).long(), torch.ones(1, 2), min_shared=0)
    with pytest.raises(ValueError, match="no token"):
        automatic_prefix_groups(torch.ones(1, 2).long(), torch.zeros(1, 2))


def test_a_tree_by_hand() -> None:
    ids = torch.tensor([[1, 2, 4, 0], [1, 2, 3, 9], [1, 5, 0, 0], [1, 2, 0, 0]])
    tree = PrefixTree.of(ids, torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]))
    assert tree.rows.tolist() == [[1, 2, 3, 9, 4, 5]]
    assert tree.position_ids.tolist() == [[0, 1, 2, 3, 2, 1]]
    assert tree.leave.tolist() == [6, 5, 4, 4, 5, 6]
    assert tree.cell_of.tolist() == [[0, 1, 4, 0], [0, 1, 2, 3], [0, 5, 0, 0], [0, 1, 0, 0]]
    assert tree.target_index.tolist() == [[0, 1, 0], [0, 1, 2], [0, 0, 0], [0, 0, 0]]
    seen = [[place for place in range(6) if tree.dense_mask()[0, query, place]] for query in range(6)]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 5]]
