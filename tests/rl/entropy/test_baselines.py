"""What HAPO is compared with, each by hand."""

import pytest
import torch

from dynascope.rl.advantages import center
from dynascope.rl.batch import PolicyBatch
from dynascope.rl.entropy.baselines import (
    CertainTokens,
    CompletionEntropy,
    DualTokenClip,
    EntropyAdvantage,
    ForkingTokens,
    TopEntropy,
    uncertain_in_completion,
)
from dynascope.rl.entropy.signal import EntropySignal
from dynascope.rl.objective import LossView, PolicyObjective
from dynascope.rl.presets import archer, dapo, edge_grpo, entropy_advantage, grpo

ENTROPY = torch.tensor([[0.1, 0.4, 0.2, 9.0], [0.3, 0.3, 0.9, 0.6]])
MASK = torch.tensor([[True, True, True, False], [True, True, True, True]])


def batch() -> PolicyBatch:
    generator = torch.Generator().manual_seed(0)
    behaviour = -torch.rand(2, 4, generator=generator)
    return PolicyBatch(
        mask=MASK,
        rewards=torch.tensor([1.0, 0.0]),
        group_ids=torch.zeros(2).long(),
        behaviour_log_probs=behaviour,
        log_probs=behaviour + 0.3 * torch.randn(2, 4, generator=generator),
        ref_log_probs=behaviour + 0.3 * torch.randn(2, 4, generator=generator),
        entropy=ENTROPY,
    )


def gradient(objective: PolicyObjective, seen: PolicyBatch) -> torch.Tensor:
    log_probs = seen.log_probs.clone().requires_grad_()
    loss, _ = objective.loss(seen.having(advantage=objective.advantages(seen), log_probs=log_probs))
    return torch.autograd.grad(loss, log_probs)[0]


def test_forking_tokens_learn_from_the_uncertain_alone() -> None:
    seen = batch()
    found = gradient(dapo.having(adjust=(ForkingTokens(EntropySignal()),)), seen)
    is_uncertain = torch.tensor([[False, False, False, False], [False, False, True, False]])  # 0.6 is the pivot
    assert found[~is_uncertain].abs().max() == 0
    assert torch.equal(found[is_uncertain], gradient(dapo, seen)[is_uncertain])


def test_top_entropy_keeps_its_share_of_a_rollout() -> None:
    kept = TopEntropy(2 / 7)(torch.ones(2), batch()) > 0
    assert kept.tolist() == [[False] * 4, [False, False, True, True]]


def test_top_entropy_keeps_all_or_one_and_nothing_of_an_empty_rollout() -> None:
    assert torch.equal(TopEntropy(1.0)(torch.ones(2), batch()) > 0, MASK)
    assert (TopEntropy(0.01)(torch.ones(2), batch()) > 0).nonzero().tolist() == [[1, 2]]
    assert not TopEntropy()(torch.ones(2), batch().having(mask=torch.zeros_like(MASK))).any()


def test_top_entropy_of_more_tokens_than_quantile_takes() -> None:
    entropy = torch.arange(2**24 + 2, dtype=torch.float32).view(2, -1)
    seen = batch().having(
        entropy=entropy, mask=torch.ones_like(entropy).bool(), behaviour_log_probs=None, log_probs=None,
        ref_log_probs=None,
    )  # fmt: skip
    kept = TopEntropy(0.25)(torch.ones(2), seen) > 0
    assert kept.float().mean().item() == pytest.approx(0.25, abs=1e-6)


def test_entropy_in_the_advantage_never_turns_it() -> None:
    seen = batch()
    view = LossView(seen, torch.ones(2, 4), torch.zeros(2, 4))
    found = EntropyAdvantage()(torch.tensor([[1.0], [-0.2]]), view)
    torch.testing.assert_close(found[0, :3], torch.tensor([1.04, 1.16, 1.08]))
    torch.testing.assert_close(found[1], torch.tensor([-0.1, -0.1, -0.1, -0.1]))  # half of 0.2 at most
    off = EntropyAdvantage(scale=0.0)(torch.tensor([[1.0], [-0.2]]), view)
    torch.testing.assert_close(off, torch.tensor([[1.0], [-0.2]]).expand(2, 4))
    assert entropy_advantage.having(adjust=()) == grpo


def test_tokens_are_uncertain_within_their_own_completion() -> None:
    assert uncertain_in_completion(ENTROPY, MASK, 0.5).tolist() == [
        [False, True, False, False],
        [False, False, True, False],
    ]
    assert not uncertain_in_completion(torch.ones(1, 3), torch.ones(1, 3).bool()).any()
    assert not uncertain_in_completion(torch.ones(1, 3), torch.zeros(1, 3).bool()).any()


def test_archer_by_hand() -> None:
    seen = batch()
    low, high = DualTokenClip(rho=0.5)(LossView(seen, torch.ones(2, 4), torch.zeros(2, 4)))
    assert torch.equal(low, high)
    torch.testing.assert_close(low[1], torch.tensor([0.2, 0.2, 0.5, 0.2]))
    kept = CertainTokens(rho=0.5)(seen)
    assert kept.tolist() == [[True, False, True, False], [True, True, False, True]]
    # The start model pulls certain tokens alone.
    pulled = (gradient(archer, seen) - gradient(archer.having(kl=()), seen)) != 0
    assert torch.equal(pulled, CertainTokens()(seen))
    with pytest.raises(ValueError, match="needs entropy"):
        archer.loss(seen.having(entropy=None, advantage=torch.ones(2)))


def test_sure_completions_weigh_more() -> None:
    seen = batch()
    mean = torch.tensor([0.7 / 3, 2.1 / 4])
    expected = torch.tensor([1.0, -1.0]) / (mean / mean.mean())
    torch.testing.assert_close(CompletionEntropy()(torch.tensor([1.0, -1.0]), seen), expected)
    by_token = CompletionEntropy()(torch.tensor([[1.0], [-1.0]]).expand(2, 4), seen)
    torch.testing.assert_close(by_token, expected[:, None].expand(2, 4))
    sure = seen.having(entropy=torch.zeros(2, 4))
    assert CompletionEntropy()(torch.tensor([1.0, -1.0]), sure).tolist() == [1.0, -1.0]
    one = seen.having(entropy=torch.tensor([[0.0], [1.0]]).expand(2, 4))
    assert CompletionEntropy(0.1)(torch.ones(2), one).tolist() == pytest.approx([10.0, 0.5])
    assert edge_grpo.having(post=(center,)) == grpo.having(post=(center,))


def test_impossible_settings_are_told() -> None:
    with pytest.raises(ValueError, match="must be above 1"):
        EntropyAdvantage(most=1.0)
    with pytest.raises(ValueError, match="floor=0"):
        CompletionEntropy(floor=0.0)
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"share={share} must be"):
            TopEntropy(share)
    for made in (DualTokenClip, CertainTokens):
        with pytest.raises(ValueError, match=r"rho=1.5 must lie"):
            made(rho=1.5)
    with pytest.raises(ValueError, match=r"rho=-0.1 must lie"):
        uncertain_in_completion(ENTROPY, MASK, -0.1)
