"""The toy transformer and what can be taken out of it."""

import pytest
import torch

from dynascope.nn.toy_transformer import ATTENTION, RECIPES, WEIGHTS, ToyTransformer

TOKENS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize("attention", ATTENTION)
def test_later_tokens_do_not_change_earlier_logits(attention: str) -> None:
    model = ToyTransformer(12, 6, width=8, depth=2, num_heads=2, attention=attention)
    changed = TOKENS.clone()
    changed[:, 4:] = 0
    before, after = model(TOKENS), model(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_have_the_parts_they_name(recipe: str) -> None:
    model = ToyTransformer(12, 6, width=8, depth=3, **RECIPES[recipe])
    parts = [(block.attention is not None, block.mlp is not None) for block in model.blocks]
    expected = {
        "attention in the middle": [(False, True), (True, False), (False, True)],
        "attention only": [(True, False)] * 3,
        "mlp only": [(False, True)] * 3,
        "last mlp only": [(True, False), (True, False), (True, True)],
        "linear mlps": [(True, True)] * 3,
    }
    assert parts == expected[recipe]
    assert model(TOKENS).shape == (2, 6, 12)


def test_linear_mlps_add_up() -> None:
    mlp = ToyTransformer(12, 6, width=8, depth=1, linear_mlp=(0,)).blocks[0].mlp
    one, two = torch.randn(2, 3, 8)
    torch.testing.assert_close(mlp(one + two), mlp(one) + mlp(two))


def test_no_biases_no_norms_tied_head() -> None:
    model = ToyTransformer(12, 6, width=8, depth=1, has_norms=False, is_tied=True)
    assert not [name for name, _ in model.named_parameters() if "norm" in name or "bias" in name]
    assert model.head.weight is model.token.weight


def test_frozen_parts_get_no_gradient() -> None:
    model = ToyTransformer(12, 6, width=8, depth=2).freeze("embedding", "output", "value", "out")
    model(TOKENS).sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {"token.weight", "position.weight", "head.weight"} | {
        f"blocks.{layer}.attention.{part}.weight" for layer in (0, 1) for part in ("value", "out")
    }


def test_every_kind_of_attention_has_its_weights() -> None:
    assert set(ATTENTION) == set(WEIGHTS)


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"attention": "max"}, "one of"), ({"num_heads": 3}, "multiple"), ({"without_mlp": (5,)}, "do not exist")],
)
def test_impossible_settings_are_told(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ToyTransformer(12, 6, width=8, depth=3, **settings)


def test_too_many_tokens_and_unknown_parts_are_told() -> None:
    model = ToyTransformer(12, 4, width=8, depth=1)
    with pytest.raises(ValueError, match="context of 4"):
        model(TOKENS)
    with pytest.raises(ValueError, match="a part is"):
        model.freeze("queries")
