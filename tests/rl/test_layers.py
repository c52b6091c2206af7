"""The products of a layer that are done in another way."""

import pytest
import torch
from torch import nn

from dynascope.rl import layers
from dynascope.rl.layers import causal


@torch.no_grad()
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("large", [1, 1 << 30])
def test_joined_products_are_the_linear_layers(large: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_LARGE", large)  # weights on the left, or not
    first, second, x = nn.Linear(40, 7, has_bias), nn.Linear(40, 5, has_bias), torch.randn(5, 40)
    for rows in (x, x.repeat(9, 1)):
        torch.testing.assert_close(layers._Linear(first)(rows), first(rows))
        joined = torch.cat([first(rows), second(rows)], 1)
        torch.testing.assert_close(layers._Linear(first, second)(rows), joined)


def test_what_is_seen_behind_padding() -> None:
    assert causal(torch.ones(2, 3).bool())[0] is None
    mask, places = causal(torch.tensor([[False, True, True]]))
    assert mask is not None
    assert mask[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert places.tolist() == [[0, 0, 1]]
