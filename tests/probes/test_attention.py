"""Attention quantities against hand-worked numbers, dense computation and the theorem's bound."""

import math

import pytest
import torch
from torch import Tensor

from dynascope.probes.attention import (
    attention_entropy,
    attention_entropy_from_weights,
    attention_summary,
    entropy_lower_bound,
    logit_spectral_norm,
    sink_mass,
    value_norm,
)
from dynascope.probes.views import AttentionCall


def dense_weights(query: Tensor, key: Tensor, scale: float, hidden: Tensor | None = None) -> Tensor:
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query.float() @ key.float().transpose(-2, -1) * scale
    return (logits if hidden is None else logits.masked_fill(hidden, float("-inf"))).softmax(-1)


def test_uniform_attention_over_8_keys_has_entropy_log_8() -> None:
    entropy = attention_entropy(torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 8, 4))
    torch.testing.assert_close(entropy, torch.full((2,), 2.0794415))


def test_one_hot_attention_has_entropy_zero_and_no_nan() -> None:
    assert attention_entropy_from_weights(torch.eye(4).expand(1, 1, 4, 4)).item() == 0
    sharp = torch.eye(4).expand(1, 1, 4, 4) * 200
    assert attention_entropy(sharp, sharp, scale=1.0).item() == pytest.approx(0, abs=1e-6)


def test_causal_uniform_attention_over_4_keys() -> None:
    # (log 1 + log 2 + log 3 + log 4) / 4
    entropy = attention_entropy(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), is_causal=True)
    torch.testing.assert_close(entropy, torch.tensor([0.7945135]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["none", "causal", "padding", "added"])
def test_blocked_entropy_equals_dense(dtype: torch.dtype, kv_heads: int, kind: str) -> None:
    query, key = torch.randn(3, 4, 13, 8).to(dtype), torch.randn(3, kv_heads, 13, 8).to(dtype)
    hidden, mask = None, None
    if kind == "causal":
        hidden = ~torch.ones(13, 13, dtype=torch.bool).tril()
    if kind in ("padding", "added"):
        hidden = torch.zeros(3, 1, 1, 13, dtype=torch.bool)
        hidden[0, ..., -4:] = True
        mask = ~hidden if kind == "padding" else torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(dtype).min)
    counted = ~hidden[..., 0, :] if mask is not None else None  # padded queries are left out like padded keys
    expected = attention_entropy_from_weights(dense_weights(query, key, 0.3, hidden), counted)
    seen = attention_entropy(query, key, scale=0.3, is_causal=kind == "causal", mask=mask, block=5)
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)


def test_rows_that_see_nothing_are_not_averaged() -> None:
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    mask[:, :, :3] = False
    entropy = attention_entropy(torch.zeros(1, 1, 6, 4), torch.zeros(1, 1, 6, 4), mask=mask)
    torch.testing.assert_close(entropy, torch.tensor([math.log(6)]))


def test_queries_that_are_padding_are_not_averaged_in_self_attention() -> None:
    # Positions 2 and 3 are padding: 0 and 1 share their attention evenly, and the other two look at one key.
    key = torch.eye(4)[None, None] * 100
    query = torch.stack([torch.zeros(4), torch.zeros(4), key[0, 0, 0], key[0, 0, 0]])[None, None]
    mask = torch.tensor([True, True, False, False]).view(1, 1, 1, 4)
    for given in (mask, mask.expand(1, 1, 4, 4), torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))):
        torch.testing.assert_close(attention_entropy(query, key, mask=given), torch.tensor([math.log(2)]))
    # Where queries are of another sequence than keys, each counts.
    torch.testing.assert_close(attention_entropy(query[:, :, :3], key, mask=mask), torch.tensor([2 / 3 * math.log(2)]))


def test_normalized_entropy_of_causal_uniform_attention_is_one() -> None:
    zeros = torch.zeros(2, 2, 9, 4)
    summary = attention_summary(AttentionCall("", zeros, zeros, zeros + 1, 1.0, is_causal=True))
    torch.testing.assert_close(summary["attention/entropy_normalized"], torch.ones(2))


@pytest.mark.parametrize(("norm", "num_keys"), [(3.0, 5), (0.5, 16), (8.0, 64)])
def test_bound_is_reached_by_its_extreme_row(norm: float, num_keys: int) -> None:
    row = torch.full((num_keys,), -norm / math.sqrt(num_keys * (num_keys - 1)))
    row[0] = norm * math.sqrt((num_keys - 1) / num_keys)
    entropy = torch.special.entr(row.softmax(0)).sum()
    torch.testing.assert_close(entropy, entropy_lower_bound(norm, num_keys), rtol=1e-4, atol=1e-5)


def test_a_single_key_leaves_no_entropy() -> None:
    assert entropy_lower_bound(3.0, 1).item() == 0


def test_no_row_of_that_norm_lies_below_the_bound() -> None:
    rows = torch.nn.functional.normalize(torch.randn(1000, 5), dim=1) * 3.0 * torch.rand(1000, 1)
    entropy = torch.special.entr(rows.softmax(1)).sum(1)
    assert (entropy >= entropy_lower_bound(3.0, 5) - 1e-6).all()


def test_logit_spectral_norm_equals_the_svd_of_the_map() -> None:
    query_weight, key_weight, inputs = torch.randn(6, 10), torch.randn(6, 10), torch.randn(40, 10)
    logits = 0.4 * inputs @ query_weight.T @ key_weight @ inputs.T
    expected = torch.linalg.matrix_norm(logits, ord=2)
    torch.testing.assert_close(logit_spectral_norm(query_weight, key_weight, inputs, 0.4), expected, rtol=1e-4, atol=0)


def test_a_head_that_looks_at_the_first_key_only_is_a_full_sink() -> None:
    key = torch.zeros(1, 1, 12, 4)
    key[:, :, 0] = 100.0
    mass = sink_mass(torch.ones(1, 1, 12, 4), key, scale=1.0, is_causal=True)
    torch.testing.assert_close(mass[0], torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0]))


def test_sink_of_a_left_padded_row_counts_from_its_first_real_key() -> None:
    key = torch.zeros(1, 1, 12, 4)
    key[:, :, 3] = 100.0
    mask = torch.ones(12, 12, dtype=torch.bool).tril()
    mask[:, :3] = False
    mass = sink_mass(torch.ones(1, 1, 12, 4), key, scale=1.0, mask=mask)
    assert mass[0, 0].item() == pytest.approx(1.0)


def test_positions_beyond_a_short_sequence_are_nan() -> None:
    zeros = torch.zeros(1, 1, 6, 4)
    assert torch.isnan(sink_mass(zeros, zeros)[0]).tolist() == [False] * 6 + [True] * 2


def test_value_norm_is_relative_to_the_mean_and_repeats_for_grouped_heads() -> None:
    value = torch.ones(1, 2, 4, 4)
    value[:, :, 0] = 0
    norms = value_norm(value, num_heads=4)
    assert norms.shape == (4, 8)
    torch.testing.assert_close(norms[:, :4], torch.tensor([0.0, 4 / 3, 4 / 3, 4 / 3]).expand(4, 4))


def test_largest_logit_ignores_hidden_keys() -> None:
    query, key = torch.ones(1, 1, 3, 1), torch.tensor([1.0, 2.0, 9.0]).view(1, 1, 3, 1)
    mask = torch.tensor([True, True, False]).view(1, 1, 1, 3)
    summary = attention_summary(AttentionCall("", query, key, key, 1.0, mask=mask))
    assert summary["attention/logit_max"].item() == 2.0
