"""Models without their norms."""

import pytest
import torch
from torch import nn

from dynascope.nn import NoNorm, remove_norms


def test_layer_norms_and_rms_norms_go_and_batch_norms_stay() -> None:
    class LlamaRMSNorm(nn.Module):
        pass

    model = nn.Sequential(
        nn.LayerNorm(4), nn.Sequential(nn.RMSNorm(4), LlamaRMSNorm()), nn.BatchNorm1d(4), nn.Linear(4, 4)
    )
    remove_norms(model)
    kinds = [type(module) for module in (model[0], model[1][0], model[1][1], model[2])]
    assert kinds == [NoNorm, NoNorm, NoNorm, nn.BatchNorm1d]


def test_a_norm_can_stay() -> None:
    model = nn.ModuleDict({"first": nn.LayerNorm(4), "final_norm": nn.LayerNorm(4)})
    remove_norms(model, exclude="final")
    assert [type(module) for module in model.values()] == [NoNorm, nn.LayerNorm]


def test_nothing_to_remove_is_told() -> None:
    with pytest.raises(ValueError, match="no layer norm"):
        remove_norms(nn.Linear(2, 2))


def test_what_replaces_a_norm_passes_everything() -> None:
    x = torch.randn(3, 4)
    assert torch.equal(NoNorm()(x), x)
