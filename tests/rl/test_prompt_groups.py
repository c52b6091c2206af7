"""Completions by the prompts that they share: from lists, from pairs, and back to the order of a batch."""

from typing import Any

import pytest
import torch

from dynascope.probes.entanglement import PreferenceBatch, response_log_probs
from dynascope.rl.prompt_groups import PromptGroups
from dynascope.rl.shared_prefix import grouped_log_probs

pytest.importorskip("transformers")


def test_lists_of_tokens_by_hand() -> None:
    groups = PromptGroups.of([[1, 2, 3], [4]], [[5, 6], [], [7]], [2, 1], row_length=7)
    assert groups.prompts.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert groups.prompt_mask.tolist() == [[True] * 3, [False, False, True]]
    assert groups.completions.tolist() == [[5, 6], [0, 0], [7, 0]]
    assert groups.mask.tolist() == [[True, True], [False, False], [True, False]]
    assert groups.layout.pack(groups.prompts, groups.completions).tolist() == [[1, 2, 3, 5, 6, 4, 7]]
    assert PromptGroups.of([[1], [2]], [[3]] * 4, 2).group_sizes.tolist() == [2, 2]


def test_preference_pairs_share_their_prompt(tiny_llama: Any) -> None:
    model = tiny_llama.double()
    tokens = torch.tensor([[0, 3, 4, 5, 6], [7, 8, 2, 0, 0], [0, 3, 4, 9, 9], [7, 8, 5, 6, 1]])
    attended = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    mask = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 1, 1, 1]])
    groups = PromptGroups.of_pairs(tokens, mask, attended)
    assert groups.prompts.tolist() == [[3, 4], [7, 8]]
    assert groups.completions.tolist() == [[5, 6, 0], [9, 9, 0], [2, 0, 0], [5, 6, 1]]
    log_probs, _ = grouped_log_probs(model, groups, share=True)
    chosen, rejected = log_probs.sum(1).view(-1, 2).unbind(1)
    expected = response_log_probs(model, PreferenceBatch(tokens, mask, attended))
    assert torch.allclose(torch.cat([chosen, rejected]), expected.to(chosen), atol=1e-5)
    with pytest.raises(ValueError, match="pair 1 has two prompts"):
        PromptGroups.of_pairs(tokens.index_put((torch.tensor(3), torch.tensor(0)), torch.tensor(6)), mask, attended)
