"""Sketches of gradients: exact where there is nothing to average, unbiased, the same in parts, and of bounded size."""

import pytest
import torch

from dynascope.kernels import sketches
from dynascope.kernels.layerwise import Explicit, Outer, Use
from dynascope.kernels.products import inner_products
from dynascope.kernels.sketches import sketch

SHAPE = torch.Size([5, 4])


def uses_of(num_examples: int = 2) -> dict[str, list[Use]]:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    linear = Outer(drawn(num_examples, 3, 4), drawn(num_examples, 3, 5))
    lookup = Outer(
        torch.randint(5, (num_examples, 3), generator=generator), drawn(num_examples, 3, 4), is_input_first=True
    )
    first = Outer(drawn(num_examples, 3, 5), drawn(num_examples, 3, 4), is_input_first=True)
    explicit = Explicit(drawn(num_examples, 5, 4))
    return {
        "linear": [linear],
        "lookup": [lookup],
        "input first": [first],
        "explicit": [explicit],
        "tied": [linear, lookup],
    }


@pytest.mark.parametrize("kind", uses_of())
def test_a_number_of_the_sketch_is_the_gradient_between_signs(kind: str) -> None:
    uses = uses_of()[kind]
    gradient = torch.stack([use.explicit(SHAPE) for use in uses]).sum(0)
    generator = torch.Generator().manual_seed(3)
    left, right = (sketches._signs(6, width, generator).double() for width in SHAPE)
    expected = torch.einsum("ki,eij,kj->ek", left, gradient, right) / 6**0.5
    torch.testing.assert_close(sketch(uses, SHAPE, 6, seed=3), expected)


@pytest.mark.parametrize("kind", uses_of())
def test_products_are_right_on_average(kind: str) -> None:
    uses, num = uses_of()[kind], 20_000
    one, two = sketch(uses, SHAPE, num)
    (exact,) = inner_products([_row(use, 0) for use in uses], [_row(use, 1) for use in uses], SHAPE)
    products = one * two * num  # each an estimate of its own
    assert abs(float(products.mean() - exact)) < 4 * float(products.std()) / num**0.5
    norms = one.square() * num
    (square,) = inner_products([_row(use, 0) for use in uses], [_row(use, 0) for use in uses], SHAPE)
    assert abs(float(norms.mean() - square)) < 4 * float(norms.std()) / num**0.5


def _row(use: Use, row: int) -> Use:
    if isinstance(use, Outer):
        return Outer(use.inputs[[row]], use.gradients[[row]], use.is_input_first)
    return Explicit(use.gradients[[row]])


def test_one_number_is_exact_whatever_the_signs() -> None:
    one = Explicit(torch.tensor([[3.0], [-2.0]]))
    found = sketch([one], torch.Size([1]), 7)
    assert float((found[0] * found[1]).sum()) == pytest.approx(-6.0)
    assert sketch([Explicit(torch.tensor([3.0]))], torch.Size([]), 2).square().sum() == pytest.approx(9.0)


def test_memory_is_bounded_and_parts_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    uses, drawn = uses_of()["tied"], []
    monkeypatch.setattr(sketches, "MAX_NUMBERS", 90)
    signs = sketches._signs
    monkeypatch.setattr(sketches, "_signs", lambda count, *rest: (drawn.append(count), signs(count, *rest))[1])
    found = sketch(uses, SHAPE, 25)
    assert found.shape == (2, 25)
    assert max(drawn) * (5 + 4) <= 90
    torch.testing.assert_close(found, sketch(uses, SHAPE, 25))
    assert not torch.allclose(found, sketch(uses, SHAPE, 25, seed=1))


def test_a_sketch_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="size=0"):
        sketch(uses_of()["linear"], SHAPE, 0)
