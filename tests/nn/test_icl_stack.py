"""Layers that regress in context: masked before the softmax, causal, and read by the probe of circuits."""

import pytest
import torch

from dynascope.data.in_context.linear_regression import LinearRegressionICL, Prompts
from dynascope.nn.circuits import Circuits, find_attention
from dynascope.nn.icl_attention import icl_attention
from dynascope.nn.icl_stack import StackedSoftmaxICL
from dynascope.probes.circuits import HeadCircuits
from dynascope.probes.views import ModelView


def prompts_of(length: int = 9, num_tasks: int = 1) -> Prompts:
    sampler = LinearRegressionICL(4, length, 0.1, tasks=[range(4)] * num_tasks)
    return sampler.sample(6, torch.Generator().manual_seed(0), dtype=torch.float64)


def model_of(num_layers: int, num_outputs: int = 1, **settings: bool) -> StackedSoftmaxICL:
    generator = torch.Generator().manual_seed(1)
    return StackedSoftmaxICL(4, 3, num_layers, num_outputs, generator=generator, dtype=torch.float64, **settings)


def test_each_layer_is_one_softmax_over_what_came_before() -> None:
    prompts, model = prompts_of(num_tasks=2), model_of(2, 2)
    tokens = torch.cat([prompts.context, prompts.query[:, None]], 1)
    for layer in model.layers:
        after = torch.zeros_like(tokens)
        for place in range(10):
            seen = tokens[:, : place + 1]
            for head in range(3):
                query, keys = tokens[:, place] @ layer.query[head].T, seen @ layer.key[head].T
                weights = (torch.einsum("bld,bd->bl", keys, query) / 6**0.5).softmax(1)
                values = torch.einsum("bl,bld->bd", weights, seen @ layer.value[head].T)
                after[:, place] += values @ layer.out[head].T
        tokens = after
    expected = tokens[:, -1] @ model.readout.T
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(model(prompts.context, prompts.query), expected, rtol=1e-10, atol=1e-12)


def test_one_layer_is_the_single_layer_that_has_its_query_for_a_key() -> None:
    prompts, model = prompts_of(), model_of(1)
    (circuits,) = model.circuits()
    context = torch.cat([prompts.context, prompts.query[:, None]], 1)
    expected = icl_attention(Circuits(circuits.kq, model.readout @ circuits.ov), context, prompts.query)
    torch.testing.assert_close(model(prompts.context, prompts.query), expected, rtol=1e-10, atol=1e-12)


def test_tied_layers_are_one() -> None:
    tied, free = model_of(3, is_tied=True), model_of(3)
    for layer in free.layers:
        layer.load_state_dict(tied.layers[0].state_dict())
    with torch.no_grad():
        free.readout.copy_(tied.readout)
    prompts = prompts_of()
    torch.testing.assert_close(tied(prompts.context, prompts.query), free(prompts.context, prompts.query))
    assert len(list(tied.parameters())) == 5 < len(list(free.parameters())) == 13


def test_the_probe_reads_every_layer() -> None:
    model = model_of(2)
    assert list(find_attention(model)) == ["layers.0", "layers.1"]
    omega = HeadCircuits().measure(ModelView(0, model, (), {}, 0.1))["circuits/omega"]
    expected = torch.stack([one.kq.diagonal(dim1=1, dim2=2).mean(1) for one in model.circuits()])
    torch.testing.assert_close(omega.double(), expected.detach(), rtol=1e-5, atol=1e-7)


def test_impossible_sizes_are_told() -> None:
    with pytest.raises(ValueError, match="num_layers=0"):
        StackedSoftmaxICL(4, 3, 0)
