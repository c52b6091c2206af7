"""Stacked YZ blocks: each is its definition, none sees the future, and probes see every layer."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

import dynascope
from dynascope.nn import YZStack, YZTransformer
from dynascope.nn.yz_stack import NONLINEARITIES
from dynascope.optim import attention_decoder_param_groups

VOCAB, LENGTH, RANK = 11, 7, 3


def sequences(count: int = 5) -> Tensor:
    return torch.randint(VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(1))


def by_definition(model: YZStack, tokens: Tensor, residual: bool) -> Tensor:
    x = one_hot(tokens, VOCAB).double()
    for index, block in enumerate(model.blocks):
        if index:
            x = NONLINEARITIES[model.nonlinearity](x)
            x = x / x.norm(dim=2, keepdim=True)
        Z, Y = block.Z_query @ block.Z_key.T, block.Y_next @ block.Y_context.T
        rows = []
        for t in range(LENGTH):
            weights = torch.einsum("bm,ml,bsl->bs", x[:, t], Z, x[:, : t + 1]).softmax(1)
            mixture = torch.einsum("bs,bsl->bl", weights, x[:, : t + 1]) + residual * x[:, t]
            features = mixture / mixture.norm(dim=1, keepdim=True)
            rows.append(features @ Y.T + residual * features)
        x = torch.stack(rows, 1)
    return x


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_every_variant_is_its_definition(nonlinearity: str, residual: bool) -> None:
    torch.manual_seed(0)
    model = YZStack(VOCAB, RANK, 3, nonlinearity=nonlinearity, residual=residual).double()
    expected = by_definition(model, sequences(), residual)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(model(sequences()), expected, rtol=1e-10, atol=1e-12)


def test_one_block_is_the_single_layer_at_every_position() -> None:
    torch.manual_seed(0)
    stack = YZStack(VOCAB, RANK, 1).double()
    single = YZTransformer(VOCAB, rank=RANK, init="uniform", include_query=True).double()
    single.load_state_dict(stack.blocks[0].state_dict())
    tokens = sequences()
    expected = torch.stack([single(tokens[:, : end + 1]) for end in range(LENGTH)], 1)
    torch.testing.assert_close(stack(tokens), expected, rtol=1e-12, atol=1e-12)


def test_what_follows_is_not_seen() -> None:
    model, tokens = YZStack(VOCAB, RANK, 3), sequences()
    changed = torch.cat([tokens[:, :4], (tokens[:, 4:] + 1) % VOCAB], 1)
    torch.testing.assert_close(model(tokens)[:, :4], model(changed)[:, :4])


def test_a_block_that_says_nothing_is_followed_by_finite_gradients() -> None:
    """ReLU of logits that are all negative: the next block reads zeros, which have no direction."""
    model = YZStack(VOCAB, RANK, 2)
    with torch.no_grad():
        model.blocks[0].Y_next.fill_(-1)
        model.blocks[0].Y_context.fill_(1)
    logits = model(sequences())
    assert torch.equal(logits, torch.zeros_like(logits))
    logits.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


def test_probes_see_every_layer(tmp_path: object) -> None:
    torch.manual_seed(0)
    model = YZStack(VOCAB, RANK, 2)
    optimizer = torch.optim.SGD(attention_decoder_param_groups(model, 0.1, decoder_multiplier=2.0))
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 4]
    with dynascope.watch(model, optimizer, run=f"{tmp_path}/run", every=1, probes=["attention"]):
        model(sequences()).square().mean().backward()
        optimizer.step()
    entropy = dynascope.open(f"{tmp_path}/run")["attention/entropy"]
    assert entropy.shape == (1, 2, 1)
    assert torch.isfinite(torch.tensor(entropy.values)).all()


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: YZStack(VOCAB, 0, 1), "rank=0"),
        (lambda: YZStack(VOCAB, RANK, 0), "num_layers=0"),
        (lambda: YZStack(VOCAB, RANK, 2, nonlinearity="tanh"), "one of relu, sigmoid, softmax"),
    ],
)
def test_impossible_models_are_told(call: Callable[[], object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()
