"""Margin losses: coefficients of a pair worked by hand, closed forms against autograd, and what a loss asks for."""

import pytest
import torch

from dynascope.losses import MARGIN_LOSSES, PreferencePairs, coefficients_by_autograd, margin_loss


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one_pair() -> PreferencePairs:
    """log π −12 and −10, reference −11 and −9.5 (a margin of −½), 6 and 4 tokens."""
    return PreferencePairs(tensor(-12), tensor(-10), tensor(-11), tensor(-9.5), tensor(6), tensor(4))


def many_pairs(count: int = 200) -> PreferencePairs:
    random = torch.rand(6, count, dtype=torch.float64)
    lengths = [torch.randint(1, 12, (count,)) for _ in range(2)]
    return PreferencePairs(*(-30 * random[:2]), *(-30 * random[2:4]), *lengths)


BY_HAND = [
    ("dpo", {"beta": 0.1}, 0.0512497, 0.0512497),
    ("hinge", {"beta": 0.1}, 0.1, 0.1),
    ("ipo", {"tau": 0.1}, 11.0, 11.0),
    ("ipo", {"tau": 0.1, "is_averaged": True}, 1.680556, 2.520833),
    ("simpo", {"beta": 2.0, "gamma": 1.0}, 1 / 6, 0.25),  # averages −2 and −2.5: 2 σ(2·½ − 1) = 1, over 6 and 4
    ("slic", {"delta": 1.0, "weight": 0.1}, 1.1, 1.0),
    ("cpo", {"beta": 0.1, "weight": 1.0}, 1.0549834, 0.0549834),
    ("rdpo", {"beta": 0.1, "alpha": 0.2}, 0.0413382, 0.0413382),
    ("dpop", {"beta": 0.1, "weight": 50.0}, 5.0675206, 0.0993631),
    ("rrhf", {"weight": 1.0}, 1.0, 0.0),
    ("sppo", {"beta": 0.1}, 12.0, 9.0),
    ("orpo", {"weight": 0.1}, 0.1736752, 0.0099029),
    ("kto", {"beta": 0.1, "baseline": 0.05}, 0.0249312, 0.0249811),
]


@pytest.mark.parametrize(("name", "settings", "pull", "push"), BY_HAND)
def test_coefficients_of_one_pair(name: str, settings: dict[str, float], pull: float, push: float) -> None:
    found = margin_loss(name, **settings).coefficients(one_pair())
    torch.testing.assert_close(torch.cat(found), tensor(pull, push), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", MARGIN_LOSSES)
def test_closed_form_is_the_derivative(name: str) -> None:
    pairs, loss = many_pairs(), margin_loss(name)
    torch.testing.assert_close(loss.coefficients(pairs), coefficients_by_autograd(loss, pairs), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "settings"), [("ipo", {"is_averaged": True}), ("cpo", {"is_averaged": True})])
def test_averaged_forms_are_derivatives_too(name: str, settings: dict[str, bool]) -> None:
    pairs, loss = many_pairs(), margin_loss(name, **settings)
    torch.testing.assert_close(loss.coefficients(pairs), coefficients_by_autograd(loss, pairs))


def test_averaged_ipo_and_dpo_and_hinge_and_sppo_are_those_of_trl() -> None:
    # TRL's formulas with beta = 0.1, written out for the pair of one_pair(): scores −1 and −½.
    torch.testing.assert_close(margin_loss("ipo", is_averaged=True)(one_pair()), tensor((-1 / 6 + 0.5 / 4 - 5) ** 2))
    torch.testing.assert_close(margin_loss("hinge")(one_pair()), tensor(1 + 0.1 * 0.5))
    torch.testing.assert_close(margin_loss("sppo")(one_pair()), tensor((-1 - 5) ** 2 + (-0.5 + 5) ** 2))


def test_ipo_pulls_back_once_the_margin_is_past_its_target() -> None:
    pairs = PreferencePairs(tensor(-1), tensor(-20), tensor(-11), tensor(-9.5))  # margin 20.5, target 5
    assert all(float(one) < 0 for one in margin_loss("ipo", tau=0.1).coefficients(pairs))


def test_simpo_pulls_the_longer_response_less() -> None:
    pairs = many_pairs()
    pull, push = margin_loss("simpo").coefficients(pairs)
    torch.testing.assert_close(pull / push, pairs.rejected_length / pairs.chosen_length.double())


def test_orpo_stays_finite_as_a_response_becomes_certain() -> None:
    pairs = PreferencePairs(tensor(0), tensor(-1e-300), chosen_length=tensor(2), rejected_length=tensor(3))
    loss = margin_loss("orpo")
    assert torch.isfinite(torch.cat([loss(pairs), *loss.coefficients(pairs)])).all()


def test_any_loss_of_ones_own_by_autograd() -> None:
    pull, push = coefficients_by_autograd(lambda pairs: pairs.rejected.square() - 3 * pairs.chosen, one_pair())
    torch.testing.assert_close(torch.cat([pull, push]), tensor(3, -20))


def test_a_loss_that_ignores_a_side_has_no_pull_on_it() -> None:
    pull, push = coefficients_by_autograd(lambda pairs: -pairs.chosen, one_pair())
    torch.testing.assert_close(torch.cat([pull, push]), tensor(1, 0))


@pytest.mark.parametrize(("name", "told"), [("dpo", "give reference_chosen"), ("simpo", "give chosen_length")])
def test_what_a_loss_needs_is_told(name: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        margin_loss(name)(PreferencePairs(tensor(-12), tensor(-10)))


@pytest.mark.parametrize("name", ["cpo", "slic"])
def test_some_losses_need_nothing_but_the_two_log_probabilities(name: str) -> None:
    assert torch.isfinite(margin_loss(name)(PreferencePairs(tensor(-12), tensor(-10)))).all()


def test_a_response_of_which_nothing_is_left_is_not_pulled() -> None:
    pairs = PreferencePairs(tensor(0), tensor(-10), chosen_length=tensor(0), rejected_length=tensor(4))
    loss = margin_loss("simpo", beta=2.0, gamma=1.0)
    # The other's mean is −2.5, so the logit is 2 · 2.5 − 1 = 4.
    torch.testing.assert_close(loss(pairs), -torch.nn.functional.logsigmoid(tensor(4)))
    torch.testing.assert_close(loss.coefficients(pairs), (tensor(0), torch.sigmoid(tensor(-4)) / 2))


def test_ktos_baseline_is_the_batchs_mean_over_other_prompts_and_never_negative() -> None:
    numbers = [tensor(-12, -8), tensor(-10, -9), tensor(-11, -9), tensor(-9.5, -9)]
    for ratios, baseline in ((tensor(0.3, -0.1, 0.4), 0.2), (tensor(-1.0, 0.5), 0.0)):
        ratios.requires_grad_()
        seen, told = PreferencePairs(*numbers, mismatched=ratios), margin_loss("kto", baseline=baseline)
        loss = margin_loss("kto", baseline=None)
        torch.testing.assert_close(loss(seen), told(seen))
        assert not loss(seen).requires_grad
        torch.testing.assert_close(loss.coefficients(seen), told.coefficients(seen))
        torch.testing.assert_close(coefficients_by_autograd(loss, seen), told.coefficients(seen))
    with pytest.raises(ValueError, match="other prompts"):
        margin_loss("kto", baseline=None)(PreferencePairs(*numbers))


def test_an_unknown_loss_is_told_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="simpo"):
        margin_loss("simp")
    with pytest.raises(ValueError, match="dpo has no setting betta; it has beta"):
        margin_loss("dpo", betta=0.2)


def test_fields_of_other_lengths_are_told() -> None:
    two, one = torch.zeros(2), torch.zeros(1)
    with pytest.raises(ValueError, match=r"reference_chosen has shape \(1,\), but chosen \(2,\)"):
        PreferencePairs(two, two, one, two)
