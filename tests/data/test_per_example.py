"""Ghost norms equal the norms of gradients that were computed one by one."""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynascope.data.per_example import per_example_gradient_norms
from dynascope.kernels.layerwise import LayerTap, frozen, uses

per_example_loss = partial(F.cross_entropy, reduction="none")


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(1)


class TinyTransformer(nn.Module):
    """Tied embeddings, layer norms, attention without a batch axis of its own, and padding."""

    def __init__(self, *, has_positions: bool = False) -> None:
        super().__init__()
        self.token = nn.Embedding(11, 8, padding_idx=0)
        self.position = nn.Embedding(6, 8) if has_positions else None
        self.norm = nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens)
        if self.position is not None:
            x = x + self.position(torch.arange(tokens.shape[1]))
        query, key, value = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(query, key, value, is_causal=True))
        return self.head(self.norm(x))


class Functional(nn.Module):
    """Uses a layer's weight behind the layer's back, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(5, 5), nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.first(x).tanh() * self.scale, self.first.weight)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 2, dilation=2, groups=2), nn.GroupNorm(3, 6), nn.Flatten(), nn.Linear(6 * 4, 5),
    ).eval()  # fmt: skip


def one_dimensional() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 3, 3, bias=False), nn.GELU(), nn.Flatten(), nn.Linear(3 * 5, 4))


def padded() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, (3, 2), padding="same"), nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.Tanh(),
        nn.Conv2d(4, 2, 3, padding=2, stride=2, padding_mode="reflect"), nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip


def three_dimensional() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(4, 4, 2, stride=(1, 2, 1), groups=4), nn.GELU(), nn.Conv3d(4, 2, 1), nn.Flatten(), nn.LazyLinear(3)
    )


def initialized(model: nn.Module, inputs: Tensor) -> nn.Module:
    model(inputs)
    return model


def cases() -> dict[str, tuple[nn.Module, Any, Tensor, Any]]:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(7, 6), nn.ReLU(inplace=True), nn.LayerNorm(6), nn.Linear(6, 3, bias=False))
    shared = nn.Linear(5, 5)
    tokens, sequences = torch.randint(0, 11, (4, 6)), torch.randint(4, (4, 9))
    volumes, images, vectors = torch.randn(3, 4, 3, 5, 4), torch.randn(3, 2, 6, 5), torch.randn(4, 9, 5)
    triple = torch.randint(3, (3,))
    lookup = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4))
    return {
        "mlp": (mlp, torch.randn(9, 7), torch.randint(3, (9,)), per_example_loss),
        "convolution": (convolutional(), torch.randn(5, 2, 8, 8), torch.randint(5, (5,)), per_example_loss),
        "convolution-1d": (one_dimensional(), torch.randn(5, 2, 7), torch.randint(4, (5,)), per_example_loss),
        "convolution-3d": (initialized(three_dimensional(), volumes), volumes, triple, per_example_loss),
        "padding": (initialized(padded(), images), images, triple, per_example_loss),
        "lookup": (lookup, sequences, sequences.flip(1), token_loss),
        "shared-long": (nn.Sequential(shared, nn.Tanh(), shared), vectors, sequences, token_loss),
        "tied-transformer": (TinyTransformer(), tokens, torch.randint(11, (4, 6)), token_loss),
        "positions": (TinyTransformer(has_positions=True), tokens, torch.randint(11, (4, 6)), token_loss),
        "shared-layer": (nn.Sequential(shared, nn.Tanh(), shared), torch.randn(6, 5), torch.randint(5, (6,)), per_example_loss),
        "functional": (Functional(), torch.randn(6, 5), torch.randint(5, (6,)), per_example_loss),
        "attention": (Attending(), torch.randn(3, 4, 8), torch.randint(8, (3, 4)), token_loss),
        "frozen": (partly_frozen(), torch.randn(4, 5), torch.randint(2, (4,)), per_example_loss),
    }  # fmt: skip


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.RMSNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.attention(x, x, x, need_weights=False)[0])


def partly_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("name", cases())
def test_ghost_equals_vmap_equals_loop(name: str) -> None:
    model, inputs, targets, loss_fn = cases()[name]
    model = model.double()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ways = ("ghost", "vmap", "loop")
        norms = [per_example_gradient_norms(model, loss_fn, inputs, targets, method=way) for way in ways]
    torch.testing.assert_close(norms[0], norms[2], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(norms[1], norms[2], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "convolution", "tied-transformer"])
def test_in_single_precision_too(name: str) -> None:
    model, inputs, targets, loss_fn = cases()[name]
    ghost, loop = (per_example_gradient_norms(model, loss_fn, inputs, targets, method=way) for way in ("ghost", "loop"))
    torch.testing.assert_close(ghost, loop, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "told"),
    [("functional", "first.weight"), ("attention", "attention.in_proj_weight"), ("positions", "position.weight")],
)
def test_what_ghost_norms_do_not_know_is_told(name: str, told: str) -> None:
    model, inputs, targets, loss_fn = cases()[name]
    with pytest.warns(UserWarning, match=told):
        per_example_gradient_norms(model, loss_fn, inputs, targets)


@pytest.mark.parametrize(
    "name",
    ["mlp", "convolution", "convolution-1d", "convolution-3d", "padding", "lookup", "tied-transformer", "shared-layer"],
)
def test_what_they_know_needs_no_second_pass(name: str) -> None:
    model, inputs, targets, loss_fn = cases()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        per_example_gradient_norms(model, loss_fn, inputs, targets)


def test_linear_softmax_without_bias_is_error_times_input() -> None:
    # gradient of W is (p - y) ⊗ x, whose norm is the product of the norms
    model, x, labels = nn.Linear(4, 3, bias=False), torch.randn(6, 4), torch.randint(3, (6,))
    error = model(x).softmax(-1) - F.one_hot(labels, 3)
    expected = error.norm(dim=1) * x.norm(dim=1)
    torch.testing.assert_close(per_example_gradient_norms(model, per_example_loss, x, labels), expected.detach())


def test_linear_softmax_with_bias_adds_one_to_the_input() -> None:
    model, x, labels = nn.Linear(4, 3), torch.randn(6, 4), torch.randint(3, (6,))
    error = model(x).softmax(-1) - F.one_hot(labels, 3)
    expected = error.norm(dim=1) * (x.square().sum(1) + 1).sqrt()
    torch.testing.assert_close(per_example_gradient_norms(model, per_example_loss, x, labels), expected.detach())


def test_batch_gradient_is_no_longer_than_the_sum_of_the_norms() -> None:
    model, inputs, targets, loss_fn = cases()["tied-transformer"]
    norms = per_example_gradient_norms(model, loss_fn, inputs, targets)
    gradients = torch.autograd.grad(loss_fn(model(inputs), targets).sum(), list(model.parameters()))
    assert sum(one.square().sum() for one in gradients).sqrt() <= norms.sum()


@pytest.mark.parametrize("name", ["mlp", "convolution", "convolution-3d", "padding", "lookup", "shared-long"])
def test_what_layers_tell_of_examples_adds_up_to_the_batch_gradient(name: str) -> None:
    model, inputs, targets, loss_fn = cases()[name]
    total = {parameter: torch.zeros_like(parameter) for parameter in model.parameters()}

    def receive(module: nn.Module, incoming: Tensor, gradient: Tensor) -> None:
        for own, use in uses(module, incoming, gradient):
            total[module._parameters[own]] += use.explicit(module._parameters[own].shape).sum(0)

    tap = LayerTap(model, model.parameters(), len(targets), receive)
    with frozen(model.parameters()):
        tap.backward(tap.forward(lambda: loss_fn(model(inputs), targets)).sum())
    gradients = torch.autograd.grad(loss_fn(model(inputs), targets).sum(), list(total))
    for one, expected in zip(total.values(), gradients, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)


def test_long_sequences_take_the_explicit_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynascope.kernels.products.MAX_EXPLICIT", 20)  # some examples at a time
    model = nn.Sequential(nn.Linear(2, 3))
    inputs, targets = torch.randn(5, 40, 2), torch.randint(3, (5, 40))
    ghost, loop = (
        per_example_gradient_norms(model, token_loss, inputs, targets, method=way) for way in ("ghost", "loop")
    )
    torch.testing.assert_close(ghost, loop)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_hugging_face_models_need_no_second_pass(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    small = {
        "vocab_size": 20,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    if kind == "gpt2":
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=8)
        ).eval()
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small)).eval()
    inputs = {"input_ids": torch.randint(20, (3, 5)), "position_ids": torch.arange(5).expand(3, -1)}
    targets = torch.randint(20, (3, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ghost = per_example_gradient_norms(model, lambda out, labels: token_loss(out.logits, labels), inputs, targets)
    loop = per_example_gradient_norms(
        model, lambda out, labels: token_loss(out.logits, labels), inputs, targets, method="loop"
    )
    torch.testing.assert_close(ghost, loop, rtol=1e-4, atol=1e-5)


def test_nothing_is_changed() -> None:
    model, inputs, targets, loss_fn = cases()["frozen"]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [parameter.requires_grad for parameter in model.parameters()]
    random = torch.get_rng_state()
    per_example_gradient_norms(model, loss_fn, inputs, targets)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_batch_normalization_in_training_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="1 is batch normalization in training mode"):
        per_example_gradient_norms(model, per_example_loss, torch.randn(4, 2), torch.randint(3, (4,)))


def test_a_mean_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="one loss for each of 4"):
        per_example_gradient_norms(nn.Linear(2, 3), F.cross_entropy, torch.randn(4, 2), torch.randint(3, (4,)))
