"""What the reparametrization guarantees, and where it fits."""

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from dynascope.nn import (
    SigmaReparam,
    iterate_each_step,
    merge_sigma_reparam,
    remove_norms,
    sigma_reparam,
    spectral_norms,
)


def norm(weight: torch.Tensor) -> torch.Tensor:
    return torch.linalg.matrix_norm(weight.detach().double().flatten(1), ord=2)


def wrapped(out_features: int = 6, in_features: int = 4, **settings: object) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    sigma_reparam(layer, **settings)
    return layer


def buffers(model: nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (1, 5), (5, 1), (7, 7)])
def test_spectral_norm_is_gamma_from_the_start(shape: tuple[int, int]) -> None:
    assert norm(wrapped(*shape).weight) == pytest.approx(1.0, abs=1e-5)


def test_hand_worked_diagonal() -> None:
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([3.0, 1.0])))
    sigma_reparam(layer)
    torch.testing.assert_close(layer.weight.detach(), torch.diag(torch.tensor([1.0, 1 / 3])))


def test_power_iteration_follows_a_weight_that_moved() -> None:
    layer = wrapped()
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.randn(6, 4))
        layer.parametrizations.weight[0].gamma.fill_(2.5)
    for _ in range(200):
        layer(torch.randn(1, 4))
    assert norm(layer.weight) == pytest.approx(2.5, abs=1e-4)


def test_scale_of_the_weight_does_not_matter() -> None:
    layer, x = wrapped().eval(), torch.randn(3, 4)
    before = layer(x)
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(7.0)
    torch.testing.assert_close(layer(x), before)


def test_gradient_is_orthogonal_to_the_weight_and_shrinks_with_its_scale() -> None:
    gradients = []
    start = wrapped()
    for scale in (1.0, 4.0):
        layer = copy.deepcopy(start).eval()
        original = layer.parametrizations.weight.original
        with torch.no_grad():
            original.mul_(scale)
        layer(torch.ones(1, 4)).square().sum().backward()
        assert (original.grad * original).sum().item() == pytest.approx(0.0, abs=1e-5)
        gradients.append(original.grad)
    torch.testing.assert_close(gradients[1], gradients[0] / 4)


@pytest.mark.parametrize("is_training", [True, False])
def test_gradients_are_those_of_dividing_by_the_exact_norm(is_training: bool) -> None:
    layer, pull = wrapped().train(is_training), torch.randn(6, 4)
    exact = layer.parametrizations.weight.original.detach().clone().requires_grad_()
    gamma = torch.ones(1, requires_grad=True)
    (pull * gamma / torch.linalg.matrix_norm(exact, ord=2) * exact).sum().backward()
    (pull * layer.weight).sum().backward()
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, exact.grad)
    torch.testing.assert_close(layer.parametrizations.weight[0].gamma.grad, gamma.grad)


def test_preserve_leaves_the_function_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5 * 36, 7))
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    torch.testing.assert_close(sigma_reparam(model, gamma="preserve").eval()(x), before, rtol=1e-5, atol=1e-5)


def test_merge_leaves_the_function_and_the_names_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    names, x = set(model.state_dict()), torch.randn(5, 4)
    sigma_reparam(model)
    model(x)
    before = model.eval()(x)
    merge_sigma_reparam(model.train())
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model(x), before)


def test_state_dict_brings_the_singular_vectors_back_bit_for_bit() -> None:
    first, second = wrapped(), wrapped()
    first(torch.randn(1, 4))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert equal(buffers(first), buffers(second))
    assert torch.equal(first.eval().weight, second.eval().weight)


def test_evaluation_changes_no_buffer_and_training_does() -> None:
    layer, x = wrapped(), torch.randn(2, 4)
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(torch.randn(6, 4))
    before = buffers(layer)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert equal(buffers(layer), before)
    layer.train()(x)
    assert not equal(buffers(layer), before)


def test_two_forwards_before_a_backward() -> None:
    layer = wrapped()
    (layer(torch.randn(2, 4)) + layer(torch.randn(2, 4))).sum().backward()
    assert torch.isfinite(layer.parametrizations.weight.original.grad).all()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_iterates_once_and_gives_the_same_gradient(use_reentrant: bool) -> None:
    plain = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    sigma_reparam(plain)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    saving = copy.deepcopy(plain)
    x = torch.randn(5, 4, requires_grad=True)
    plain(x).square().sum().backward()
    checkpoint(saving, x, use_reentrant=use_reentrant).square().sum().backward()
    assert equal(buffers(plain), buffers(saving))
    for one, two in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_iterating_each_step_is_once_a_step_and_follows_the_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    sigma_reparam(model, split_fused={"^3": 2})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = iterate_each_step(model, optimizer)
    before = buffers(model)
    for _ in range(3):  # micro-batches
        model(torch.randn(8, 4)).square().mean().backward()
    assert equal(buffers(model), before)
    optimizer.step()
    optimizer.zero_grad()
    after = buffers(model)
    assert not equal(after, before)
    for _ in range(300):
        optimizer.step()
    for layer in model[:3]:
        assert norm(layer.weight) == pytest.approx(layer.parametrizations.weight[0].gamma.item(), rel=1e-4)
    handle.remove()


def test_iteration_each_step_equals_that_of_a_forward() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 10))
    sigma_reparam(model, split_fused={"^2": 2})  # a pair of one shape with the first two
    other = copy.deepcopy(model)
    for one in (model, other):
        with torch.no_grad():
            for layer in one:
                layer.parametrizations.weight.original.mul_(torch.linspace(1, 3, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    iterate_each_step(model, optimizer)
    optimizer.step()
    other(torch.randn(1, 5))
    for one, two in zip(buffers(model), buffers(other), strict=True):
        torch.testing.assert_close(one, two)


def test_fused_projections_can_have_a_gamma_a_part() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        attention.in_proj_weight[:8].mul_(9.0)
    sigma_reparam(attention, split_fused={"in_proj": 3})
    parts = attention.in_proj_weight.detach().chunk(3)
    assert [norm(part).item() for part in parts] == pytest.approx([1.0, 1.0, 1.0], abs=1e-5)


def test_a_fused_projection_shares_one_gamma_otherwise() -> None:
    attention = nn.MultiheadAttention(8, 2)
    sigma_reparam(attention)
    assert norm(attention.in_proj_weight) == pytest.approx(1.0, abs=1e-5)


def test_unequal_split_is_refused_with_the_weights_name() -> None:
    with pytest.raises(ValueError, match=r"weight: 6 rows cannot be split into 4"):
        sigma_reparam(nn.Linear(4, 6), split_fused={"weight": 4})


def test_weights_of_zeros_are_refused_and_later_zeros_harmless() -> None:
    layer = nn.Linear(3, 3)
    nn.init.zeros_(layer.weight)
    with pytest.raises(ValueError, match="weight of zeros"):
        sigma_reparam(layer)
    other = wrapped()
    with torch.no_grad():
        other.parametrizations.weight.original.zero_()
    other(torch.ones(1, 4)).sum().backward()
    assert (other.weight == 0).all()
    assert torch.isfinite(other.parametrizations.weight.original.grad).all()


def test_tied_embeddings_stay() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.body, self.head = nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10, bias=False)
            self.head.weight = self.token.weight

    model = sigma_reparam(Tied())
    assert not parametrize.is_parametrized(model.head)
    assert parametrize.is_parametrized(model.body)


def test_tied_layers_keep_one_parametrization() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    sigma_reparam(model)
    assert first.parametrizations.weight.original is second.parametrizations.weight.original
    assert len([one for one in model.modules() if isinstance(one, SigmaReparam)]) == 1
    x = torch.randn(3, 4)
    before = model.eval()(x)
    torch.testing.assert_close(merge_sigma_reparam(model)(x), before)


def test_stats_only_changes_nothing_and_follows_sigma() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    x, weights = torch.randn(3, 4), [layer.weight.clone() for layer in model]
    before = model(x)
    sigma_reparam(model, stats_only=True)
    assert torch.equal(model(x), before)
    told = list(spectral_norms(model).values())
    assert [sigma.item() for sigma in told] == pytest.approx([norm(weight).item() for weight in weights], rel=1e-5)
    assert not any("gamma" in name for name, _ in model.named_parameters())


def test_gamma_can_be_fixed() -> None:
    layer = wrapped(learn_gamma=False)
    assert [name for name, parameter in layer.named_parameters() if not parameter.requires_grad] == [
        "parametrizations.weight.0.gamma"
    ]


def test_exclusions_and_empty_choices() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    sigma_reparam(model, exclude=r"^1\.")
    assert [parametrize.is_parametrized(layer) for layer in model] == [True, False]
    with pytest.raises(ValueError, match="no linear map"):
        sigma_reparam(nn.Sequential(nn.ReLU()))


def test_sigma_is_exact_under_autocast_and_in_bfloat16() -> None:
    layer = wrapped(64, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 48)).dtype == torch.bfloat16
        assert norm(layer.weight) == pytest.approx(1.0, abs=1e-5)
    half = sigma_reparam(nn.Linear(48, 64).bfloat16())
    assert half.weight.dtype == torch.bfloat16
    assert norm(half.weight) == pytest.approx(1.0, abs=2e-2)  # a weight of bfloat16 has three digits


def test_deepcopy_is_independent() -> None:
    layer = wrapped()
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.parametrizations.weight.original.add_(1.0)
    before = buffers(layer)
    other(torch.randn(1, 4))
    assert equal(buffers(layer), before)


def test_sigma_of_a_bfloat16_weight_is_known_in_single_precision() -> None:
    layer = sigma_reparam(nn.Linear(512, 512).bfloat16())
    layer(torch.randn(1, 512, dtype=torch.bfloat16))
    exact = norm(layer.parametrizations.weight.original).item()
    assert spectral_norms(layer)["weight"].item() == pytest.approx(exact, rel=1e-6)
    layer.bfloat16()  # casts the singular vectors, too
    layer(torch.randn(1, 512, dtype=torch.bfloat16)).sum().backward()


COMPILED = """
import copy, torch
from torch import nn
from dynascope.nn import sigma_reparam
eager = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2))
sigma_reparam(eager)
with torch.no_grad():
    eager[0].parametrizations.weight.original.add_(0.2)
other = copy.deepcopy(eager)
compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
x = torch.randn(3, 4)
for _ in range(3):
    outputs = [model(x) for model in (eager, compiled)]
    for output in outputs:
        output.sum().backward()
torch.testing.assert_close(*outputs)
for one, two in zip(eager.parameters(), other.parameters(), strict=True):
    torch.testing.assert_close(one.grad, two.grad)
for one, two in zip(eager.buffers(), other.buffers(), strict=True):
    torch.testing.assert_close(one, two)
"""

COMPILED_CHECKPOINT = """
import copy, sys, torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from dynascope.nn import sigma_reparam

plain = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2))
sigma_reparam(plain)
saving = copy.deepcopy(plain)
if sys.argv[1] == "inside":
    step = torch.compile(lambda x: checkpoint(saving, x, use_reentrant=False), backend="aot_eager")
else:
    compiled = torch.compile(saving, backend="aot_eager")
    step = lambda x: checkpoint(compiled, x, use_reentrant=False)
optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (plain, saving)]
for _ in range(3):
    x = torch.randn(5, 4)
    for forward, optimizer in zip((plain, step), optimizers):
        optimizer.zero_grad()
        forward(x).square().sum().backward()
        optimizer.step()
for one, two in zip([*plain.parameters(), *plain.buffers()], [*saving.parameters(), *saving.buffers()], strict=True):
    torch.testing.assert_close(one, two)
"""


def test_compiled_is_one_graph_and_equals_eager() -> None:
    # In a process of its own, as the compiler cannot see through the shape checks of the tests.
    subprocess.run([sys.executable, "-c", COMPILED], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("checkpointing", ["inside", "around"])
def test_checkpointing_of_a_compiled_model_trains_as_plain(checkpointing: str) -> None:
    # The second forward must know at each call, not when it is compiled, that it must not iterate.
    subprocess.run(
        [sys.executable, "-c", COMPILED_CHECKPOINT, checkpointing], check=True, cwd=Path(__file__).parents[2]
    )


def test_training_brings_gamma_down_or_up() -> None:
    torch.manual_seed(0)
    layer = wrapped(1, 8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05, weight_decay=0.0)
    x, target = torch.randn(64, 8), 2 * torch.randn(8)
    for _ in range(300):
        optimizer.zero_grad()
        (layer(x)[:, 0] - x @ target).square().mean().backward()
        optimizer.step()
    assert layer.parametrizations.weight[0].gamma.item() == pytest.approx(target.norm().item(), rel=0.05)


def test_models_without_norms_train_with_it() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = sigma_reparam(remove_norms(layer))
    x = torch.randn(2, 5, 16)
    model(x).square().sum().backward()
    training = model(x)
    with torch.no_grad():  # without gradients and in evaluation PyTorch would take its fused path
        torch.testing.assert_close(model.eval()(x), training, rtol=1e-4, atol=1e-4)
