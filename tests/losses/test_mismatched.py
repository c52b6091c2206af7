"""Responses to other prompts: by hand, with padding on either side, and what KTO makes of them."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from dynascope.losses import margin_loss, mismatched_responses
from dynascope.probes.entanglement import PreferenceBatch, response_log_probs


def test_each_prompt_meets_the_next_response() -> None:
    tokens = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 0]])  # padding before the one and after the other
    mask = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 0]])
    attended = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    found = mismatched_responses(tokens, mask, attended)
    assert found[0].tolist() == [[1, 2, 5, 6], [4, 3, 0, 0]]
    assert found[1].tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]
    assert found[2].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_a_single_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="two or more"):
        mismatched_responses(torch.ones(1, 3).long(), torch.ones(1, 3))


def test_kto_takes_its_baseline_from_them() -> None:
    reference = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9)).double()
    model = copy.deepcopy(reference)
    nn.init.normal_(model[1].bias)
    tokens = torch.randint(9, (8, 5))
    mask = torch.tensor([0, 0, 1, 1, 1]).expand(8, 5)
    batch = PreferenceBatch(tokens, mask)
    chosen = PreferenceBatch(*mismatched_responses(tokens[:4], mask[:4]))
    with torch.no_grad():
        now, before = (response_log_probs(one, batch) for one in (model, reference))
        ratios = response_log_probs(model, chosen) - response_log_probs(reference, chosen)
    pairs = replace(batch.pairs(now, before), mismatched=ratios)
    expected = margin_loss("kto", baseline=max(0.0, float(ratios.mean())))(pairs)
    torch.testing.assert_close(margin_loss("kto", baseline=None)(pairs), expected)
