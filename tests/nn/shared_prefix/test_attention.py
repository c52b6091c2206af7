"""All backends are the attention of the batch that repeats prompts, forward and backward."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dynascope.nn.shared_prefix import Backend, SharedPrefix, grouped_attention

BACKENDS: tuple[Backend, ...] = ("cascade", "two_call", "dense_mask", "auto")


def inputs(layout: SharedPrefix, heads: int = 4, shared: int = 2) -> list[Tensor]:
    shape = len(layout.group_sizes), layout.num_columns, 8
    return [
        torch.randn(shape[0], num, *shape[1:], dtype=torch.float64, requires_grad=True)
        for num in (heads, shared, shared)
    ]


def one_by_one(layout: SharedPrefix, query: Tensor, key: Tensor, value: Tensor, window: int | None = None) -> Tensor:
    """Each completion behind its own copy of the prompt, with plain softmax; by the definition."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    output = torch.zeros_like(query)
    for row in range(len(query)):
        for segment in range(int(layout.segment_ids[row].max()) + 1):
            columns = ((layout.segment_ids[row] == 0) | (layout.segment_ids[row] == segment)).nonzero().flatten()
            q, k, v = (one[row][:, columns] for one in (query, key, value))
            scores = q @ k.mT / q.shape[-1] ** 0.5
            place = torch.arange(len(columns))
            hidden = place[:, None] < place
            if window is not None:
                hidden = hidden | (place[:, None] - place >= window)
            mixed = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
            own = layout.segment_ids[row][columns] == segment
            output[row][:, columns[own]] = mixed[:, own]
    return output


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
    with pytest.raises(ValueError, match="values as wide"):
        grouped_attention(query, key, value[..., :4], layout, backend="cascade")
    assert grouped_attention(query, key, value[..., :4], layout).shape[-1] == 4
