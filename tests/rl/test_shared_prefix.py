"""Log-probabilities and training with shared prompts: the same numbers as with repeated ones."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dynascope.nn.shared_prefix import PrefixTree
from dynascope.rl import shared_prefix
from dynascope.rl.prompt_groups import PromptGroups
from dynascope.rl.shared_prefix import (
    assert_equivalent,
    grouped_log_probs,
    kept_bytes,
    pays,
    prefix_backward,
    tree_log_probs,
)

pytest.importorskip("transformers")


@pytest.fixture
def groups() -> PromptGroups:
    """Prompts of 9 and 12 tokens, with three and two completions of 4, 1, 3, 0 and 5."""
    longest, widest = 12, 5
    prompt_mask = torch.stack([torch.arange(longest) >= longest - one for one in (9, 12)])
    mask = torch.stack([torch.arange(widest) < one for one in (4, 1, 3, 0, 5)])
    prompts, completions = torch.randint(1, 14, (2, longest)), torch.randint(1, 14, (5, widest))
    return PromptGroups(prompts * prompt_mask, prompt_mask, completions * mask, mask, torch.tensor([3, 2]))


def gradients(model: Any, log_probs: Tensor) -> list[Tensor]:
    weights = torch.linspace(1, -0.5, log_probs.numel()).view_as(log_probs)
    return list(torch.autograd.grad((weights * log_probs).sum(), list(model.parameters())))


@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
def test_shared_and_repeated_are_the_same(tiny_llama: Any, groups: PromptGroups, chunk: int | None) -> None:
    model = tiny_llama.double()
    settings: dict[str, Any] = {"temperature": 0.8, "entropy": True, "differentiable_entropy": True}
    mine, spread = grouped_log_probs(model, groups, share=True, chunk=chunk, **settings)
    other, others_spread = grouped_log_probs(model, groups, share=False, **settings)
    assert mine.shape == groups.mask.shape
    assert torch.allclose(mine, other.to(mine), atol=1e-6)
    assert not mine[~groups.mask].any()
    assert spread is not None
    assert others_spread is not None
    assert torch.allclose(spread, others_spread.to(spread), atol=1e-6)
    for one, two in zip(gradients(model, mine + spread), gradients(model, other + others_spread), strict=True):
        assert torch.allclose(one, two, atol=1e-5)
    plain = grouped_log_probs(model, groups, share=True, chunk=chunk, entropy=True)[1]
    assert plain is not None
    assert not plain.requires_grad


def test_groups_that_share_rows_are_the_same_again(tiny_llama: Any, groups: PromptGroups) -> None:
    model, packed = tiny_llama.double(), replace(groups, row_length=34)
    assert groups.layout.shape == (2, 17)
    assert packed.layout.shape == (1, 34)
    mine, other = (grouped_log_probs(model, one, share=True)[0] for one in (packed, groups))
    assert torch.allclose(mine, other, atol=1e-6)
    for one, two in zip(gradients(model, mine), gradients(model, other), strict=True):
        assert torch.allclose(one, two, atol=1e-6)
    assert max(assert_equivalent(model, packed).values()) < 1e-5


def test_sequences_that_branch_have_the_log_probabilities_of_each_alone(tiny_llama: Any) -> None:
    model = tiny_llama.double()
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 9], [3, 4, 0, 0], [7, 8, 6, 0]])
    tree = PrefixTree.of(ids, ids > 0)
    told = tree_log_probs(model, tree, temperature=0.7)
    assert not told[~tree.has_target].any()
    expected = torch.zeros_like(told)
    for row, tokens in enumerate(ids):
        own = tokens[tokens > 0]
        logits = model(input_ids=own[None]).logits[0, :-1] / 0.7
        expected[row, : len(own) - 1] = logits.log_softmax(-1).gather(1, own[1:, None])[:, 0]
    assert torch.allclose(told, expected, atol=1e-6)
    for one, two in zip(gradients(model, told), gradients(model, expected), strict=True):
        assert torch.allclose(one, two, atol=1e-5)


def test_what_is_kept_for_the_backward_pass_shrinks_with_the_tokens(tiny_llama: Any) -> None:
    groups = PromptGroups.of([[*range(1, 14)] * 3], [[3, 4]] * 6, 6)
    ratio = kept_bytes(tiny_llama, groups, share=True) / kept_bytes(tiny_llama, groups, share=False)
    assert ratio < 1.3 * (39 + 12) / (6 * 41)


def test_no_token_at_all_is_no_error_and_has_no_gradient(tiny_llama: Any) -> None:
    """As when TRL masks every completion that was cut off, and all were."""
    log_probs, entropies = grouped_log_probs(tiny_llama, PromptGroups.of([[1, 2], [3]], [[]] * 4, 2), entropy=True)
    assert entropies is not None
    assert not log_probs.any()
    assert not entropies.any()
    assert all(not one.any() for one in gradients(tiny_llama, log_probs))


def test_users_can_check_their_own_model(tiny_llama: Any, groups: PromptGroups) -> None:
    assert max(assert_equivalent(tiny_llama, groups).values()) < 1e-5
    with pytest.raises(AssertionError, match="rtol=1e-12"):
        assert_equivalent(tiny_llama, groups, rtol=1e-12)


def test_a_gradient_that_is_missing_on_one_side_counts_as_zero(
    tiny_llama: Any, groups: PromptGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a backend that lets no gradient reach the queries of one layer."""
    real = shared_prefix.grouped_log_probs
    weight = tiny_llama.model.layers[0].self_attn.q_proj.weight

    def cut(model: Any, groups: PromptGroups, *, share: bool, **settings: Any) -> Any:
        weight.requires_grad_(not share)
        told = real(model, groups, share=share, **settings)
        weight.requires_grad_(True)
        return told

    monkeypatch.setattr(shared_prefix, "grouped_log_probs", cut)
    with pytest.raises(AssertionError, match="gradients"):
        assert_equivalent(tiny_llama, groups)


def test_dropout_is_warned_of_in_parts_too(tiny_llama: Any, groups: PromptGroups) -> None:
    tiny_llama.model.norm = torch.nn.Sequential(tiny_llama.model.norm, torch.nn.Dropout(0.1))
    with pytest.warns(UserWarning, match="dropout of 0.1"):
        prefix_backward(tiny_llama.train(), groups, lambda part, rows: part.sum(), size=2)
    tiny_llama.model.norm[1].p = 0.0
    tiny_llama.model.layers[0].self_attn.attention_dropout = 0.2
    with pytest.warns(UserWarning, match="dropout of 0.2"):
        prefix_backward(tiny_llama, groups, lambda part, rows: part.sum(), size=2)


def test_sequences_that_begin_alike_become_groups() -> None:
    ids = torch.tensor([[5, 6, 7, 0], [1, 2, 3, 4], [5, 6, 8, 9]])
    groups, rows = PromptGroups.of_sequences(ids, ids > 0, min_shared=2)
    assert groups.group_sizes.tolist() == [1, 2]
    assert [one[seen].tolist() for one, seen in zip(groups.prompts, groups.prompt_mask, strict=True)] == [
        [1, 2, 3],
        [5, 6],
    ]
    told = [one[seen].tolist() for one, seen in zip(groups.completions, groups.mask, strict=True)]
    assert told == [[4], [7], [8, 9]]
    assert rows.tolist() == [1, 0, 2]


def test_little_sharing_does_not_pay() -> None:
    def batch(prompt: int, completion: int, group: int) -> PromptGroups:
        ones = torch.ones(group, max(prompt, completion)).bool()
        return PromptGroups(
            torch.ones(1, prompt).long(), ones[:1, :prompt], torch.ones(group, completion).long(),
            ones[:, :completion], torch.tensor([group]),
        )  # fmt: skip

    assert pays(batch(512, 32, 8).layout)
    assert not pays(batch(16, 128, 2).layout)
    assert not pays(batch(512, 32, 1).layout)
    assert not pays(batch(16, 8, 2).layout)  # a third of the tokens, which are few


def test_a_repeated_batch_is_grouped_in_any_order() -> None:
    prompts = torch.tensor([[0, 3, 4], [5, 6, 7], [0, 3, 4]])
    seen = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 1, 1]]).bool()
    completions = torch.tensor([[1, 2], [3, 4], [5, 6]])
    groups, rows = PromptGroups.of_repeated(prompts, seen, completions, torch.ones(3, 2).bool())
    assert groups.group_sizes.tolist() == [2, 1]
    assert groups.prompt_mask.tolist() == [[False, True, True], [True, True, True]]
    assert groups.completions.tolist() == completions[rows].tolist()
    assert rows.tolist() == [0, 2, 1]


@pytest.mark.parametrize("size", [1, 2, 8])
def test_training_in_parts_accumulates_the_same_gradient(tiny_llama: Any, groups: PromptGroups, size: int) -> None:
    model = tiny_llama.double()
    advantage = torch.tensor([1.0, -0.5, 0.3, 2.0, -1.0], dtype=torch.float64)
    log_probs, _ = grouped_log_probs(model, groups, share=False)
    whole = -(advantage[:, None] * log_probs).sum()
    whole.backward()
    expected = [one.grad.clone() for one in model.parameters()]
    model.zero_grad()
    told = prefix_backward(model, groups, lambda part, rows: -(advantage[rows, None] * part).sum(), size=size)
    assert float(told) == pytest.approx(float(whole.detach()), abs=1e-6)
    for one, other in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(one.grad, other, atol=1e-5)


def test_steps_with_both_end_at_the_same_weights(tiny_llama: Any, groups: PromptGroups) -> None:
    ends = []
    for share in (True, False):
        model = copy.deepcopy(tiny_llama).double()
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            log_probs, _ = grouped_log_probs(model, groups, share=share)
            (-log_probs.sum(1)).exp().log1p().sum().backward()
            optimizer.step()
        ends.append(torch.cat([one.detach().flatten() for one in model.parameters()]))
    assert torch.allclose(*ends, atol=1e-6)


def test_what_cannot_be_done_is_told(tiny_llama: Any, groups: PromptGroups) -> None:
    with pytest.raises(ValueError, match="at least one"):
        prefix_backward(tiny_llama, groups, lambda part, rows: part.sum(), size=0)
    enable = getattr(tiny_llama, "activation_checkpointing_enable", None) or tiny_llama.gradient_checkpointing_enable
    enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        prefix_backward(tiny_llama, groups, lambda part, rows: part.sum(), size=1)


def test_through_distributed_data_parallel(tiny_llama: Any, groups: PromptGroups, tmp_path: Path) -> None:
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    expected = gradients(tiny_llama, grouped_log_probs(tiny_llama, groups, share=False)[0])
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(tiny_llama)
        log_probs, _ = grouped_log_probs(wrapped, groups, share=True)
        (torch.linspace(1, -0.5, log_probs.numel()).view_as(log_probs) * log_probs).sum().backward()
    finally:
        distributed.destroy_process_group()
    for one, other in zip(tiny_llama.parameters(), expected, strict=True):
        assert torch.allclose(one.grad, other, atol=1e-5)
