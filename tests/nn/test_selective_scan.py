"""The selective scan in pieces, and layers of it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from dynascope.nn.linear_attention import causal_linear_attention
from dynascope.nn.selective_scan import MambaZOH, selective_scan


def inputs(rates: int = 4, length: int = 11) -> tuple[Tensor, ...]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    u, delta = normal(2, length, 3), F.softplus(normal(2, length, 3))
    A = -torch.rand(3, rates, dtype=torch.float64) - 0.1
    return u, delta, A, normal(2, length, 4), normal(2, length, 4), normal(3)


def one_by_one(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, discretization: str = "zoh"
) -> Tensor:
    state, outputs = torch.zeros(2, 3, 4, dtype=u.dtype), []
    for t in range(u.shape[1]):
        step = delta[:, t, :, None]
        decay = torch.exp(step * A)
        scale = step if discretization == "euler" else (decay - 1) / A
        state = decay * state + scale * B[:, t, None] * u[:, t, :, None]
        outputs.append((state * C[:, t, None]).sum(2) + D * u[:, t])
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("discretization", ["zoh", "euler"])
@pytest.mark.parametrize("rates", [1, 4])
@pytest.mark.parametrize("chunk", [1, 4, 11, 50])
def test_pieces_are_the_recurrence(discretization: str, rates: int, chunk: int) -> None:
    given = inputs(rates)
    found = selective_scan(*given, discretization=discretization, chunk=chunk)  # type: ignore[arg-type]
    torch.testing.assert_close(found, one_by_one(*given, discretization=discretization), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rates", [1, 4])
@pytest.mark.parametrize("discretization", ["zoh", "euler"])
def test_gradients(rates: int, discretization: str) -> None:
    given = [one.requires_grad_() for one in inputs(rates, length=5)]
    assert gradcheck(lambda *leaves: selective_scan(*leaves, discretization=discretization, chunk=2), given)


def test_where_the_step_is_zero_nothing_happens() -> None:
    u, delta, A, B, C, _ = inputs()
    delta[:, 3:6] = 0.0
    kept = torch.tensor([0, 1, 2, 6, 7, 8, 9, 10])
    found = selective_scan(u, delta, A, B, C)
    expected = selective_scan(u[:, kept], delta[:, kept], A, B[:, kept], C[:, kept])
    torch.testing.assert_close(found[:, kept], expected)


def test_long_sequences_with_strong_decay_stay_finite() -> None:
    u = torch.randn(1, 3000, 2)
    delta = torch.full((1, 3000, 2), 50.0)
    A = torch.tensor([[-1.0, -16.0], [-0.5, -2.0]])
    B, C = torch.ones(1, 3000, 2), torch.ones(1, 3000, 2)
    for rates in (A, A[:, :1]):
        assert torch.isfinite(selective_scan(u, delta, rates, B, C)).all()
    assert selective_scan(u.half(), delta.half(), A.half(), B.half(), C.half()).dtype == torch.float16


def test_it_is_the_slow_path_of_hugging_face() -> None:
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    u, steps, B, C = torch.randn(2, 70, 6), torch.randn(2, 70, 6), torch.randn(2, 70, 4), torch.randn(2, 70, 4)
    A, D = -torch.arange(1.0, 5.0).expand(6, -1), torch.randn(6)
    expected = modeling.mamba_selective_scan(u.mT, steps.mT, A, B.mT, C.mT, D=D, delta_softplus=True).mT
    found = selective_scan(u, F.softplus(steps), A, B, C, D, discretization="euler")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def layers(gated: bool = True, residual: bool = True, A: float = -1.0) -> MambaZOH:
    model = MambaZOH(5, 6, A, layers=3, gated=gated, residual=residual).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_the_prediction_is_the_last_layers_label_channel(gated: bool, residual: bool) -> None:
    model, u = layers(gated, residual, A=-0.7), torch.randn(4, 9, 5, dtype=torch.float64)
    torch.testing.assert_close(model.predict(u), model(u)[:, -1, -1])
    assert model.scores(u).gate.shape == (3, 4, 9)


def test_a_layer_without_gates_is_causal_linear_attention() -> None:
    model, u = layers(gated=False, residual=False), torch.randn(2, 7, 5, dtype=torch.float64)
    expected = u
    for B, C in zip(model.W_B, model.W_C, strict=True):
        expected = causal_linear_attention(expected @ C.T, expected @ B.T, expected)
    torch.testing.assert_close(model(u), expected)


@pytest.mark.parametrize("gated", [True, False])
def test_padding_is_not_there(gated: bool) -> None:
    model, u = layers(gated), torch.randn(2, 6, 5, dtype=torch.float64)
    padded = torch.cat([torch.full((2, 3, 5), 7.0, dtype=torch.float64), u], dim=1)
    mask = (torch.arange(9) >= 3).expand(2, -1)
    torch.testing.assert_close(model(padded, mask)[:, 3:], model(u))
    torch.testing.assert_close(model.predict(padded, mask), model.predict(u))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: MambaZOH(5, 5, A=0.5), "below 0"),
        (lambda: MambaZOH(5, 5, layers=0), "at least 1"),
        (lambda: MambaZOH(5, 3), "at least d_in - 1 = 4"),
        (lambda: selective_scan(*inputs(), chunk=0), "chunk=0"),
        (lambda: selective_scan(*inputs(rates=3)), "3 rates"),
    ],
)
def test_impossible_requests_are_told(call: Callable[[], object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()
