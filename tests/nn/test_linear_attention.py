"""Causal linear attention in blocks is the plain sum; masked gradients leave the rest alone."""

import pytest
import torch
from torch.nn.utils import parametrize

from dynascope.data.in_context.ar_process import ARProcess
from dynascope.nn.linear_attention import (
    LinearCausalAttention,
    MaskedGradient,
    causal_linear_attention,
    diagonal_masks,
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("length", "block"), [(1, 4), (7, 4), (8, 4), (9, 32)])
def test_blocks_are_the_plain_sum(dtype: torch.dtype, length: int, block: int) -> None:
    query, key = torch.randn(2, length, 3, dtype=dtype), torch.randn(2, length, 3, dtype=dtype)
    value = torch.randn(2, length, 5, dtype=dtype)
    found = causal_linear_attention(query, key, value, block=block)
    for t in range(length):
        outer = torch.einsum("bij,bik->bjk", value[:, : t + 1], key[:, : t + 1].conj())
        torch.testing.assert_close(found[:, t], torch.einsum("bjk,bk->bj", outer, query[:, t]))


def test_the_model_is_the_papers_formula_prefix_by_prefix() -> None:
    x = ARProcess(2, 9).sample(3, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = LinearCausalAttention(2, init="random")
    tokens = torch.cat([x, torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)], 2)
    found = model(x)
    for t in range(2, 9):
        prefix = tokens[:, :t].mT
        expected = model.pv @ prefix @ prefix.mH @ model.kq @ tokens[:, t - 1, :, None] / (t - 1)
        torch.testing.assert_close(found[:, t - 2], expected[..., 0])


def test_three_tokens_give_one_prediction_and_one_dimension_works() -> None:
    x = ARProcess(1, 3).sample(4, torch.Generator().manual_seed(0))
    assert LinearCausalAttention(1)(x).shape == (4, 1, 1)


def test_masked_entries_stand_still() -> None:
    x = ARProcess(2, 8, "ones").sample(30, torch.Generator().manual_seed(0))
    model, free = LinearCausalAttention(2), LinearCausalAttention(2)
    for name, mask in zip(("kq", "pv"), diagonal_masks(2), strict=True):
        parametrize.register_parametrization(model, name, MaskedGradient(mask))
    for one in (model, free):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            one.loss(x).backward()
            optimizer.step()
    for name, mask in zip(("kq", "pv"), diagonal_masks(2), strict=True):
        assert getattr(model, name)[~mask].abs().max() == 0
        assert getattr(free, name)[~mask].abs().max() > 1e-6
    parametrize.remove_parametrizations(model, "kq")
    assert model.kq[2:, :2].diagonal().real.min() > 0.1
