"""Attention and decoder are told apart in models of many makes."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dynascope.nn import YZTransformer
from dynascope.optim import attention_decoder_param_groups


def names_by_group(model: nn.Module, multiplier: float = 5.0) -> dict[str, list[str]]:
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = attention_decoder_param_groups(model, 0.1, multiplier)
    torch.optim.AdamW(groups)
    return {group["name"]: [name_of[id(parameter)] for parameter in group["params"]] for group in groups}


@pytest.mark.parametrize("rank", [None, 3])
def test_the_papers_model_is_all_attention_and_decoder(rank: int | None) -> None:
    groups = names_by_group(YZTransformer(7, init="uniform", rank=rank))
    assert groups == (
        {"attention": ["Z"], "decoder": ["Y"]}
        if rank is None
        else {"attention": ["Z_query", "Z_key"], "decoder": ["Y_next", "Y_context"]}
    )


def test_rates_are_those_asked_for() -> None:
    groups = attention_decoder_param_groups(YZTransformer(7), 0.5, 10.0)
    assert [(group["name"], group["lr"]) for group in groups] == [("attention", 0.5), ("decoder", 5.0)]


def test_torchs_own_layer() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 8)
            self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 2, enable_nested_tensor=False)
            self.head = nn.Linear(8, 9)

    groups = names_by_group(Model())
    assert groups["decoder"] == ["head.weight", "head.bias"]
    assert groups["attention"] == [
        f"layers.layers.{layer}.self_attn.in_proj_{part}" for layer in (0, 1) for part in ("weight", "bias")
    ]


def test_hugging_face_models() -> None:
    transformers = pytest.importorskip("transformers")
    gpt = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=11, n_positions=16)
    )
    groups = names_by_group(gpt)
    assert groups["decoder"] == ["transformer.wte.weight"]  # tied
    assert groups["attention"] == [
        f"transformer.h.{layer}.attn.c_attn.{part}" for layer in (0, 1) for part in ("weight", "bias")
    ]
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            num_hidden_layers=1,
            hidden_size=8,
            intermediate_size=8,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=11,
            tie_word_embeddings=False,
        )
    )
    groups = names_by_group(llama)
    assert groups["decoder"] == ["lm_head.weight"]
    assert groups["attention"] == [f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "qk"]
    assert sum(map(len, groups.values())) == len(list(llama.parameters()))
    with pytest.raises(ValueError, match="output layer"):
        attention_decoder_param_groups(llama.model, 0.1, 2.0)


def test_frozen_parameters_are_left_out() -> None:
    model = YZTransformer(7)
    model.Y.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable an output layer"):
        attention_decoder_param_groups(model, 0.1, 2.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: attention_decoder_param_groups(YZTransformer(7), 0.0, 2.0),
        lambda: attention_decoder_param_groups(YZTransformer(7), 0.1, -1.0),
    ],
)
def test_rates_below_zero_are_told(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        call()
