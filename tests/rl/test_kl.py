"""The table of estimators, as facts: what each is worth as a value and as a loss."""

import math

import pytest
import torch
from torch import Tensor

from dynascope.rl.batch import PolicyBatch
from dynascope.rl.kl import KLTerm, kl_estimate
from dynascope.rl.presets import grpo, simplerl_zoo

POLICY, REF = torch.tensor([0.7, 0.3], dtype=torch.float64), torch.tensor([0.4, 0.6], dtype=torch.float64)


def expected(kind: str) -> tuple[float, Tensor]:
    """Mean value, and mean gradient with respect to the logits, over tokens drawn from the policy."""
    logits = POLICY.log().requires_grad_()
    log_probs = logits.log_softmax(0)
    if kind == "full":
        value = kl_estimate(log_probs[:1], REF.log()[:1], "full", logits=logits[None], ref_logits=REF.log()[None])[0]
    else:
        value = (POLICY * kl_estimate(log_probs, REF.log(), kind)).sum()
    value.backward()
    assert logits.grad is not None
    return value.item(), logits.grad


@pytest.mark.parametrize(
    ("kind", "value", "slope"),
    [("k1", 0.1837869, 0.0), ("k2", 0.1816774, 0.2630802), ("k3", 0.1837869, 0.3), ("full", 0.1837869, 0.2630802)],
)
def test_the_table_of_values_and_gradients(kind: str, value: float, slope: float) -> None:
    found, gradient = expected(kind)
    assert found == pytest.approx(value, abs=1e-6)
    torch.testing.assert_close(gradient, torch.tensor([slope, -slope], dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs", "full"])
def test_of_an_older_policys_tokens_the_ratio_makes_the_gradient_right(kind: str) -> None:
    """Ten completions of one token, as often as a policy (0.6, 0.4) draws them: their mean is its expectation."""
    tokens = torch.tensor([0] * 6 + [1] * 4)
    logits = POLICY.log().requires_grad_()
    every = logits.log_softmax(0).expand(10, 1, 2)
    seen = PolicyBatch(
        mask=torch.ones(10, 1).bool(), rewards=torch.zeros(10), group_ids=torch.zeros(10).long(), advantage=torch.zeros(10),
        log_probs=every[:, 0].gather(1, tokens[:, None]), ref_log_probs=REF.log()[tokens][:, None],
        behaviour_log_probs=torch.tensor([0.6, 0.4], dtype=torch.float64).log()[tokens][:, None],
        logits=every, ref_logits=REF.log().expand(10, 1, 2),
    )  # fmt: skip
    loss, _ = grpo.having(kl=(KLTerm("ref", kind, 1.0, is_ratio_weighted=True),)).loss(seen)
    (found,) = torch.autograd.grad(loss, logits)
    distance = torch.autograd.grad((logits.softmax(0) - REF).abs().sum(), logits)[0]
    exact = distance if kind == "abs" else torch.tensor([0.2630802, -0.2630802], dtype=torch.float64)
    torch.testing.assert_close(found, exact, atol=1e-6, rtol=0)


def test_k3s_gradient_is_the_forward_divergences() -> None:
    logits = POLICY.log().requires_grad_()
    (REF * (REF.log() - logits.log_softmax(0))).sum().backward()
    torch.testing.assert_close(expected("k3")[1], logits.grad, atol=1e-6, rtol=0)


def test_abs_gradient_is_that_of_the_distance_of_distributions() -> None:
    logits = POLICY.log().requires_grad_()
    (logits.softmax(0) - REF).abs().sum().backward()
    torch.testing.assert_close(expected("abs")[1], logits.grad, atol=1e-6, rtol=0)


def test_monte_carlo_agrees_within_three_standard_errors() -> None:
    drawn = torch.multinomial(POLICY, 1_000_000, replacement=True)
    scores = torch.eye(2, dtype=torch.float64)[drawn] - POLICY  # d log π(drawn) / d logits
    for kind, exact in (("k1", 0.0), ("k2", 0.2630802), ("k3", 0.3)):
        own = POLICY.log()[drawn].requires_grad_()
        (weight,) = torch.autograd.grad(kl_estimate(own, REF.log()[drawn], kind).sum(), own)
        sample = weight * scores[:, 0]
        assert abs(float(sample.mean()) - exact) < 3 * float(sample.std()) / 1000


def test_k2_and_k3_are_never_negative_and_agree_near_zero() -> None:
    gap = torch.linspace(-1e-1, 1e-1, 101)
    k2, k3 = (kl_estimate(torch.zeros(101), gap, kind) for kind in ("k2", "k3"))
    assert float(k2.min()) >= 0
    assert float(k3.min()) >= 0
    assert ((k2 - k3).abs() <= gap.abs() ** 3 + 1e-7).all()
    assert kl_estimate(torch.zeros(1), torch.zeros(1), "k3").item() == 0


@pytest.mark.parametrize(
    ("kind", "weight"), [("k1", 1.0), ("k2", 2.0), ("k3", 1 - torch.tensor(-2.0).exp().item()), ("abs", 1.0)]
)
def test_beyond_the_clamp_the_gradient_is_that_at_the_clamp(kind: str, weight: float) -> None:
    log_probs = torch.tensor([0.0], requires_grad=True)
    estimate = kl_estimate(log_probs, torch.tensor([-20.0]), kind, clamp=2.0)
    estimate.backward()
    assert log_probs.grad is not None
    assert log_probs.grad.item() == pytest.approx(weight, abs=1e-5)
    inside = torch.tensor([-1.5])
    torch.testing.assert_close(
        kl_estimate(torch.zeros(1), inside, kind, clamp=2.0), kl_estimate(torch.zeros(1), inside, kind)
    )


@pytest.mark.parametrize(
    ("gap", "value", "slope"), [(1.0, 0.7182818, -1.7182818), (5.0, 10.0, 0.0), (200.0, 10.0, 0.0)]
)
def test_a_clamped_estimate_ends_with_its_gradient(gap: float, value: float, slope: float) -> None:
    """The recipe's: at R = 5 k3 is 142.4, which is held at 10."""
    (term,) = simplerl_zoo.kl
    assert (term.kind, term.clamp, term.clamp_value) == ("k3", None, 10.0)
    log_probs = torch.tensor([0.0], requires_grad=True)
    estimate = kl_estimate(log_probs, torch.tensor([gap]), term.kind, clamp_value=term.clamp_value)
    (gradient,) = torch.autograd.grad(estimate, log_probs)
    assert (estimate.item(), gradient.item()) == (pytest.approx(value), pytest.approx(slope))


def test_tokens_that_are_never_drawn_add_nothing_to_the_closed_form() -> None:
    logits = torch.tensor([[0.7, 0.3, 0.0]]).log().requires_grad_()
    for last in (0.0, 0.2):
        ref = torch.tensor([[0.4, 0.6 - last, last]]).log()
        value = kl_estimate(torch.zeros(1), torch.zeros(1), "full", logits=logits, ref_logits=ref)
        assert value.item() == pytest.approx(0.7 * math.log(0.7 / 0.4) + 0.3 * math.log(0.3 / (0.6 - last)), abs=1e-6)
        assert torch.autograd.grad(value, logits)[0].isfinite().all()
    other = torch.tensor([[1.0, 0.0, 0.0]]).log()
    assert kl_estimate(torch.zeros(1), torch.zeros(1), "full", logits=logits, ref_logits=other).isinf().all()


def test_a_reference_far_away_overflows_k3_but_not_with_a_clamp() -> None:
    assert kl_estimate(torch.zeros(1), torch.tensor([200.0]), "k3").isinf().all()
    assert kl_estimate(torch.zeros(1), torch.tensor([200.0]), "k3", clamp=10.0).isfinite().all()


def test_as_a_reward_it_carries_no_gradient() -> None:
    assert not kl_estimate(torch.zeros(1, requires_grad=True), torch.ones(1), "k1", as_reward=True).requires_grad


def test_what_is_missing_or_unknown_is_told() -> None:
    with pytest.raises(ValueError, match="needs logits"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "full")
    with pytest.raises(ValueError, match=r"logits have shape \(1, 5\) and ref_logits \(1, 6\): they must be of one"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "full", logits=torch.zeros(1, 5), ref_logits=torch.zeros(1, 6))
    with pytest.raises(ValueError, match="k1, k2, k3, abs or full"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")
    for settings in ({"kind": "k2", "top": 3}, {"kind": "full", "top": 0}):
        with pytest.raises(ValueError, match="for kind='full'"):
            kl_estimate(torch.zeros(1), torch.zeros(1), **settings)
    with pytest.raises(ValueError, match="are not kept"):
        KLTerm("behaviour", "full")
    with pytest.raises(ValueError, match="must be positive"):
        kl_estimate(torch.zeros(1), torch.zeros(1), clamp=0.0)
    with pytest.raises(ValueError, match="must be positive"):
        kl_estimate(torch.zeros(1), torch.zeros(1), clamp_value=-1.0)


def test_a_term_says_what_it_needs_and_follows_its_schedule() -> None:
    assert KLTerm("teacher", "k2").needs == {"teacher_log_probs"}
    assert KLTerm("ref", "full").needs == {"logits", "ref_logits"}
    term = KLTerm(coefficient=lambda step: max(5e-3 - 5e-5 * step, 1e-3))
    assert [term.weight(step) for step in (0, 40, 200)] == pytest.approx([5e-3, 3e-3, 1e-3])
