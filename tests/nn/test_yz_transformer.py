"""The YZ transformer: no positions, free scales, padding, and its two forms."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from dynascope.nn import YZTransformer

VOCAB, LENGTH = 11, 9


def filled(**settings: object) -> YZTransformer:
    model = YZTransformer(VOCAB, **settings).double()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def sequences(count: int = 6) -> Tensor:
    return torch.randint(VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(1))


def by_one_hot(model: YZTransformer, tokens: Tensor) -> Tensor:
    """The definition with (batch, length, vocab) tensors."""
    Z = model.Z if model.rank is None else model.Z_query @ model.Z_key.T
    Y = model.Y if model.rank is None else model.Y_next @ model.Y_context.T
    bag = one_hot(tokens, VOCAB).double()
    keys = bag if model.include_query else bag[:, :-1]
    weights = torch.einsum("bm,ml,btl->bt", bag[:, -1], Z, keys).softmax(1)
    mixture = torch.einsum("bt,btl->bl", weights, keys)
    if model.residual:
        mixture = mixture + bag[:, -1]
    if model.normalize == "l2":
        mixture = mixture / mixture.square().sum(1, keepdim=True).sqrt()
    return mixture @ Y.T


@pytest.mark.parametrize("include_query", [False, True])
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("normalize", ["l2", "none"])
@pytest.mark.parametrize("residual", [False, True])
def test_every_variant_is_its_definition(include_query: bool, rank: int | None, normalize: str, residual: bool) -> None:
    model = filled(include_query=include_query, rank=rank, normalize=normalize, residual=residual, init="uniform")
    tokens = sequences()
    torch.testing.assert_close(model(tokens), by_one_hot(model, tokens), rtol=1e-12, atol=1e-12)
    context = tokens if include_query else tokens[:, :-1]
    counts = one_hot(context, VOCAB).sum(1).double()
    torch.testing.assert_close(model.forward_counts(counts, tokens[:, -1]), model(tokens), rtol=1e-12, atol=1e-12)


def test_positions_say_nothing() -> None:
    model, tokens = filled(), sequences()
    shuffled = torch.cat([tokens[:, torch.randperm(LENGTH - 1)], tokens[:, -1:]], dim=1)
    torch.testing.assert_close(model(shuffled), model(tokens), rtol=1e-12, atol=1e-12)


def test_a_constant_per_query_and_the_length_of_the_mixture_change_nothing() -> None:
    model, tokens = filled(), sequences()
    logits = model(tokens)
    torch.testing.assert_close(model._decode(7.3 * model.token_mixture(tokens), tokens[:, -1]), logits)
    with torch.no_grad():
        model.Z += torch.randn(VOCAB, 1)
    torch.testing.assert_close(model(tokens), logits, rtol=1e-9, atol=1e-9)


def test_attention_moves_in_the_rows_of_queries_only_and_sums_to_nothing() -> None:
    model, tokens = filled(), sequences()
    cross_entropy(model(tokens), torch.zeros(len(tokens), dtype=torch.long)).backward()
    assert model.Z.grad is not None
    torch.testing.assert_close(model.Z.grad.sum(1), torch.zeros(VOCAB).double(), atol=1e-15, rtol=0)
    is_query = torch.zeros(VOCAB, dtype=torch.bool).scatter_(0, tokens[:, -1], True)
    assert not is_query.all()
    assert torch.equal(model.Z.grad[~is_query], torch.zeros_like(model.Z.grad[~is_query]))
    assert float(model.Z.grad[is_query].abs().max()) > 1e-3


def test_attention_cannot_move_before_the_decoder_nor_over_a_single_key() -> None:
    start = YZTransformer(VOCAB)
    cross_entropy(start(sequences()), torch.zeros(6, dtype=torch.long)).backward()
    assert start.Z.grad is not None
    assert torch.equal(start.Z.grad, torch.zeros_like(start.Z.grad))
    model = filled()
    cross_entropy(model(sequences()[:, -2:]), torch.zeros(6, dtype=torch.long)).backward()
    assert model.Z.grad is not None
    assert float(model.Z.grad.abs().max()) < 1e-15


def test_padding_is_as_if_it_were_not_there() -> None:
    model, tokens = filled(), sequences()
    padded = torch.cat([torch.full((6, 4), 2), tokens], dim=1)
    visible = torch.arange(LENGTH + 4).expand(6, -1) >= 4
    torch.testing.assert_close(model(padded, visible), model(tokens), rtol=1e-12, atol=1e-12)
    assert float(model.attention(padded, visible)[:, :4].detach().abs().max()) == 0.0
    torch.testing.assert_close(model.token_mixture(padded, visible).sum(1), torch.ones(6).double())


def test_large_logits_stay_finite() -> None:
    model = filled()
    with torch.no_grad():
        model.Z *= 1e4
    assert bool(torch.isfinite(model(sequences())).all())


def test_starts() -> None:
    assert float(YZTransformer(100).Z.detach().abs().max()) == 0.0
    reach = YZTransformer(100, init="uniform").Y.detach().abs().max()
    assert 0.09 < float(reach) <= 0.1
    low = YZTransformer(100, init="uniform", rank=4)
    assert [tuple(one.shape) for one in low.parameters()] == [(100, 4)] * 4


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: YZTransformer(5, rank=2), "low rank"),
        (lambda: YZTransformer(5, rank=0, init="uniform"), "low rank"),
        (lambda: YZTransformer(5)(torch.zeros(1, 1, dtype=torch.long)), "no context"),
        (lambda: YZTransformer(5).forward_counts(torch.zeros(1, 5), torch.tensor([0])), "no context"),
        (lambda: YZTransformer(5)(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3).bool()), "padding only"),
    ],
)
def test_impossible_requests_are_told(call: Callable[[], object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()
