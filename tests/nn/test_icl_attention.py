"""The layer that regresses in context: heads, networks side by side, and starts."""

from collections.abc import Callable

import pytest
import torch

from dynascope.data.in_context.linear_regression import LinearRegressionICL, Prompts
from dynascope.nn.icl_attention import MultiHeadSoftmaxICL, icl_attention
from dynascope.theory.in_context_regression import gd_predict, softmax_heads_predict


def prompts_of(length: int = 9, *, num_tasks: int = 1) -> Prompts:
    sampler = LinearRegressionICL(4, length, 0.1, tasks=[range(4)] * num_tasks)
    return sampler.sample(6, torch.Generator().manual_seed(0), dtype=torch.float64)


def model_of(num_heads: int = 3, num_outputs: int = 1, **settings: object) -> MultiHeadSoftmaxICL:
    settings = {"generator": torch.Generator().manual_seed(1), "dtype": torch.float64} | settings
    return MultiHeadSoftmaxICL(4, num_heads, num_outputs, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("attention", ["softmax", "linear"])
def test_the_products_are_what_the_four_projections_compute(attention: str) -> None:
    prompts, model = prompts_of(num_tasks=2), model_of(num_outputs=2, attention=attention, linear_scale=0.3)
    expected = torch.zeros(6, 2, dtype=torch.float64)
    for head in range(3):
        query, keys = prompts.query @ model.query[head].T, prompts.context @ model.key[head].T
        logits = torch.einsum("bld,bd->bl", keys, query) / 6**0.5
        weights = logits.softmax(1) if attention == "softmax" else 0.3 * logits
        values = torch.einsum("bl,bld->bd", weights, prompts.context @ model.value[head].T)
        expected += values @ model.out[head].T
    torch.testing.assert_close(model(prompts.context, prompts.query), expected, rtol=1e-10, atol=1e-10)


def test_examples_and_heads_may_come_in_any_order() -> None:
    prompts, model = prompts_of(), model_of()
    before = model(prompts.context, prompts.query)
    torch.testing.assert_close(model(prompts.context.flip(1), prompts.query), before)
    with torch.no_grad():
        for part in model.parameters():
            part.copy_(part.flip(0))
    torch.testing.assert_close(model(prompts.context, prompts.query), before)


def test_the_query_is_no_key() -> None:
    """With one example all of the weight is on it, whatever the query says."""
    prompts, model = prompts_of(length=1), model_of()
    values = torch.einsum("hod,bd->bo", model.circuits().ov, prompts.context[:, 0])
    torch.testing.assert_close(model(prompts.context, 100 * prompts.query), values)


def test_networks_side_by_side_are_each_as_if_alone() -> None:
    prompts, many = prompts_of(num_tasks=2), model_of(num_outputs=2, num_networks=3)
    alone = [model_of(num_outputs=2) for _ in range(3)]
    for index, model in enumerate(alone):
        model.load_state_dict({name: part[index] for name, part in many.state_dict().items()})
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.1) for model in (many, *alone)]
    for _ in range(3):
        for model, optimizer in zip((many, *alone), optimizers, strict=True):
            optimizer.zero_grad()
            (model(prompts.context, prompts.query) - prompts.target).square().mean((-2, -1)).sum().backward()
            optimizer.step()
    for index, model in enumerate(alone):
        torch.testing.assert_close(many(prompts.context, prompts.query)[index], model(prompts.context, prompts.query))


def test_heads_with_the_pattern_are_the_reduced_model() -> None:
    prompts, model = prompts_of(), model_of(num_heads=2)
    omega, mu = torch.tensor([0.3, -0.2], dtype=torch.float64), torch.tensor([2.0, -1.5], dtype=torch.float64)
    with torch.no_grad():
        identity = torch.eye(5, dtype=torch.float64)
        model.key.copy_(identity.expand(2, 5, 5))
        model.query.copy_(5**0.5 * omega[:, None, None] * torch.diag(torch.tensor([1.0, 1, 1, 1, 0])))
        model.value.copy_(identity.expand(2, 5, 5))
        model.out.zero_()
        model.out[:, 0, 4] = mu
    x, y, query = prompts.x, prompts.y[..., 0], prompts.query_x
    found = model(prompts.context, prompts.query)[:, 0]
    torch.testing.assert_close(found, softmax_heads_predict(x, y, query, omega, mu))
    linear = icl_attention(model.circuits(), prompts.context, prompts.query, attention="linear", linear_scale=1 / 9)
    torch.testing.assert_close(linear[:, 0], gd_predict(x, y, query, float(omega @ mu)))


def test_starts() -> None:
    assert float(model_of(2).circuits().kq.detach().std()) > 0.05
    small = model_of(2, init="small_identity").circuits()
    torch.testing.assert_close(
        small.kq[0].detach(), 1e-12 / 5**0.5 * torch.eye(5, dtype=torch.float64), atol=0, rtol=1e-6
    )
    signed = model_of(2, init="opposite_small_identity").circuits()
    assert signed.kq[:, 0, 0].sign().tolist() == [1, -1]
    half = model_of(2, init="small_identity_qk")
    assert float(half.value.detach().std()) > 0.05
    assert float(half.key.detach().diagonal(dim1=1, dim2=2).mean()) == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: model_of(0), "at least 1"),
        (lambda: model_of(num_networks=0), "at least 1"),
        (lambda: model_of(init="zeros"), "init is one of"),
        (lambda: model_of(attention="hard"), "softmax or linear"),
        (lambda: model_of(3, init="opposite_small_identity"), "even"),
    ],
)
def test_impossible_requests_are_told(call: Callable[[], object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()
