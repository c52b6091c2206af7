"""Products with the Hessian equal those of the loss itself, though only the script knows the loss."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynascope.kernels import top_eigenvalue
from dynascope.watching.hessian import HessianWatch, differentiable_leaves


class Attentive(nn.Module):
    """A tiny transformer-like classifier with fused attention, whose backward has no derivative of its own."""

    def __init__(self, returns_loss: bool) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(7, 8), nn.Linear(8, 24), nn.Linear(8, 5)
        self.dropout = nn.Dropout(0.2)
        self.returns_loss = returns_loss

    def forward(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        query, key, value = self.mix(self.embed(tokens)).unsqueeze(1).chunk(3, dim=-1)
        mixed = self.dropout(F.scaled_dot_product_attention(query, key, value).squeeze(1))
        logits = self.head(mixed.tanh().mean(1))
        return (logits, F.cross_entropy(logits, labels)) if self.returns_loss else logits


@pytest.mark.parametrize("returns_loss", [True, False])
def test_product_equals_the_hessian_of_the_loss(returns_loss: bool) -> None:
    model = Attentive(returns_loss)
    tokens, labels = torch.randint(7, (4, 6)), torch.randint(5, (4,))
    parameters = list(model.parameters())
    state = torch.get_rng_state()
    watch = HessianWatch(model, parameters, (tokens, labels), {})
    output = model(tokens, labels)
    watch.outputs = differentiable_leaves(output)
    loss = output[1] if returns_loss else F.cross_entropy(output, labels)
    size = sum(parameter.numel() for parameter in parameters)
    vector = torch.randn(size)
    with watch.view(loss, step=0, lr=0.1) as view:
        product = view.hessian_product(vector)

    torch.set_rng_state(state)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        again = model(tokens, labels)
        true_loss = again[1] if returns_loss else F.cross_entropy(again, labels)
        slope = torch.cat([g.flatten() for g in torch.autograd.grad(true_loss, parameters, create_graph=True)])
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(slope @ vector, parameters)])
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-6)


def test_the_real_backward_still_gives_the_same_gradients() -> None:
    model = Attentive(returns_loss=False)
    tokens, labels = torch.randint(7, (4, 6)), torch.randint(5, (4,))
    state = torch.get_rng_state()
    F.cross_entropy(model(tokens, labels), labels).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    torch.set_rng_state(state)
    watch = HessianWatch(model, list(model.parameters()), (tokens, labels), {})
    output = model(tokens, labels)
    watch.outputs = differentiable_leaves(output)
    loss = F.cross_entropy(output, labels)
    with watch.view(loss, step=0, lr=0.1) as view:
        view.hessian_product(torch.ones(view.size))
    loss.backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_outputs_that_do_not_lead_to_the_loss_give_no_view() -> None:
    model = nn.Linear(3, 2)
    watch = HessianWatch(model, list(model.parameters()), (torch.randn(4, 3),), {})
    watch.outputs = [model(torch.randn(4, 3))]
    with watch.view(torch.randn((), requires_grad=True) * 2, step=0, lr=0.1) as view:
        assert view is None


def test_lanczos_finds_the_top_eigenvalue_of_a_known_matrix() -> None:
    matrix = torch.diag(torch.linspace(-3, 5, 40))
    value, vector = top_eigenvalue(lambda v: matrix @ v, torch.randn(40), iterations=25)
    torch.testing.assert_close(value, torch.tensor(5.0), rtol=1e-3, atol=0)
    assert vector.abs().argmax() == 39


def test_lanczos_refuses_a_start_of_zeros() -> None:
    with pytest.raises(ValueError, match="not zero"):
        top_eigenvalue(lambda v: v, torch.zeros(3))
