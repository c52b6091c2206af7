"""Attention is found whichever way a model writes it, and its operands are the true ones."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynascope.nn import relu_attention, sigmoid_attention, softmax1
from dynascope.probes.probe import Need
from dynascope.probes.views import AttentionCall, attention_blocks
from dynascope.watching.shadow import shadow_pass

ROWS, HEADS, LENGTH, HEAD_DIM = 2, 4, 6, 8


def calls_of(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> list[AttentionCall]:
    calls: list[AttentionCall] = []
    shadow_pass(model, args, kwargs, frozenset({Need.ATTENTION}), lambda need, view: calls.append(view))
    return calls


def weights_of(call: AttentionCall) -> Tensor:
    return torch.cat([part.weights for part in attention_blocks(call, block=4)], dim=2)


class Attend(nn.Module):
    """Projects its input to heads and attends in the way `how` says."""

    def __init__(self, how: str, kv_heads: int = HEADS) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.query = nn.Linear(width, width)
        self.key, self.value = nn.Linear(width, kv_heads * HEAD_DIM), nn.Linear(width, kv_heads * HEAD_DIM)
        self.how, self.kv_heads = how, kv_heads

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        rows, length, _ = x.shape
        query = self.query(x).view(rows, length, HEADS, HEAD_DIM).transpose(1, 2)
        key, value = (p(x).view(rows, length, self.kv_heads, HEAD_DIM).transpose(1, 2) for p in (self.key, self.value))
        is_grouped = self.kv_heads != HEADS
        if self.how == "fused":
            return F.scaled_dot_product_attention(
                query, key, value, mask, is_causal=mask is None, enable_gqa=is_grouped
            )
        if self.how == "math":
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None)
        visible = torch.ones(length, length, dtype=torch.bool).tril()
        if self.how == "einsum":
            logits = torch.einsum("bhqd,bhkd->bhqk", query, key) / math.sqrt(HEAD_DIM)
            return F.softmax(logits.masked_fill(~visible, float("-inf")), dim=-1) @ value
        if self.how == "where":
            logits = query @ key.transpose(-2, -1) * HEAD_DIM**-0.5
            logits = torch.where(visible, logits, torch.finfo(logits.dtype).min)
            return torch.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype) @ value
        assert self.how == "added"
        bias = torch.zeros(1, 1, length, length).masked_fill(~visible, float("-inf"))
        return ((query @ (key.transpose(-2, -1) / math.sqrt(HEAD_DIM)) + bias).softmax(-1)) @ value


@pytest.mark.parametrize("how", ["fused", "math", "einsum", "where", "added"])
def test_causal_attention_is_read_alike_however_it_is_written(how: str) -> None:
    model = Attend(how)
    x = torch.randn(ROWS, LENGTH, HEADS * HEAD_DIM)
    (call,) = calls_of(model, x)
    query = model.query(x).view(ROWS, LENGTH, HEADS, HEAD_DIM).transpose(1, 2)
    key = model.key(x).view(ROWS, LENGTH, HEADS, HEAD_DIM).transpose(1, 2)
    logits = query @ key.transpose(-2, -1) / math.sqrt(HEAD_DIM)
    hidden = ~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    torch.testing.assert_close(weights_of(call), logits.masked_fill(hidden, float("-inf")).softmax(-1))
    value = model.value(x).view(ROWS, LENGTH, HEADS, HEAD_DIM).transpose(1, 2)
    torch.testing.assert_close(call.value, value)


def test_grouped_queries_keep_their_few_key_heads() -> None:
    (call,) = calls_of(Attend("fused", kv_heads=2), torch.randn(ROWS, LENGTH, HEADS * HEAD_DIM))
    assert call.key.shape[1] == 2
    torch.testing.assert_close(weights_of(call).sum(-1), torch.ones(ROWS, HEADS, LENGTH))


@pytest.mark.parametrize("how", ["fused", "math"])
def test_a_padding_mask_hides_its_keys(how: str) -> None:
    mask = torch.ones(ROWS, 1, 1, LENGTH, dtype=torch.bool)
    mask[..., -2:] = False
    (call,) = calls_of(Attend(how), torch.randn(ROWS, LENGTH, HEADS * HEAD_DIM), mask=mask)
    assert weights_of(call)[..., -2:].eq(0).all()


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_gives_its_own_weights(need_weights: bool, batch_first: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, HEADS, batch_first=batch_first)

        def forward(self, x: Tensor) -> Tensor:
            padding = torch.zeros(x.shape[0], x.shape[1], dtype=torch.bool) if batch_first else None
            return self.attention(x, x, x, key_padding_mask=padding, need_weights=need_weights)[0]

    model = Model()
    x = torch.randn(3, LENGTH, 16) if batch_first else torch.randn(LENGTH, 3, 16)
    (call,) = calls_of(model, x)
    _, expected = model.eval().attention(x, x, x, need_weights=True, average_attn_weights=False)
    assert call.name == "attention"
    seen = weights_of(call)
    torch.testing.assert_close(seen, expected[:, :, : seen.shape[2], : seen.shape[3]], msg=str(seen.shape))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_hugging_face_models_show_every_layer(implementation: str, family: str) -> None:
    import transformers

    size = {"vocab_size": 32, "attn_implementation": implementation}
    if family == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_head=4, n_embd=32, n_positions=16, **size)
        model: nn.Module = transformers.GPT2LMHeadModel(config)
    elif family == "llama":
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        config = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, max_position_embeddings=16, **heads, **size
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.BertConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            **size,
        )
        model = transformers.BertForMaskedLM(config)
    tokens = torch.randint(32, (3, 10))
    mask = torch.ones_like(tokens)
    mask[0, 7:] = 0
    calls = calls_of(model, input_ids=tokens, attention_mask=mask)
    assert len(calls) == 2
    assert "0" in calls[0].name
    assert "1" in calls[1].name
    assert all(call.tokens is not None and torch.equal(call.tokens, tokens) for call in calls)
    if implementation == "eager":
        expected = model.eval()(input_ids=tokens, attention_mask=mask, output_attentions=True).attentions
        torch.testing.assert_close(weights_of(calls[0])[1:], expected[0][1:])
        torch.testing.assert_close(weights_of(calls[0])[0, :, :7], expected[0][0, :, :7])


def test_a_softmax_that_is_no_attention_is_left_alone() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.experts = nn.Linear(8, 4), nn.Parameter(torch.randn(4, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            share = self.router(x).softmax(-1)
            return torch.einsum("bte,btd,edf->btf", share, x, self.experts)

    assert calls_of(Mixture(), torch.randn(2, 5, 8)) == []


UNNORMALIZED = {"relu": relu_attention, "sigmoid": sigmoid_attention, "softmax1": softmax1}


class Unnormalized(nn.Module):
    """Attention whose weights need not sum to one, or an MLP of experts that looks like it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.up, self.down = (nn.Parameter(torch.randn(ROWS, *size)) for size in ((8, 16), (16, 8)))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "experts":
            return torch.relu(x[:, 0] @ self.up) @ self.down
        if self.how == "gated experts":
            return torch.sigmoid(x[:, 0] @ self.up) @ self.down
        return UNNORMALIZED[self.how](x, x.flip(2), x, is_causal=True)


@pytest.mark.parametrize(("how", "kind"), [("relu", "relu"), ("sigmoid", "sigmoid"), ("softmax1", "softmax")])
def test_attention_that_need_not_sum_to_one_is_found(how: str, kind: str) -> None:
    x = torch.randn(ROWS, HEADS, LENGTH, HEAD_DIM)
    model = Unnormalized(how)
    (call,) = calls_of(model, x)
    assert call.kind == kind
    torch.testing.assert_close(weights_of(call) @ call.value, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["experts", "gated experts"])
def test_an_mlp_of_experts_is_no_attention(how: str) -> None:
    assert calls_of(Unnormalized(how), torch.randn(ROWS, 1, LENGTH, 8)) == []
