"""All backends are the attention of the batch that repeats prompts, forward and backward."""

import sys
import types
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dynascope.nn.shared_prefix import Backend, PrefixTree, SharedPrefix, grouped_attention
from dynascope.nn.shared_prefix import cascade as module

BACKENDS: tuple[Backend, ...] = ("cascade", "two_call", "dense_mask", "auto")


def inputs(layout: SharedPrefix, heads: int = 4, shared: int = 2) -> list[Tensor]:
    rows, columns = layout.shape
    return [
        torch.randn(rows, num, columns, 8, dtype=torch.float64, requires_grad=True) for num in (heads, shared, shared)
    ]


def one_by_one(
    layout: SharedPrefix | PrefixTree,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Each sequence alone, its tokens found by their paths, with plain softmax; by the definition."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    output = torch.zeros_like(query)
    for row, columns in paths(layout):
        q, k, v = (one[row][:, columns] for one in (query, key, value))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        scores = scores if soft_cap is None else soft_cap * torch.tanh(scores / soft_cap)
        place = torch.arange(len(columns))
        hidden = place[:, None] < place
        if window is not None:
            hidden = hidden | (place[:, None] - place >= window)
        output[row, :, columns] = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    return output


def paths(layout: SharedPrefix | PrefixTree) -> list[tuple[int, Tensor]]:
    """The row and the columns of each sequence."""
    if isinstance(layout, PrefixTree):
        return [(0, cells[seen]) for cells, seen in zip(layout.cell_of, layout.mask, strict=True)]
    found = []
    for number, group in enumerate(layout.group_of.tolist()):
        first, start = int(layout.prompt_starts[group]), int(layout.starts[number])
        prompt = torch.arange(first, first + int(layout.prompt_lengths[group]))
        own = torch.arange(start, start + int(layout.completion_lengths[number]))
        found.append((int(layout.row_of[group]), torch.cat([prompt, own])))
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_is_attention_by_the_definition(layout: SharedPrefix, backend: Backend) -> None:
    query, key, value = inputs(layout)
    seen = layout.padding_mask[:, None, :, None]
    weights = torch.randn_like(query) * seen
    expected = one_by_one(layout, query, key, value)
    told = grouped_attention(query, key, value, layout, backend=backend)
    assert torch.allclose(told * seen, expected * seen, atol=1e-14)
    gradients = torch.autograd.grad((told * weights).sum(), (query, key, value))
    for mine, other in zip(
        gradients, torch.autograd.grad((expected * weights).sum(), (query, key, value)), strict=True
    ):
        assert torch.allclose(mine, other, atol=1e-13)


def test_flex_follows_the_same_rule(layout: SharedPrefix) -> None:
    """Forward alone: FlexAttention has no backward pass on a CPU."""
    query, key, value = (one.detach() for one in inputs(layout))
    seen = layout.padding_mask[:, None, :, None]
    for window in (None, 3):
        told = grouped_attention(query, key, value, layout, backend="flex", window=window)
        assert torch.allclose(told * seen, one_by_one(layout, query, key, value, window) * seen, atol=1e-14)


def test_a_window_counts_positions(layout: SharedPrefix) -> None:
    query, key, value = (one.detach() for one in inputs(layout))
    seen = layout.padding_mask[:, None, :, None]
    told = grouped_attention(query, key, value, layout, window=3)
    assert torch.allclose(told * seen, one_by_one(layout, query, key, value, 3) * seen, atol=1e-14)
    whole = grouped_attention(query, key, value, layout, window=1000, backend="cascade")
    assert torch.allclose(whole * seen, one_by_one(layout, query, key, value) * seen, atol=1e-14)


def test_a_soft_cap_holds_scores(layout: SharedPrefix) -> None:
    query, key, value = inputs(layout)
    seen = layout.padding_mask[:, None, :, None]
    expected = one_by_one(layout, query, key, value, 4, soft_cap=0.5)
    told = grouped_attention(query, key, value, layout, window=4, soft_cap=0.5)
    assert torch.allclose(told * seen, expected * seen, atol=1e-14)
    plain = [one.detach() for one in (query, key, value)]
    flex = grouped_attention(*plain, layout, backend="flex", window=4, soft_cap=0.5)
    assert torch.allclose(flex * seen, expected * seen, atol=1e-14)
    weights = torch.randn_like(told) * seen
    pairs = (torch.autograd.grad((one * weights).sum(), (query, key, value)) for one in (told, expected))
    for mine, other in zip(*pairs, strict=True):
        assert torch.allclose(mine, other, atol=1e-13)


SEQUENCES = [[3, 4, 5, 6, 7], [3, 4, 5, 8], [3, 4], [9, 8, 7, 6], [3, 4, 5, 6, 2], [3, 4, 5, 8]]


def tree_of(sequences: Sequence[Sequence[int]]) -> PrefixTree:
    width = max(map(len, sequences))
    ids = torch.tensor([[0] * (width - len(one)) + list(one) for one in sequences])
    return PrefixTree.of(ids, torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in sequences]))


@pytest.mark.parametrize("backend", ["cascade", "dense_mask", "auto", "flex"])
@pytest.mark.parametrize("shared", [1, 2, 4])
def test_a_tree_is_each_sequence_alone_whatever_the_backend(backend: Backend, shared: int) -> None:
    tree = tree_of(SEQUENCES)
    columns = tree.shape[1]
    query, key, value = (
        torch.randn(1, num, columns, 8, dtype=torch.float64, requires_grad=backend != "flex")
        for num in (4, shared, shared)
    )
    told = grouped_attention(query, key, value, tree, backend=backend)
    expected = one_by_one(tree, query, key, value)
    assert torch.allclose(told, expected, atol=1e-14)
    if backend != "flex":  # which has no backward pass on a CPU
        weights = torch.randn_like(told)
        pairs = (torch.autograd.grad((one * weights).sum(), (query, key, value)) for one in (told, expected))
        for mine, other in zip(*pairs, strict=True):
            assert torch.allclose(mine, other, atol=1e-13)


def test_stretches_of_a_tree_by_hand() -> None:
    tree = tree_of([[1, 2, 3, 9], [1, 2, 4], [5]])
    assert tree.rows.tolist() == [[1, 2, 3, 9, 4, 5]]
    assert tree.stretches == [(0, 0, 2, 5), (0, 2, 4, 4), (0, 4, 5, 5), (0, 5, 6, 6)]


def test_groups_of_different_sizes_go_stretch_by_stretch_where_it_pays(
    make: Callable[..., SharedPrefix], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of 5 and 3 tokens in one row, the second completion empty: both ways to the same values and gradients."""
    layout = make([3, 2], [2, 1], [2, 0, 1], 8)
    assert layout.stretches == [(0, 0, 3, 5), (0, 5, 7, 8), (0, 3, 5, 5), (0, 7, 8, 8)]
    assert layout.mean_stretch == 2
    query, key, value = inputs(layout)
    weights, told = torch.randn_like(query), []
    for shortest in (0, 1000):
        monkeypatch.setattr(module, "_SHORT", shortest)
        output = grouped_attention(query, key, value, layout, backend="cascade")
        told.append([output, *torch.autograd.grad((output * weights).sum(), (query, key, value))])
    for one, other in zip(*told, strict=True):
        assert torch.allclose(one, other, atol=1e-13)


def reference_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """What flash_attn 2.1 and later document of `flash_attn_varlen_func`, slowly: packed (tokens, heads, d), int32 bounds,
    causal masks aligned at the last query and key, a window of keys to the left and right of the aligned place."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert causal
    outputs = []
    for at, seen in zip(
        zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True),
        zip(cu_seqlens_k[:-1].tolist(), cu_seqlens_k[1:].tolist(), strict=True),
        strict=True,
    ):
        own, keys, values = q[slice(*at)], k[slice(*seen)], v[slice(*seen)]
        assert len(own) <= max_seqlen_q
        assert len(keys) <= max_seqlen_k
        repeat = own.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(repeat, 1), values.repeat_interleave(repeat, 1)
        scores = torch.einsum("qhd,khd->hqk", own, keys) * (softmax_scale or own.shape[-1] ** -0.5)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        aligned = torch.arange(len(own))[:, None] + len(keys) - len(own)
        place = torch.arange(len(keys))
        hidden = place > aligned
        if window_size[0] >= 0:
            hidden = hidden | (place < aligned - window_size[0])
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values))
    return torch.cat(outputs)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that keeps the package's contract."""
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = reference_varlen  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (3, None), (None, 0.5), (4, 2.0)])
@pytest.mark.usefixtures("flash_attn")
def test_flash_attention_is_asked_for_the_same(
    layout: SharedPrefix, window: int | None, soft_cap: float | None
) -> None:
    for one in (layout, tree_of(SEQUENCES)):
        rows, columns = one.shape
        seen = layout.padding_mask[:, None, :, None] if one is layout else torch.ones(1, 1, columns, 1)
        query, key, value = (
            torch.randn(rows, num, columns, 8, dtype=torch.float64, requires_grad=True) for num in (4, 2, 2)
        )
        told = grouped_attention(query, key, value, one, backend="flash_varlen", window=window, soft_cap=soft_cap)
        expected = one_by_one(one, query, key, value, window, soft_cap)
        assert torch.allclose(told * seen, expected * seen, atol=1e-14)
        weights = torch.randn_like(told) * seen
        pairs = (torch.autograd.grad((part * weights).sum(), (query, key, value)) for part in (told, expected))
        for mine, other in zip(*pairs, strict=True):
            assert torch.allclose(mine, other, atol=1e-13)


def test_without_the_package_it_is_named(make: Callable[..., SharedPrefix], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    layout = make([4], [2], [3, 3])
    with pytest.raises(ValueError, match="pip install flash-attn"):
        grouped_attention(*inputs(layout), layout, backend="flash_varlen")


@pytest.mark.parametrize("backend", ["cascade", "two_call", "dense_mask"])
def test_second_inputs_pass_gradcheck(backend: Backend, make: Callable[..., SharedPrefix]) -> None:
    layout = make([2], [2], [2, 1])
    query, key, value = (one[..., :3].detach().requires_grad_() for one in inputs(layout, 2, 1))
    seen = layout.padding_mask[:, None, :, None]
    assert torch.autograd.gradcheck(
        lambda *three: grouped_attention(*three, layout, backend=backend) * seen, (query, key, value)
    )


@pytest.mark.parametrize("backend", ["cascade", "two_call", "dense_mask"])
def test_completions_do_not_see_each_other_and_all_see_the_prompt(
    backend: Backend, make: Callable[..., SharedPrefix]
) -> None:
    layout = make([5], [3], [4, 4, 4])
    query, key, value = (one.detach() for one in inputs(layout))
    before = grouped_attention(query, key, value, layout, backend=backend)
    changed = value.clone()
    changed[:, :, layout.starts[1] + 1] += 1  # a token of the second completion
    after = grouped_attention(query, key, changed, layout, backend=backend)
    differs = (before != after).any(-1).any(1)[0]
    assert layout.segment_ids[0][differs].unique().tolist() == [2]
    changed = value.clone()
    changed[:, :, 0] += 1
    after = grouped_attention(query, key, changed, layout, backend=backend)
    assert (before != after).any(-1).any(1).all()


@pytest.mark.parametrize("backend", ["cascade", "two_call", "dense_mask"])
def test_bfloat16_stays_close(backend: Backend, make: Callable[..., SharedPrefix]) -> None:
    layout = make([40], [3], [9, 9, 9])
    query, key, value = (one.detach() for one in inputs(layout))
    low = grouped_attention(*(one.bfloat16() for one in (query, key, value)), layout, backend=backend)
    assert low.dtype == torch.bfloat16
    assert torch.allclose(low.double(), one_by_one(layout, query, key, value), atol=0.03)


def test_a_scale_of_ones_own(make: Callable[..., SharedPrefix]) -> None:
    layout = make([5], [2], [3, 3])
    query, key, value = (one.detach() for one in inputs(layout, 2, 2))
    for backend in BACKENDS:
        told = grouped_attention(query, key, value, layout, backend=backend, scale=0.7)
        assert torch.allclose(told, one_by_one(layout, query * 0.7 * 8**0.5, key, value), atol=1e-13)


def test_one_completion_is_plain_causal_attention(make: Callable[..., SharedPrefix]) -> None:
    layout = make([4], [1], [5])
    query, key, value = inputs(layout, 2, 2)
    plain = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    for backend in BACKENDS:
        assert torch.allclose(grouped_attention(query, key, value, layout, backend=backend), plain, atol=1e-14)


def test_what_cannot_be_done_is_told(make: Callable[..., SharedPrefix]) -> None:
    layout = make([4], [2], [3, 3])
    query, key, value = inputs(layout)
    with pytest.raises(ValueError, match="layout packs 1 rows of 10"):
        grouped_attention(query[:, :, 1:], key[:, :, 1:], value[:, :, 1:], layout)
    with pytest.raises(ValueError, match="no sliding window"):
        grouped_attention(query, key, value, layout, backend="cascade", window=2)
    with pytest.raises(ValueError, match="no soft cap"):
        grouped_attention(query, key, value, layout, backend="two_call", soft_cap=2.0)
    with pytest.raises(ValueError, match="values as wide"):
        grouped_attention(query, key, value[..., :4], layout, backend="cascade")
    assert grouped_attention(query, key, value[..., :4], layout).shape[-1] == 4
