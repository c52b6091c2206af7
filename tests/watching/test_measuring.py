"""Probes on models that are not being trained."""

import pytest
import torch

from dynascope.nn.toy_transformer import ToyTransformer
from dynascope.probes.extreme_tokens import ExtremeTokens
from dynascope.probes.gradients import Gradients
from dynascope.watching.measuring import measure

TOKENS = torch.randint(19, (6, 14), generator=torch.Generator().manual_seed(0))


def test_batches_of_any_size_give_what_all_rows_at_once_give() -> None:
    model = ToyTransformer(19, 14, width=8, depth=2, num_heads=2).train()
    whole = measure(model, ExtremeTokens(model, sink=0), [TOKENS])
    parts = measure(model, ExtremeTokens(model, sink=0), [TOKENS[:1], {"tokens": TOKENS[1:]}])
    assert model.training
    assert whole["extreme/sink_score"].dims == ("layer", "head")
    assert list(whole["extreme/sink_score"]["layer"].values) == ["blocks.0.attention", "blocks.1.attention"]
    for name in ("extreme/sink_score", "extreme/value_drain", "extreme/peak_mean", "extreme/column_entropy"):
        assert parts[name].values == pytest.approx(whole[name].values, abs=1e-5)


def test_what_cannot_be_measured_is_told() -> None:
    model = ToyTransformer(19, 14, width=8, depth=1)
    with pytest.raises(ValueError, match="no batches"):
        measure(model, ExtremeTokens(), [])
    with pytest.raises(ValueError, match="needs gradients"):
        measure(model, Gradients(), [TOKENS])
