"""KQ and OV of any layer give the logits and outputs that the layer computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynascope.nn.circuits import attention_weights, find_attention, kq_ov_circuits
from dynascope.nn.icl_attention import MultiHeadSoftmaxICL


def expected_of(module: nn.Module, hidden: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Attention weights and outputs by circuits alone, for hidden states (batch, positions, width)."""
    circuits = kq_ov_circuits(module)
    logits = torch.einsum("bki,hij,bqj->bhqk", hidden, circuits.kq, hidden)
    if is_causal:
        positions = torch.arange(hidden.shape[1])
        logits = logits.masked_fill(positions > positions[:, None], -torch.inf)
    weights = logits.softmax(-1)
    return weights, torch.einsum("bhqk,hoi,bki->bqo", weights, circuits.ov, hidden)


@pytest.mark.parametrize("settings", [{}, {"kdim": 12, "vdim": 8}])
def test_torch_multihead_attention(settings: dict[str, int]) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(12, 3, batch_first=True, **settings)  # type: ignore[arg-type]
    hidden, values = torch.randn(2, 5, 12), torch.randn(2, 5, settings.get("vdim", 12))
    circuits = kq_ov_circuits(layer)
    logits = torch.einsum("bki,hij,bqj->bhqk", hidden, circuits.kq, hidden)
    expected = torch.einsum("bhqk,hoi,bki->bqo", logits.softmax(-1), circuits.ov, values)
    torch.testing.assert_close(layer(hidden, hidden, values)[0], expected)
    assert circuits.left_out == ("bias",)
    assert kq_ov_circuits(nn.MultiheadAttention(12, 3, bias=False)).left_out == ()


def small(**settings: Any) -> dict[str, Any]:
    return {"attn_implementation": "eager", "vocab_size": 11, **settings}


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(
        GPT2Config(**small(n_embd=24, n_head=3, n_layer=2, n_positions=16, scale_attn_by_inverse_layer_idx=True))
    )


def llama(**settings: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10}
    return LlamaModel(LlamaConfig(**small(num_hidden_layers=2, intermediate_size=8, **(sizes | settings))))


def gpt_neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXModel

    sizes = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 8}
    return GPTNeoXModel(GPTNeoXConfig(**small(**sizes)))


def gpt_neo() -> nn.Module:
    from transformers import GPTNeoConfig, GPTNeoModel

    kinds = [[["global"], 2]]
    return GPTNeoModel(GPTNeoConfig(**small(hidden_size=24, num_heads=3, num_layers=2, attention_types=kinds)))


def phi3() -> nn.Module:
    from transformers import Phi3Config, Phi3Model

    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 8}
    return Phi3Model(Phi3Config(**small(num_hidden_layers=2, pad_token_id=0, eos_token_id=1, **sizes)))


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTModel

    sizes = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "ffn_dim": 8}
    return OPTModel(OPTConfig(**small(word_embed_proj_dim=24, max_position_embeddings=32, **sizes)))


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 8}
    return BertModel(BertConfig(**small(**sizes)), add_pooling_layer=False)


MODELS: list[tuple[Callable[[], nn.Module], tuple[str, ...], bool]] = [
    (gpt2, ("bias",), True),
    (llama, ("rotary",), True),
    (gpt_neox, ("rotary", "bias"), True),
    (gpt_neo, ("bias",), True),
    (phi3, ("rotary",), True),
    (opt, ("bias",), True),
    (bert, ("bias",), False),
]


@pytest.mark.parametrize(("make", "left_out", "is_causal"), MODELS, ids=lambda value: getattr(value, "__name__", ""))
def test_hugging_face_layers(make: Callable[[], nn.Module], left_out: tuple[str, ...], is_causal: bool) -> None:
    """Without biases, and with all tokens at rotary position 0, the two products are the whole layer."""
    torch.manual_seed(0)
    model = make().eval()
    layers = find_attention(model)
    assert len(layers) == 2
    layer = list(layers.values())[1]
    assert attention_weights(layer).left_out == left_out
    for name, parameter in layer.named_parameters():
        with torch.no_grad():
            (parameter.zero_ if name.endswith("bias") else parameter.normal_)()
    # What goes into the layer's first projection, and what comes out of its last; BERT adds a residual behind that.
    seen: dict[str, Tensor] = {}
    last = getattr(getattr(layer, "output", None), "dense", None) or next(
        module for name, module in layer.named_modules() if name in ("c_proj", "o_proj", "out_proj", "dense")
    )
    maps = [module for module in layer.modules() if type(module).__name__ in ("Linear", "Conv1D")]
    first = next(module for module in maps if module is not last)
    first.register_forward_hook(lambda module, args, output: seen.update(hidden=args[0]))
    last.register_forward_hook(lambda module, args, output: seen.update(output=output))
    tokens = torch.randint(11, (2, 5))
    positions = {"position_ids": torch.zeros(2, 5, dtype=torch.long)} if "rotary" in left_out else {}
    # A mask says that equal positions are no sequences packed into one.
    called = model(tokens, attention_mask=torch.ones(2, 5), output_attentions=True, **positions)
    weights = called.attentions[1]
    expected, output = expected_of(layer, seen["hidden"], is_causal)
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(seen["output"].view(output.shape), output, rtol=1e-3, atol=1e-4)


def test_grouped_queries_share_keys_and_values() -> None:
    layer = next(iter(find_attention(llama()).values()))
    weights = attention_weights(layer)
    assert weights.query.shape == weights.key.shape == (4, 10, 24)
    assert torch.equal(weights.key[0], weights.key[1])
    assert not torch.equal(weights.key[1], weights.key[2])


def test_what_acts_beside_the_products_is_named() -> None:
    from transformers import Gemma2Config, Gemma2Model, Qwen3Config, Qwen3Model

    sizes = {
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "num_hidden_layers": 1,
    }
    for kind, config, told in (
        (Qwen3Model, Qwen3Config, ("rotary", "query-key norm")),
        (Gemma2Model, Gemma2Config, ("rotary", "logit cap")),
    ):
        model = kind(config(**small(intermediate_size=8, **sizes)))
        assert attention_weights(next(iter(find_attention(model).values()))).left_out == told


class Plain(nn.Module):
    """As in small re-implementations of GPT: one projection for all three, and one out."""

    def __init__(self, num_heads: int | None) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(12, 36, bias=False), nn.Linear(12, 12, bias=False)
        if num_heads is not None:
            self.n_head = num_heads

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.unflatten(2, (3, 4)).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.c_proj(mixed.transpose(1, 2).flatten(2))
        return out


def test_a_layer_of_ones_own() -> None:
    layer, hidden = Plain(3), torch.randn(2, 5, 12)
    torch.testing.assert_close(layer(hidden), expected_of(layer, hidden, is_causal=True)[1])
    unnamed = Plain(None)
    assert find_attention(unnamed) == {}
    with pytest.raises(ValueError, match="give num_heads"):
        kq_ov_circuits(unnamed)
    assert kq_ov_circuits(unnamed, num_heads=3).kq.shape == (3, 12, 12)


def test_our_own_model_and_what_is_no_attention() -> None:
    model = MultiHeadSoftmaxICL(4, 2)
    assert list(find_attention(nn.Sequential(nn.Linear(3, 3), model))) == ["1"]
    assert torch.equal(kq_ov_circuits(model).kq, model.circuits().kq)
    with pytest.raises(ValueError, match="Linear has no query, key, value and output projections"):
        kq_ov_circuits(nn.Linear(3, 3))


def test_circuits_are_differentiable() -> None:
    layer = nn.MultiheadAttention(6, 2)
    kq_ov_circuits(layer).kq.square().sum().backward()
    assert layer.in_proj_weight.grad is not None
    assert float(layer.in_proj_weight.grad[:12].abs().sum()) > 0
    assert float(layer.in_proj_weight.grad[12:].abs().sum()) == 0
