"""Batches of several shapes, and models that they go through."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from dynascope.nn.shared_prefix import SharedPrefix

SHAPES: dict[str, tuple[Any, ...]] = {
    "one group": ([6], [3], [3, 1, 4]),
    "uniform": ([6, 6], [2, 2], [3, 3, 3, 3]),
    "ragged, one empty": ([5, 7], [1, 3], [3, 0, 4, 2]),
    "alone": ([4], [1], [5]),
    "three in two rows": ([5, 4, 3], [2, 1, 2], [2, 3, 4, 1, 0], 16),
}


def make_layout(
    prompts: Sequence[int], groups: Sequence[int], completions: Sequence[int], row_length: int | None = None
) -> SharedPrefix:
    """Prompts padded on the left, completions on the right."""
    longest, widest = max(prompts), max(completions)
    prompt_mask = torch.stack([torch.arange(longest) >= longest - one for one in prompts])
    mask = torch.stack([torch.arange(widest) < one for one in completions])
    return SharedPrefix.of(prompt_mask, mask, list(groups), row_length=row_length)


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def layout(request: pytest.FixtureRequest) -> SharedPrefix:
    return make_layout(*request.param)


@pytest.fixture
def make() -> Callable[..., SharedPrefix]:
    return make_layout


def _sizes(**changes: Any) -> dict[str, Any]:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return {**sizes, **heads, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, **changes}


MODELS: dict[str, Callable[[Any], Any]] = {
    "llama": lambda hf: hf.LlamaForCausalLM(hf.LlamaConfig(**_sizes())),
    "qwen3": lambda hf: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_sizes(head_dim=8))),
    "mistral, a window": lambda hf: hf.MistralForCausalLM(hf.MistralConfig(**_sizes(sliding_window=4))),
    "gemma2, a soft cap": lambda hf: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**_sizes(head_dim=8, sliding_window=4, attn_logit_softcapping=2.0, attn_implementation="eager"))
    ),
    "gpt2": lambda hf: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0, resid_pdrop=0.0,
            embd_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        )
    ),
}  # fmt: skip


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request: pytest.FixtureRequest) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    return request.param(transformers).double().train()


@pytest.fixture
def llama() -> Any:
    torch.manual_seed(1)
    return MODELS["llama"](pytest.importorskip("transformers")).double().train()
