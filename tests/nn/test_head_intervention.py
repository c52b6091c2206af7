"""Interventions on heads: by hand, in both kinds of models, and nothing left behind."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynascope.nn.head_intervention import (
    EDITS,
    HeadIntervention,
    HeadState,
    attention_layers,
    clean_pattern,
    zero_sink_state,
)
from dynascope.nn.relu_attention import relu_weights, softmax_weights
from dynascope.nn.toy_transformer import ATTENTION, ToyTransformer

TOKENS = torch.randint(19, (2, 7), generator=torch.Generator().manual_seed(5))


def hugging_face(kind: str, implementation: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"vocab_size": 19, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16}
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes, intermediate_size=16, num_key_value_heads=2)
    elif kind == "neox":
        config = transformers.GPTNeoXConfig(**sizes, intermediate_size=16)
    else:
        config = transformers.GPT2Config(vocab_size=19, n_layer=2, n_head=4, n_embd=16)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


MODELS = {
    **{
        f"toy {kind}": (lambda kind=kind: ToyTransformer(19, 7, width=16, depth=2, num_heads=4, attention=kind))
        for kind in ATTENTION
    },
    **{
        f"{kind} {implementation}": (
            lambda kind=kind, implementation=implementation: hugging_face(kind, implementation)
        )
        for kind in ("llama", "gpt2", "neox")
        for implementation in ("eager", "sdpa")
    },
}


@pytest.fixture(params=MODELS)
def model(request: Any) -> nn.Module:
    torch.manual_seed(2)
    made: nn.Module = MODELS[request.param]()
    return made


def logits_of(model: nn.Module, **inputs: Tensor) -> Tensor:
    output = model(TOKENS, **inputs)
    return output if isinstance(output, Tensor) else output.logits


def test_an_edit_that_changes_nothing_changes_no_bit(model: nn.Module) -> None:
    before = logits_of(model)
    with HeadIntervention(model, [(0, 1), (1, 3)], lambda state: state):
        assert torch.equal(logits_of(model), before)
    copied = lambda state: replace(state, weights=state.weights.clone(), value=state.value + 0)  # noqa: E731
    with HeadIntervention(model, None, copied):
        assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("edit", EDITS)
def test_the_model_is_restored_bit_for_bit(model: nn.Module, edit: str) -> None:
    before, weights = logits_of(model), {name: one.clone() for name, one in model.state_dict().items()}
    with HeadIntervention(model, None, edit):
        assert not torch.equal(logits_of(model), before)
    assert torch.equal(logits_of(model), before)
    assert all(torch.equal(one, weights[name]) for name, one in model.state_dict().items())
    with pytest.raises(KeyError), HeadIntervention(model, None, edit):
        raise KeyError
    assert torch.equal(logits_of(model), before)


def test_zeroing_every_head_is_a_model_whose_attention_gives_nothing(model: nn.Module) -> None:
    outs = [dict(module.named_children()) for module in attention_layers(model).values()]
    project = [
        next(one for name, one in parts.items() if name in ("out", "o_proj", "c_proj", "dense")) for parts in outs
    ]
    handles = [
        one.register_forward_pre_hook(lambda module, args: (torch.zeros_like(args[0]), *args[1:])) for one in project
    ]
    expected = logits_of(model)
    for handle in handles:
        handle.remove()
    with HeadIntervention(model, None, "zero"):
        assert torch.equal(logits_of(model), expected)


def test_heads_that_are_not_named_keep_their_bits(model: nn.Module) -> None:
    seen: dict[str, Tensor] = {}
    module = attention_layers(model)[0]
    out = next(one for name, one in module.named_children() if name in ("out", "o_proj", "c_proj", "dense"))
    key = ["before"]
    handle = out.register_forward_pre_hook(lambda module, args: seen.update({key[0]: args[0].detach()}))
    logits_of(model)
    key[0] = "after"
    with HeadIntervention(model, [(0, 2)], "zero"):
        logits_of(model)
    handle.remove()
    before, after = (seen[name].view(2, 7, 4, 4) for name in ("before", "after"))
    assert torch.equal(before[:, :, [0, 1, 3]], after[:, :, [0, 1, 3]])
    assert (after[:, :, 2] == 0).all()


def test_nested_blocks_do_both_and_undo_one_after_another() -> None:
    model = MODELS["toy softmax"]()
    with HeadIntervention(model, [(0, 0), (1, 2)], "zero"):
        both = logits_of(model)
    with HeadIntervention(model, [(0, 0)], "zero"):
        one = logits_of(model)
        with HeadIntervention(model, [(1, 2)], "zero"):
            assert torch.equal(logits_of(model), both)
        assert torch.equal(logits_of(model), one)


def test_gradients_flow_through_an_edit() -> None:
    model = MODELS["toy softmax"]()
    with HeadIntervention(model, None, "zero_value"):
        logits_of(model).sum().backward()
    gradient = model.blocks[0].attention.value.weight.grad
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0


def state(logits: Tensor, sink: int = 0, to_weights: Any = softmax_weights) -> HeadState:
    logits = logits.masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf)[None, None]
    asked, value = torch.ones(1, 1, 3, 2), torch.tensor([[[[1.0], [2.0], [4.0]]]])
    return HeadState(asked, asked, logits, to_weights(logits), value, torch.tensor([sink]), 0.5, to_weights)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        ("zero", [0, 0, 0]),
        ("to_sink", [1, 1, 1]),
        ("zero_first", [0, 1.5, 7 / 3]),  # uniform: means of (1, 2) and (1, 2, 4)
        ("zero_value", [0, 1, 2]),
        ("diagonal", [1, 2, 4]),
    ],
)
def test_edits_of_uniform_attention_by_hand(edit: str, expected: list[float]) -> None:
    found = EDITS[edit](state(torch.zeros(3, 3))).output()
    torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float32))


def test_zeroed_logit_by_hand() -> None:
    # Logits log 3 for the sink and 0 elsewhere become all 0: uniform attention.
    logits = torch.zeros(3, 3)
    logits[:, 0] = 1.0986
    found = EDITS["zero_logit"](state(logits)).output().flatten()
    torch.testing.assert_close(found, torch.tensor([1, 1.5, 7 / 3]))
    relu = EDITS["zero_logit"](state(logits, to_weights=relu_weights))
    assert (relu.weights == 0).all()


def test_other_queries_and_keys_by_hand() -> None:
    # Products were 2 · 0.5 = 1; with keys of 4 they are 4, so that each visible logit rises by 3.
    found = state(torch.zeros(3, 3)).attending(key=torch.full((1, 1, 3, 2), 4.0))
    assert found.logits[0, 0].tolist() == [[3, -torch.inf, -torch.inf], [3, 3, -torch.inf], [3, 3, 3]]
    assert torch.equal(found.weights, softmax_weights(found.logits))
    back = found.attending(query=torch.full((1, 1, 3, 2), 0.25))  # products of 1 again
    assert torch.equal(back.logits, state(torch.zeros(3, 3)).logits)


@pytest.mark.parametrize("kind", ATTENTION)
def test_doubled_queries_are_those_of_doubled_weights(kind: str) -> None:
    model = MODELS[f"toy {kind}"]()
    with HeadIntervention(model, [(0, 1)], lambda state: state.attending(query=2 * state.query)):
        found = logits_of(model)
    assert not torch.allclose(found, logits_of(model), atol=1e-4)
    with torch.no_grad():
        model.blocks[0].attention.query.weight[4:8] *= 2
    torch.testing.assert_close(found, logits_of(model), rtol=1e-4, atol=1e-5)


def test_keys_of_nothing_leave_every_logit_at_nothing(model: nn.Module) -> None:
    def at_zero(state: HeadState) -> HeadState:
        assert state.key.shape == state.value.shape == (2, 4, 7, 4)  # one for every query head
        logits = torch.where(torch.isfinite(state.logits), 0.0, state.logits)
        return replace(state, weights=state.to_weights(logits))

    with HeadIntervention(model, None, at_zero):
        expected = logits_of(model)
    with HeadIntervention(model, None, lambda state: state.attending(key=torch.zeros_like(state.key))):
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)


def test_clean_pattern_copies_from_before_triggers_and_parks_elsewhere() -> None:
    found = clean_pattern(torch.tensor([[False, True, True]]))(state(torch.zeros(3, 3)))
    assert found.weights[0, 0].tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0]]


def test_the_sink_of_a_row_padded_on_the_left_is_its_first_real_token() -> None:
    model = hugging_face("llama", "sdpa")
    shown = torch.ones_like(TOKENS)
    shown[0, :3] = 0
    seen: list[Tensor] = []
    with HeadIntervention(model, None, lambda state: (seen.append(state.sink), state)[1]):
        logits_of(model, attention_mask=shown)
    assert seen[0].tolist() == [3, 0]


def test_zeroed_sink_state(model: nn.Module) -> None:
    before = logits_of(model)
    with zero_sink_state(model, [1]):
        after = logits_of(model)
    # The last layer's state reaches its own position only.
    assert torch.equal(after[:, 1:], before[:, 1:])
    assert not torch.equal(after[:, 0], before[:, 0])
    assert torch.equal(logits_of(model), before)


def test_what_cannot_be_done_is_told() -> None:
    model = MODELS["toy softmax"]()
    with pytest.raises(ValueError, match="an edit is one of"):
        HeadIntervention(model, None, "double")
    with pytest.raises(ValueError, match="no head 4 in layer 0"):
        HeadIntervention(model, [(0, 4)], "zero")
    with pytest.raises(ValueError, match="do not exist"), zero_sink_state(model, [7]):
        pass
    with pytest.raises(ValueError, match="no attention of Linear"):
        HeadIntervention(nn.Linear(2, 2), None, "zero")
