"""What a small model says of completions in less time is what its forward pass says."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynascope.rl import logits as module
from dynascope.rl.logits import completion_logits, group_logits
from tests.rl.test_decoding import FAMILIES, made

GROUPS = torch.tensor([7, 2, 7, 7, 2, 7, 2, 7])


def batch(width: int, *, is_padded: bool, length: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Two prompts of a batch whose completions stand in any order."""
    own = torch.arange(1, 2 * length + 1).view(2, length)
    mask = torch.ones(2, length, dtype=torch.bool)
    if is_padded:
        mask[0, :3] = False
    row = (GROUPS == 7).long()
    completions = torch.arange(8 * width).view(8, width) * 5 % 19
    return own[row], mask[row], completions


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the two ways by layers were taken."""
    taken: list[str] = []

    def told(name: str) -> Callable[..., Tensor]:
        inner = getattr(module, name)

        def call(*args: Any) -> Tensor:
            taken.append(name)
            result: Tensor = inner(*args)
            return result

        return call

    for name in ("_alone", "_together"):
        monkeypatch.setattr(module, name, told(name))
    return taken


@pytest.mark.parametrize(("groups", "way"), [(GROUPS, "_together"), (torch.arange(8), "_alone")])
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_the_forward_pass(
    family: str, is_padded: bool, width: int, groups: Tensor, way: str, ways: list[str]
) -> None:
    model = made(family, attention_bias=True) if family in ("Llama", "Qwen3") else made(family)
    prompts, mask, completions = batch(width, is_padded=is_padded)
    weights = torch.randn(8, width, 19)
    gradients = []
    for logits in (
        completion_logits(model, prompts, mask, completions),
        group_logits(model, prompts, mask, completions, groups),
    ):
        gradients.append(torch.autograd.grad((logits * weights).sum(), list(model.parameters())))
        if len(gradients) == 1:
            expected = logits
    assert ways == [way]
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other, atol=2e-4, rtol=1e-3)


def test_sharing_waits_until_it_pays_and_for_prompts_that_are_one(ways: list[str]) -> None:
    model = made("Llama")
    prompts, mask, completions = batch(40, is_padded=False, length=2)
    torch.testing.assert_close(
        group_logits(model, prompts, mask, completions, GROUPS), completion_logits(model, prompts, mask, completions)
    )
    assert ways == ["_alone"]
    prompts, mask, completions = batch(3, is_padded=False)
    prompts[0, 2] = 18
    torch.testing.assert_close(
        group_logits(model, prompts, mask, completions, GROUPS), completion_logits(model, prompts, mask, completions)
    )
    assert ways == ["_alone", "_alone"]


def test_whoever_stands_at_the_entrance_sees_the_batch_and_may_ask_the_model_himself() -> None:
    model, seen = made("Llama"), []
    prompts, mask, completions = batch(3, is_padded=True)

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not seen:
            seen.append(kwargs["input_ids"])
            seen.append(module(**(kwargs | {"input_ids": kwargs["input_ids"].clone()})).logits)

    model.register_forward_pre_hook(look, with_kwargs=True)
    logits = group_logits(model, prompts, mask, completions, GROUPS)
    assert torch.equal(seen[0], torch.cat([prompts, completions[:, :-1]], 1))
    torch.testing.assert_close(seen[1], logits, atol=2e-5, rtol=1e-4)
    assert "forward" not in vars(model)


def test_a_pass_that_fails_leaves_the_model_as_it_was() -> None:
    model = made("Llama")
    prompts, mask, completions = batch(3, is_padded=False)
    with pytest.raises(IndexError):
        group_logits(model, prompts, mask, completions + 19, GROUPS)
    assert "forward" not in vars(model)


def dropping(model: Any) -> None:
    model.config.attention_dropout = 0.5
    model.train()


def checkpointing(model: Any) -> None:
    model.train()
    model.gradient_checkpointing_enable()


@pytest.mark.parametrize(
    "change",
    [
        dropping,
        checkpointing,
        lambda model: model.model.layers[0].register_forward_hook(lambda *args: None),
        lambda model: model.model.embed_tokens.register_forward_hook(lambda *args: None),
        lambda model: vars(model).update(forward=model.forward),
    ],
)
def test_a_model_that_does_more_than_its_layers_is_left_to_its_own_forward(
    change: Callable[[Any], None], ways: list[str]
) -> None:
    model = made("Llama")
    change(model)
    prompts, mask, completions = batch(3, is_padded=False)
    torch.manual_seed(1)
    logits = group_logits(model, prompts, mask, completions, GROUPS)
    torch.manual_seed(1)
    assert torch.equal(logits, completion_logits(model, prompts, mask, completions))
    assert not ways


def test_a_step_by_layers_is_the_step_of_the_forward_pass() -> None:
    steps = []
    for asked in (group_logits, lambda *args: completion_logits(*args[:-1])):
        model = copy.deepcopy(made("Qwen2")).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        prompts, mask, completions = batch(5, is_padded=True)
        loss = nn.functional.cross_entropy(asked(model, prompts, mask, completions, GROUPS).mT, completions)
        loss.backward()
        optimizer.step()
        steps.append(torch.cat([one.detach().flatten() for one in model.parameters()]))
    torch.testing.assert_close(*steps, atol=1e-5, rtol=1e-4)
