"""ReLU, sigmoid and softmax1 attention against dense formulas, and inside Hugging Face models."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dynascope.nn.relu_attention import (
    masked_logits,
    register_with_transformers,
    relu_attention,
    relu_weights,
    sigmoid_attention,
    sigmoid_weights,
    softmax1,
    softmax1_weights,
    softmax_weights,
)

KINDS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "relu": (relu_attention, relu_weights),
    "sigmoid": (sigmoid_attention, sigmoid_weights),
    "softmax1": (softmax1, softmax1_weights),
}


def operands(kv_heads: int = 4, length: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, length, 8), torch.randn(2, kv_heads, length, 8), torch.randn(2, kv_heads, length, 8)


def by_loop(kind: str, query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Every query and key one by one, with the formulas as they stand on paper."""
    out = torch.zeros(*query.shape[:3], value.shape[-1])
    groups = query.shape[1] // key.shape[1]
    for row in range(query.shape[0]):
        for head in range(query.shape[1]):
            for i in range(query.shape[2]):
                seen = [j for j in range(key.shape[2]) if visible[row, i, j]]
                logits = [float(query[row, head, i] @ key[row, head // groups, j]) * 8**-0.5 for j in seen]
                n = len(seen)
                if kind == "relu":
                    weights = [max(logit, 0) / n for logit in logits]
                elif kind == "sigmoid":
                    weights = [1 / (1 + n * 2.718281828459045**-logit) for logit in logits]
                else:
                    total = 1 + sum(2.718281828459045**logit for logit in logits)
                    weights = [2.718281828459045**logit / total for logit in logits]
                for j, weight in zip(seen, weights, strict=True):
                    out[row, head, i] += weight * value[row, head // groups, j]
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masking", ["none", "causal", "padding", "both", "added"])
def test_attention_equals_a_loop_over_queries_and_keys(kind: str, kv_heads: int, masking: str) -> None:
    query, key, value = operands(kv_heads, length=7)
    visible = torch.ones(2, 7, 7, dtype=torch.bool)
    settings: dict[str, object] = {}
    if masking in ("causal", "both"):
        visible &= torch.ones(7, 7, dtype=torch.bool).tril()
        settings["is_causal"] = True
    if masking in ("padding", "both", "added"):
        shown = torch.ones(2, 1, 1, 7, dtype=torch.bool)
        shown[0, ..., :3] = False
        visible &= shown[:, 0]
        lowest = torch.finfo(torch.float32).min
        settings["mask"] = shown if masking != "added" else torch.zeros(shown.shape).masked_fill(~shown, lowest)
    seen = KINDS[kind][0](query, key, value, **settings)
    torch.testing.assert_close(seen, by_loop(kind, query, key, value, visible), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["relu", "sigmoid"])
@pytest.mark.parametrize("masking", ["none", "causal", "added and causal"])
def test_blocks_give_the_same_output_and_gradients(kind: str, masking: str) -> None:
    outputs = []
    for block in (64, 4):
        torch.manual_seed(1)
        leaves = [one.requires_grad_() for one in operands(2)]
        mask = torch.randn(1, 4, 11, 11) if masking == "added and causal" else None
        out = KINDS[kind][0](*leaves, is_causal=masking != "none", mask=mask, block=block)
        outputs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for whole, parts in zip(*outputs, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def test_relu_attention_is_positively_homogeneous_in_its_logits() -> None:
    query, key, value = operands()
    once = relu_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(relu_attention(3 * query, key, value, is_causal=True), 3 * once)


def test_without_a_positive_logit_the_output_is_exactly_zero() -> None:
    query, _, value = operands()
    assert (relu_attention(query.abs(), -query.abs(), value, is_causal=True) == 0).all()


def test_relu_rows_do_not_sum_to_one() -> None:
    query, key, _ = operands()
    sums = relu_weights(masked_logits(query, key, is_causal=True)).sum(-1)
    assert not torch.isclose(sums, torch.ones_like(sums)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_fully_masked_rows_give_zero_and_finite_gradients(kind: str) -> None:
    leaves = [one.requires_grad_() for one in operands()]
    mask = torch.ones(2, 1, 11, 11, dtype=torch.bool)
    mask[:, :, :3] = False
    out = KINDS[kind][0](*leaves, mask=mask)
    assert (out[:, :, :3] == 0).all()
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(out.sum(), leaves))


def test_softmax_weights_are_those_of_torch() -> None:
    query, key, value = operands(2)
    weights = softmax_weights(masked_logits(query, key, is_causal=True))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(weights @ value.repeat_interleave(2, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_hugging_face_models_can_be_trained_with_it(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    assert kind in register_with_transformers()
    config = transformers.LlamaConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=kind)
    tokens = torch.randint(19, (2, 9))
    model(tokens, labels=tokens).loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    # A row padded on the left gives what it gives alone.
    model.eval()
    alone = model(tokens[:1, 3:]).logits
    shown = torch.ones(1, 9, dtype=torch.long)
    shown[0, :3] = 0
    places = (shown.cumsum(1) - 1).clamp(min=0)
    padded = model(tokens[:1], attention_mask=shown, position_ids=places).logits
    torch.testing.assert_close(padded[:, 3:], alone, rtol=1e-4, atol=1e-5)
    # One token after another with a cache gives what all at once give.
    first = model(tokens[:1, :8], use_cache=True)
    last = model(tokens[:1, 8:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(last[:, 0], model(tokens[:1]).logits[:, 8], rtol=1e-4, atol=1e-5)


def test_dropout_is_told() -> None:
    transformers = pytest.importorskip("transformers")
    register_with_transformers()
    config = transformers.LlamaConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        attention_dropout=0.1,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="relu").train()
    with pytest.raises(ValueError, match="dropout"):
        model(torch.zeros(1, 4, dtype=torch.long))
