"""One layer of Mamba for in-context learning: its identities."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dynascope.data.in_context.outliers import OutlierICL
from dynascope.nn.gated_linear_attention import GatedLinearAttentionICL, log_gates
from dynascope.nn.selective_scan import MambaZOH

D = 30


def prompts(count: int = 8, length: int = 20, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return OutlierICL(length=length).train_batch(count, generator=generator).prompts.double()


def anywhere(gated: bool = True) -> GatedLinearAttentionICL:
    """A model at no special place."""
    model = GatedLinearAttentionICL(D, gated=gated, state=D + 3).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def test_exact_discretization_is_a_sigmoid() -> None:
    z = torch.linspace(-30, 30, 101, dtype=torch.float64)
    torch.testing.assert_close(1 - torch.exp(-F.softplus(z)), torch.sigmoid(z), rtol=0, atol=1e-15)


def test_gates_and_what_is_forgotten_sum_to_one() -> None:
    z = 3 * torch.randn(5, 12, dtype=torch.float64)
    gates = log_gates(z).exp()
    torch.testing.assert_close(gates.sum(1) + torch.sigmoid(-z).prod(1), torch.ones(5, dtype=torch.float64))
    assert (gates >= 0).all()
    assert (gates <= 1).all()


@pytest.mark.parametrize("gated", [True, False])
def test_parallel_form_is_the_recurrence(gated: bool) -> None:
    model, P = anywhere(gated), prompts()
    torch.testing.assert_close(model(P), model.recurrent(P), rtol=1e-12, atol=1e-12)
    mask = torch.rand(8, 21) < 0.7
    mask[:, -1] = True
    torch.testing.assert_close(model(P, mask), model.recurrent(P, mask), rtol=1e-12, atol=1e-12)


def test_it_is_the_label_channel_of_the_full_recurrence() -> None:
    model, P = anywhere(), prompts(3)
    assert model.w is not None
    state = torch.zeros(3, len(model.W_B), D + 1, dtype=torch.float64)
    others = torch.randn(D, D + 1, dtype=torch.float64)
    gates = torch.cat([others, model.w[None]])
    for i in range(21):
        step = F.softplus(P[:, i] @ gates.T)
        entering = (1 - torch.exp(-step)) * P[:, i]
        state = torch.exp(-step)[:, None] * state + (P[:, i] @ model.W_B.T)[:, :, None] * entering[:, None]
    expected = torch.einsum("bsw,bs->bw", state, P[:, -1] @ model.W_C.T)[:, -1]
    torch.testing.assert_close(model(P), expected, rtol=1e-12, atol=1e-12)


def test_without_gate_weights_gates_are_powers_of_a_half() -> None:
    model = anywhere()
    with torch.no_grad():
        model.w.zero_()  # type: ignore[union-attr]
    expected = 0.5 ** torch.arange(21, 0, -1, dtype=torch.float64)
    torch.testing.assert_close(model.scores(prompts(2)).gate, expected.expand(2, -1))


def test_the_gates_gradient_in_closed_form() -> None:
    model, P = anywhere(), prompts(1)
    model(P).sum().backward()
    scores, tokens = model.scores(P), P[0]
    assert model.w is not None
    s = torch.sigmoid(tokens @ model.w)[:, None]
    later = (s * tokens).flip(0).cumsum(0).flip(0) - s * tokens
    weights = (scores.product[0] * tokens[:, -1])[:, None]
    torch.testing.assert_close(model.w.grad, (weights * ((1 - s) * tokens - later)).sum(0))


def test_only_the_gate_sees_positions() -> None:
    P = prompts()
    order = torch.cat([torch.randperm(20), torch.tensor([20])])
    linear, gated = anywhere(gated=False), anywhere()
    scores = linear.scores(P)
    torch.testing.assert_close(linear(P), (P[..., -1] * scores.attention).sum(1))
    torch.testing.assert_close(linear(P), linear(P[:, order]))
    with torch.no_grad():
        gated.w.zero_()  # type: ignore[union-attr]
    assert bool((gated(P) - gated(P[:, order])).abs().max() > 1e-3)


def test_attention_at_the_start_is_a_product_of_inputs() -> None:
    P = prompts()
    x = P[..., :-1]
    for state in (D, D + 1, D + 5):
        attention = GatedLinearAttentionICL(D, state=state, delta=0.15).double().scores(P).attention
        torch.testing.assert_close(attention, 0.15**2 * torch.einsum("bid,bd->bi", x, x[:, -1]), rtol=1e-6, atol=1e-9)
    other = P.clone()
    other[:, :, -1] = 7.0
    model = GatedLinearAttentionICL(D).double()
    torch.testing.assert_close(model.scores(other).attention, model.scores(P).attention)


def test_flipped_labels_flip_the_prediction_only_where_nothing_else_sees_them() -> None:
    model, P = anywhere(), prompts()
    flipped = P * torch.cat([torch.ones(D), -torch.ones(1)])
    assert bool((model(flipped) + model(P)).abs().max() > 1e-3)
    with torch.no_grad():
        model.w[-1] = 0.0  # type: ignore[index]
        model.W_B[:, -1] = 0.0
    torch.testing.assert_close(model(flipped), -model(P))


def test_where_the_hinge_loss_is_zero_so_is_every_gradient() -> None:
    model, P = anywhere(), prompts()
    large = P.clone()
    large[:, :, -1] *= 1e6
    with torch.no_grad():
        model.w[-1] = 0.0  # type: ignore[index]
        model.W_B[:, -1] = 0.0
        labels = model(large).sign()
    F.margin_ranking_loss(model(large), torch.zeros(8), labels, margin=1.0).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert (parameter.grad == 0).all()


def test_a_rotation_of_everything_changes_nothing() -> None:
    model, P = anywhere(), prompts()
    turn = torch.eye(D + 1, dtype=torch.float64)
    turn[:D, :D] = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q
    before = model(P)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter @ turn.T)
    torch.testing.assert_close(model(P @ turn.T), before)


def test_padding_is_not_there() -> None:
    model, P = anywhere(), prompts()
    filler = torch.full((8, 5, D + 1), torch.nan, dtype=torch.float64)
    mask = torch.arange(26) >= 5
    padded = torch.cat([filler, P], dim=1)
    torch.testing.assert_close(model(padded, mask.expand(8, -1)), model(P))
    model(padded, mask.expand(8, -1)).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


def test_an_empty_context_predicts_nothing() -> None:
    for gated in (True, False):
        assert anywhere(gated)(prompts(4, length=0)).tolist() == [0.0] * 4


def test_long_prompts_in_half_precision_do_not_underflow() -> None:
    z = torch.full((1, 5000), -7.0)
    exact, half = log_gates(z.double()), log_gates(z.half())
    assert torch.isfinite(half).all()
    torch.testing.assert_close(half.double(), exact, rtol=1e-2, atol=1e-3)
    assert torch.isfinite(log_gates(torch.tensor([[-1e4, 1e4, 0.0]]))).all()
    model = GatedLinearAttentionICL(D).half()
    assert model(prompts(2).half()).dtype == torch.float16


def test_another_rate_of_decay() -> None:
    z = torch.randn(3, 6, dtype=torch.float64)
    gates = log_gates(z, A=-0.5).exp()
    step = F.softplus(z)
    enters, passes = (1 - torch.exp(-0.5 * step)) / 0.5, torch.exp(-0.5 * step)
    torch.testing.assert_close(gates[:, 3], enters[:, 3] * passes[:, 4] * passes[:, 5])


@pytest.mark.parametrize("gated", [True, False])
def test_one_layer_of_the_stack_is_this_layer(gated: bool) -> None:
    stack = MambaZOH(D + 1, D + 1, gated=gated, residual=False).double()
    model = GatedLinearAttentionICL(D, gated=gated).double()
    if gated:
        with torch.no_grad():
            stack.w[0, -1] = model.w  # type: ignore[index]
    P = prompts()
    torch.testing.assert_close(stack(P)[:, -1, -1], model(P))
    torch.testing.assert_close(stack.predict(P), model(P))
    torch.testing.assert_close(stack.scores(P).product[0], model.scores(P).product)


def test_a_small_state_is_refused() -> None:
    with pytest.raises(ValueError, match="state=29"):
        GatedLinearAttentionICL(D, state=29)
