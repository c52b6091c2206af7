"""Packed rows through models: the same logits and gradients as repeated prompts, or a clear error."""

import subprocess
import sys
import warnings
from pathlib import Path
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


def test_a_compiled_model_sees_chosen_cells() -> None:
    """In a process of its own: the checks of shapes that tests switch on cannot be compiled."""
    pytest.importorskip("transformers")
    script = Path(__file__).with_name("compiled_cells.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["right"] * 6


def test_a_head_that_is_never_called_is_told(llama: Any) -> None:
    layout = SharedPrefix.of(torch.ones(2, 5), torch.ones(4, 3), 2)
    rows = layout.pack(*tokens(layout))
    llama.set_output_embeddings(nn.Linear(32, 50).double())
    llama.get_output_embeddings = lambda: nn.Linear(32, 50)
    with pytest.raises(ValueError, match="never called its output head"):
        shared_prefix_forward(llama, rows, layout, cells=layout.logit_positions)


def test_a_mask_that_is_added_to_scores_is_refused() -> None:
    layout = SharedPrefix.of(torch.ones(1, 5), torch.ones(2, 3), 2)
    query = torch.randn(1, 2, 11, 4)
    with SharedPrefixMode(layout):
        F.scaled_dot_product_attention(query, query, query, attn_mask=torch.ones(11, 11).bool())
        with pytest.raises(ValueError, match="is added to scores"):
            F.scaled_dot_product_attention(query, query, query, attn_mask=torch.zeros(11, 11))


@pytest.mark.parametrize("name", ["Bloom", "Falcon", "Mixtral"])
def test_families_that_cannot_share_are_told_in_words(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    own = {"Falcon": {"alibi": True}, "Mixtral": {"output_router_logits": True, "num_local_experts": 2}}.get(name, {})
    config = getattr(transformers, f"{name}Config")(**sizes, **own)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    layout = SharedPrefix.of(torch.ones(1, 5), torch.ones(2, 3), 2)
    expected = "router's balancing loss" if name == "Mixtral" else "does not hand keyword arguments"
    with pytest.raises(ValueError, match=expected):
        shared_prefix_forward(model, layout.pack(*tokens(layout)), layout)


def test_dropout_elsewhere_is_warned_of() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4, attn_pdrop=0.0, embd_pdrop=0.0)
    )
    layout = SharedPrefix.of(torch.ones(1, 5), torch.ones(2, 3), 2)
    rows = layout.pack(*tokens(layout))
    with pytest.warns(UserWarning, match="equal in distribution alone"):
        shared_prefix_forward(model.train(), rows, layout)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shared_prefix_forward(model.eval(), rows, layout)


class Rotary(nn.Module):
    """Two layers with rotary positions, all in float64: Hugging Face's turn theirs in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(16, 48), nn.Linear(16, 16)]) for _ in range(2))

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = self.token(ids)
        angles = positions[:, None, :, None] * 100.0 ** -(torch.arange(4, dtype=torch.float64) / 4)

        def turned(y: Tensor) -> Tensor:
            one, other = y.chunk(2, -1)
            return torch.cat([one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin()], -1)

        for qkv, out in self.layers:  # type: ignore[misc]
            q, k, v = qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)
            x = x + out(mixed.transpose(1, 2).flatten(2)).tanh()
        logits: Tensor = self.head(x)
        return logits.log_softmax(-1)


@pytest.mark.parametrize("backend", ["dense_mask", "two_call", "cascade"])
def test_in_float64_both_batches_are_the_same_to_the_last_digits(backend: Any) -> None:
    """The bounds of the report's lemma 2.1: 1e-14 of log-probabilities, 1e-13 of gradients, 1e-10 of weights after Adam."""
    torch.manual_seed(3)
    models = [Rotary().double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    completion_mask = torch.arange(4) < torch.tensor([3, 1, 4])[:, None]
    layout = SharedPrefix.of(torch.ones(1, 6), completion_mask, 3)
    prompts, completions = tokens(layout)
    weights = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)[:, None].expand(3, 4)[completion_mask]
    targets = completions[completion_mask][:, None]
    with SharedPrefixMode(layout, backend=backend):
        told = models[0](layout.pack(prompts, completions), layout.position_ids)
    mine = told.flatten(0, 1)[layout.target_index[completion_mask]].gather(1, targets)[:, 0]
    repeated = torch.cat([prompts.expand(3, -1), completions], 1)
    whole = models[1](repeated, torch.arange(10).expand(3, -1))[:, 5:-1]
    other = whole[completion_mask].gather(1, targets)[:, 0]
    assert float((mine - other).detach().abs().max()) < 1e-14
    for log_probs in (mine, other):
        (log_probs * weights).sum().backward()
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        assert float((one.grad - two.grad).abs().max()) < 1e-13
    for model in models:
        torch.optim.Adam(model.parameters(), 1e-3).step()
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        assert float((one - two).detach().abs().max()) < 1e-10
