"""A decoder's logits are those of the model's own forward pass on everything so far."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrizations

from dynascope.rl import decoding
from dynascope.rl.decoding import Decoder, LayerDecoder, open_decoder, with_positions
from dynascope.rl.layers import is_layered
from dynascope.rl.rollout import sample, score

transformers = pytest.importorskip("transformers")
FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3"]


def made(family: str, **changes: Any) -> Any:
    settings = {
        "vocab_size": 19,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if family == "Mistral":
        settings["sliding_window"] = None
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(settings | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def whole(model: Any, tokens: Tensor, mask: Tensor | None) -> Tensor:
    logits: Tensor = model(**with_positions(tokens, mask)).logits
    return logits[:, -1]


def prompts_of(is_padded: bool) -> tuple[Tensor, Tensor | None]:
    prompts = torch.arange(1, 16).view(3, 5)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, :2] = mask[2, :4] = False
    return prompts, mask if is_padded else None


@torch.no_grad()
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [Decoder, LayerDecoder])
def test_each_step_says_what_the_whole_sequence_says(
    kind: type[Decoder], family: str, is_padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_BLOCK", 3)  # memory has to grow twice
    model = made(family)
    prompts, mask = prompts_of(is_padded)
    decoder = kind(model, prompts, mask, 2, 8)
    tokens = prompts.repeat_interleave(2, 0)
    seen = None if mask is None else mask.repeat_interleave(2, 0)
    logits = decoder.logits
    for place in range(8):
        torch.testing.assert_close(logits, whole(model, tokens, seen), atol=2e-5, rtol=1e-4)
        drawn = (torch.arange(6)[:, None] * 5 + place) % 19
        tokens = torch.cat([tokens, drawn], 1)
        seen = None if seen is None else torch.cat([seen, torch.ones_like(drawn).bool()], 1)
        logits = decoder.step(drawn)


@torch.no_grad()
def test_half_precision_stays_within_its_rounding() -> None:
    model = made("Llama").bfloat16()
    prompts, mask = prompts_of(True)
    decoder = open_decoder(model, prompts, mask, 1, 2)
    token = torch.tensor([[1], [2], [3]])
    assert isinstance(decoder, LayerDecoder)
    expected = Decoder(model, prompts, mask, 1, 2).step(token)
    torch.testing.assert_close(decoder.step(token), expected, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_familys_plain_models_are_layered(family: str) -> None:
    assert is_layered(made(family))


class Patched(transformers.LlamaForCausalLM):  # type: ignore[misc, name-defined]
    """Somebody's own."""


def patched() -> Any:
    model = made("Llama")
    model.model.layers[1].forward = model.model.layers[1].forward
    return model


def hooked() -> Any:
    model = made("Llama")
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, args, output: output * 2)
    return model


def reparametrized() -> Any:
    model = made("Llama")
    parametrizations.spectral_norm(model.model.layers[0].self_attn.q_proj)
    return model


@pytest.mark.parametrize(
    "make",
    [
        patched,
        hooked,
        reparametrized,
        lambda: Patched(made("Llama").config),
        lambda: torch.compile(made("Llama"), backend="eager"),
        lambda: made("Mistral", sliding_window=4),
        lambda: made("Qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1),
        lambda: made("Llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=19)),
    ],
)
def test_a_model_that_something_was_put_into_is_left_to_its_own_forward(make: Any) -> None:
    model = make().eval()
    assert not is_layered(model)
    prompts, _ = prompts_of(False)
    decoder = open_decoder(model, prompts, None, 2, 4)
    token = torch.full((6, 1), 4)
    with torch.no_grad():
        expected = model(torch.cat([prompts.repeat_interleave(2, 0), token], 1)).logits[:, -1]
    torch.testing.assert_close(decoder.step(token), expected, atol=2e-5, rtol=1e-4)


def test_hooks_of_the_unembedding_are_heard_and_hidden_states_kept() -> None:
    model = made("Llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output - 1e4 * torch.eye(19)[3])
    assert is_layered(model)
    prompts, mask = prompts_of(True)
    kept = sample(model, prompts, mask, num_samples=8, max_new_tokens=12, stop_token=3, keeps_hidden=True)
    assert kept.is_truncated.all()
    assert kept.hidden is not None
    assert kept.hidden.shape == (24, 12, 32)
    logits = model.lm_head(kept.hidden).log_softmax(-1).gather(2, kept.tokens[..., None])[..., 0]
    torch.testing.assert_close(logits, kept.behaviour_log_probs, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("kind", [Decoder, LayerDecoder])
def test_some_completions_go_on_as_they_would_among_all(kind: type[Decoder], is_padded: bool) -> None:
    model = made("Qwen3")
    prompts, mask = prompts_of(is_padded)
    every, some = (kind(model, prompts, mask, 2, 8) for _ in range(2))
    first, second = (torch.arange(6)[:, None] * 3 + place for place in (1, 2))
    every.step(first), some.step(first)
    kept = torch.tensor([0, 3, 4])
    some.keep(kept)
    for drawn in (second, first):
        torch.testing.assert_close(some.step(drawn[kept]), every.step(drawn)[kept], atol=2e-5, rtol=1e-4)


def test_completions_that_end_early_are_left_out_of_decoding_and_back_in_their_places() -> None:
    model = made("Llama")
    decoded: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda module, args: decoded.append(len(args[0])))
    prompts, mask = prompts_of(True)
    settings = {"num_samples": 20, "max_new_tokens": 40, "stop_token": 3}
    drawn = sample(model, prompts, mask, **settings, keeps_hidden=True, generator=torch.Generator().manual_seed(1))
    assert decoded[:2] == [3, 60]
    assert decoded[-1] <= 30
    assert drawn.hidden is not None
    said = model.lm_head(drawn.hidden).log_softmax(-1).gather(2, drawn.tokens[..., None])[..., 0]
    for told in (said, score(model, drawn)["log_probs"]):
        torch.testing.assert_close(told[drawn.mask], drawn.behaviour_log_probs[drawn.mask], atol=1e-4, rtol=1e-4)
    ends = (drawn.tokens == 3) & drawn.mask
    assert torch.equal(ends.any(1), ~drawn.is_truncated)
    assert not drawn.tokens[~drawn.mask].any()
