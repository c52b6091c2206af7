"""Packed rows through models: the same logits and gradients as repeated prompts, or a clear error."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynascope.nn.shared_prefix import (
    PrefixTree,
    SharedPrefix,
    SharedPrefixMode,
    prefix_sharing,
    shared_prefix_forward,
)


def tokens(layout: SharedPrefix) -> tuple[Tensor, Tensor]:
    return torch.randint(1, 50, layout.prompt_mask.shape), torch.randint(1, 50, layout.completion_mask.shape)


def repeated_logits(model: Any, layout: SharedPrefix, prompts: Tensor, completions: Tensor) -> Tensor:
    """Of completion tokens, each completion behind a prompt of its own and alone in a batch without padding."""
    rows = []
    for number, completion in enumerate(completions):
        group = layout.group_of[number]
        prompt = prompts[group][layout.prompt_mask[group]]
        own = completion[layout.completion_mask[number]]
        logits = model(input_ids=torch.cat([prompt, own])[None]).logits[0]
        rows.append(logits[len(prompt) - 1 : len(prompt) - 1 + len(own)])
    return torch.cat(rows)


def shared_logits(model: Any, layout: SharedPrefix, prompts: Tensor, completions: Tensor) -> Tensor:
    logits = shared_prefix_forward(model, layout.pack(prompts, completions), layout).logits
    return logits.flatten(0, 1)[layout.target_index[layout.completion_mask]]


def test_logits_and_gradients_are_those_of_repeated_prompts(model: Any, layout: SharedPrefix) -> None:
    prompts, completions = tokens(layout)
    before = model.config._attn_implementation
    mine, other = (one(model, layout, prompts, completions) for one in (shared_logits, repeated_logits))
    assert model.config._attn_implementation == before
    assert torch.allclose(mine, other, atol=1e-6)
    weights = torch.randn_like(mine)
    parameters = list(model.parameters())
    gradients = (torch.autograd.grad((one * weights).sum(), parameters) for one in (mine, other))
    for one, two in zip(*gradients, strict=True):
        assert torch.allclose(one, two, atol=1e-5)


def test_gradients_with_respect_to_a_prompts_embedding_are_summed(llama: Any) -> None:
    layout = SharedPrefix.of(torch.ones(1, 4), torch.ones(3, 2), 3)
    prompts, completions = tokens(layout)
    embeddings: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        output.retain_grad()
        embeddings.append(output)

    hook = llama.get_input_embeddings().register_forward_hook(keep)
    shared_logits(llama, layout, prompts, completions).square().sum().backward()
    llama(input_ids=torch.cat([prompts.expand(3, -1), completions], 1)).logits[:, 3:-1].square().sum().backward()
    hook.remove()
    shared, repeated = (one.grad for one in embeddings)
    assert shared is not None
    assert repeated is not None
    assert torch.allclose(shared[:, :4], repeated[:, :4].sum(0, keepdim=True), rtol=1e-5)


def test_chosen_cells_alone_reach_the_output_head(llama: Any, layout: SharedPrefix) -> None:
    prompts, completions = tokens(layout)
    rows = layout.pack(prompts, completions)
    chosen = shared_prefix_forward(llama, rows, layout, cells=layout.logit_positions).logits
    whole = shared_prefix_forward(llama, rows, layout).logits.flatten(0, 1)
    assert chosen.shape == (1, len(layout.logit_positions), 50)
    assert torch.allclose(chosen[0], whole[layout.logit_positions], atol=1e-6)


def test_gradient_checkpointing_wants_the_context_around_backward(model: Any) -> None:
    layout = SharedPrefix.of(torch.ones(1, 5), torch.ones(2, 3), 2)
    prompts, completions = tokens(layout)
    rows = layout.pack(prompts, completions)
    plain = torch.autograd.grad(
        shared_prefix_forward(model, rows, layout).logits.square().sum(), list(model.parameters())
    )
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    with pytest.raises(ValueError, match="with prefix_sharing"):
        shared_prefix_forward(model, rows, layout)
    with prefix_sharing(model):
        again = torch.autograd.grad(
            shared_prefix_forward(model, rows, layout).logits.square().sum(), list(model.parameters())
        )
    for one, other in zip(plain, again, strict=True):
        assert torch.allclose(one, other, atol=1e-8)


def test_without_a_layout_a_model_in_the_context_is_as_always(llama: Any) -> None:
    ids, mask = torch.randint(50, (2, 6)), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    plain = llama(input_ids=ids, attention_mask=mask).logits
    with prefix_sharing(llama):
        assert torch.equal(llama(input_ids=ids, attention_mask=mask).logits, plain)


def test_autocast_and_peft_go_through(llama: Any) -> None:
    peft = pytest.importorskip("peft")
    layout = SharedPrefix.of(torch.ones(1, 5), torch.ones(2, 3), 2)
    prompts, completions = tokens(layout)
    adapted = peft.get_peft_model(
        llama.float(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    expected = repeated_logits(adapted, layout, prompts, completions)
    assert torch.allclose(shared_logits(adapted, layout, prompts, completions), expected, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low = shared_logits(adapted, layout, prompts, completions)
    assert torch.allclose(low.float(), expected, atol=0.05)


def test_a_model_of_ones_own(layout: SharedPrefix) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.place = nn.Embedding(50, 16), nn.Embedding(32, 16)
            self.qkv, self.head = nn.Linear(16, 48), nn.Linear(16, 50)

        def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
            x = self.token(ids) + self.place(positions)
            for _ in range(2):
                q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
                x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            logits: Tensor = self.head(x)
            return logits

    model = Own().double()
    prompts, completions = tokens(layout)
    with SharedPrefixMode(layout):
        mine = model(layout.pack(prompts, completions), layout.position_ids)
    cells = layout.target_index[layout.completion_mask]
    expected = []
    for number, group in enumerate(layout.group_of.tolist()):
        prompt = prompts[group][layout.prompt_mask[group]]
        whole = torch.cat([prompt, completions[number][layout.completion_mask[number]]])[None]
        expected.append(model(whole, torch.arange(whole.shape[1])[None])[0, len(prompt) - 1 : -1])
    assert torch.allclose(mine.flatten(0, 1)[cells], torch.cat(expected), atol=1e-12)


def test_a_reward_model_reads_each_completions_last_token(layout: SharedPrefix) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=50, num_labels=1, pad_token_id=0, **sizes)
    model = transformers.LlamaForSequenceClassification(config).double()
    prompts, completions = tokens(layout)
    hidden = shared_prefix_forward(model.model, layout.pack(prompts, completions), layout).last_hidden_state
    told = model.score(hidden.flatten(0, 1)[layout.last_cells])[:, 0]
    for number, group in enumerate(layout.group_of.tolist()):
        prompt = prompts[group][layout.prompt_mask[group]]
        whole = torch.cat([prompt, completions[number][layout.completion_mask[number]]])[None]
        assert float(told[number]) == pytest.approx(float(model(input_ids=whole).logits), abs=1e-6)


def test_a_tree_of_sequences_is_each_sequence_alone(model: Any) -> None:
    sequences = [[3, 4, 5, 6, 7], [3, 4, 5, 8], [3, 4], [9, 8, 7, 6], [3, 4, 5, 6, 2]]
    width = max(map(len, sequences))
    ids = torch.tensor([[0] * (width - len(one)) + one for one in sequences])
    tree = PrefixTree.of(ids, torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in sequences]))
    assert tree.rows.shape[1] == 11
    logits = shared_prefix_forward(model, tree.rows, tree).logits[0]
    alone = [model(input_ids=torch.tensor([one])).logits[0] for one in sequences]
    for row, expected in enumerate(alone):
        assert torch.allclose(logits[tree.cell_of[row][tree.mask[row]]], expected, atol=1e-6)
    weights = torch.linspace(-1, 1, 50, dtype=torch.float64)
    parameters = list(model.parameters())
    mine = torch.autograd.grad((logits[tree.cell_of[tree.mask]] * weights).sum(), parameters)
    theirs = torch.autograd.grad((torch.cat(alone) * weights).sum(), parameters)
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_positions_of_several_axes_reach_a_model(layout: SharedPrefix) -> None:
    """M-RoPE (2409.12191): three positions a token, as of images; completions go on behind the largest of their prompt."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {"vocab_size": 50, "num_key_value_heads": 2, "rope_scaling": rope, **sizes}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}
    model = transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    ).double()
    prompts, completions = tokens(layout)
    positions = torch.randint(0, 9, (3, *prompts.shape))
    told = shared_prefix_forward(
        model, layout.pack(prompts, completions), layout, position_ids=layout.positions_behind(positions)
    ).logits.flatten(0, 1)
    mine = told[layout.target_index[layout.completion_mask]]
    expected = []
    for number, group in enumerate(layout.group_of.tolist()):
        known, own = layout.prompt_mask[group], completions[number][layout.completion_mask[number]]
        behind = positions[:, group, known].max() + 1 + torch.arange(len(own))
        places = torch.cat([positions[:, group, known], behind.expand(3, -1)], 1)[:, None]
        logits = model(input_ids=torch.cat([prompts[group][known], own])[None], position_ids=places).logits[0]
        expected.append(logits[int(known.sum()) - 1 : -1])
    assert torch.allclose(mine, torch.cat(expected), atol=1e-6)


def test_what_cannot_be_shared_is_told(llama: Any) -> None:
    layout = SharedPrefix.of(torch.ones(1, 5), torch.ones(2, 3), 2)
    rows = layout.pack(*tokens(layout))
    with pytest.raises(ValueError, match="no key-value cache"):
        shared_prefix_forward(llama, rows, layout, use_cache=True)
    llama.config.attention_dropout = 0.1
    for layer in llama.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention dropout of"):
        shared_prefix_forward(llama, rows, layout)
    assert llama.config._attn_implementation != "dynascope_shared_prefix"
    llama.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="linear_attention carry"):
        shared_prefix_forward(llama, rows, layout)
