"""The entropy signal: its pivot, its ends, and what it does not depend on."""

import pytest
import torch

from dynascope.rl.batch import PolicyBatch
from dynascope.rl.entropy.signal import EntropySignal, EntropyStats
from dynascope.rl.objective import LossView
from dynascope.rl.token_entropy import token_entropy

BY_HAND = torch.tensor([[0.01, 0.1, 0.5, 1.0, 2.0]])


def view(entropy: torch.Tensor, mask: torch.Tensor | None = None) -> LossView:
    mask = torch.ones_like(entropy).bool() if mask is None else mask
    batch = PolicyBatch(
        mask=mask, rewards=torch.zeros(len(mask)), group_ids=torch.zeros(len(mask), dtype=torch.long), entropy=entropy
    )
    return LossView(batch, torch.ones_like(entropy), torch.zeros_like(entropy))


def test_by_hand() -> None:
    stats = EntropyStats.of(BY_HAND)
    assert stats.pivot.item() == 0
    expected = torch.tensor([[-1, -0.5, -0.150515, 0, 1]])
    torch.testing.assert_close(stats.signal(BY_HAND), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(stats.signal(BY_HAND, is_signed=False), expected.abs(), atol=1e-5, rtol=0)
    torch.testing.assert_close(EntropySignal()(view(BY_HAND)), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(stats.spread, BY_HAND.log().std(correction=0))


def test_ends_monotone_and_without_a_unit() -> None:
    entropy = torch.rand(4, 50, generator=torch.Generator().manual_seed(0)) + 0.01
    signal = EntropySignal()(view(entropy))
    assert signal.min().item() == pytest.approx(-1)
    assert signal.max().item() == pytest.approx(1)
    assert (signal.flatten()[entropy.flatten().argsort()].diff() >= 0).all()
    assert (signal > 0).float().mean().item() == pytest.approx(0.2, abs=0.01)
    torch.testing.assert_close(EntropySignal()(view(7 * entropy)), signal, atol=1e-5, rtol=0)


def test_padding_and_the_order_of_rows_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    entropy = torch.rand(6, 8, generator=generator)
    mask = torch.arange(8) < torch.randint(1, 9, (6, 1), generator=generator)
    signal = EntropySignal()(view(entropy, mask))
    assert signal[~mask].abs().max() == 0
    padded = view(torch.cat([entropy, torch.full((6, 3), 9.0)], 1), torch.cat([mask, torch.zeros(6, 3).bool()], 1))
    assert torch.equal(EntropySignal()(padded)[:, :8], signal)
    order = torch.randperm(6, generator=generator)
    assert torch.equal(EntropySignal()(view(entropy[order], mask[order])), signal[order])


@pytest.mark.parametrize(
    ("entropy", "mask"),
    [
        (torch.full((2, 3), 0.7), None),
        (torch.rand(2, 3), torch.tensor([[True, False, False], [False] * 3])),
        (torch.rand(2, 3), torch.zeros(2, 3).bool()),
        (torch.zeros(2, 3), None),
    ],
    ids=["equal", "one token", "no token", "no entropy"],
)
def test_without_width_the_signal_is_zero(entropy: torch.Tensor, mask: torch.Tensor | None) -> None:
    assert EntropySignal()(view(entropy, mask)).abs().max() == 0


def test_statistics_of_no_token_are_zero() -> None:
    none = EntropyStats.of(torch.zeros(0))
    assert not torch.stack([none.pivot, none.spread, none.above, none.below]).any()
    assert none.signal(torch.tensor([0.5])).tolist() == [0.0]


def test_a_token_without_entropy_sets_the_scale_unless_extremes_are_quantiles() -> None:
    entropy = torch.cat([torch.zeros(1), torch.linspace(0.1, 1, 199)])[None]
    plain, robust = EntropySignal()(view(entropy)), EntropySignal(robust=0.01)(view(entropy))
    assert plain[0, 0] == -1
    assert plain[0, 2] > -0.2  # a floor of 1e-8 stretches the lower side over eighteen nats
    assert robust[0, 0] == -1
    assert robust[0, 2] < -0.9
    assert robust.abs().max() <= 1


def test_statistics_of_a_rollout_do_not_depend_on_minibatches() -> None:
    entropy = torch.rand(6, 8, generator=torch.Generator().manual_seed(0))
    signal = EntropySignal(scope="rollout")
    with pytest.raises(ValueError, match="seen no rollout"):
        signal(view(entropy))
    whole = view(entropy).batch
    advantage = torch.randn(6)
    assert torch.equal(signal.post[0](advantage, whole), advantage)
    parts = torch.cat([signal(view(entropy[:2])), signal(view(entropy[2:]))])
    torch.testing.assert_close(parts, EntropySignal()(view(entropy)))
    assert not torch.equal(torch.cat([EntropySignal()(view(part)) for part in (entropy[:2], entropy[2:])]), parts)
    assert EntropySignal().post == ()


def test_no_gradient_goes_through() -> None:
    entropy = torch.rand(2, 3, requires_grad=True)
    assert not EntropySignal()(view(entropy)).requires_grad
    assert not token_entropy(torch.randn(1, 2, 3, requires_grad=True)).requires_grad


def test_token_entropy_is_that_of_the_distribution_in_any_chunks() -> None:
    logits = 30 * torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(0))
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(token_entropy(logits), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(token_entropy(logits, chunk=4), expected, atol=1e-5, rtol=1e-4)
    mask = torch.arange(5) < torch.tensor([[5], [2], [0]])
    torch.testing.assert_close(token_entropy(logits, mask, chunk=4), expected * mask, atol=1e-5, rtol=1e-4)
    ruled_out = torch.tensor([[[0.0, 0.0, -torch.inf]]])
    assert token_entropy(ruled_out).item() == pytest.approx(0.6931, abs=1e-4)
    assert token_entropy(logits.bfloat16()).dtype == torch.float32


def test_bad_settings_are_told() -> None:
    with pytest.raises(ValueError, match="scope is"):
        EntropySignal(scope="epoch")
    for settings in ({"rho": 1.5}, {"robust": 0.5}, {"eps": 0.0}):
        with pytest.raises(ValueError, match="must lie"):
            EntropyStats.of(BY_HAND, **settings)
    with pytest.raises(ValueError, match="chunk=0"):
        token_entropy(torch.zeros(1, 1, 2), chunk=0)


def test_all_ranks_share_statistics(of_two_processes: list[dict[str, torch.Tensor]]) -> None:
    found = torch.cat([one["signal"] for one in of_two_processes], 1)
    torch.testing.assert_close(found, EntropySignal()(view(torch.arange(1.0, 11.0)[None])))
