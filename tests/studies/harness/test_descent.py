"""The shared training loop, and where it is looked at."""

import pytest
import torch

from dynascope.studies.harness import descend, log_steps


def test_log_steps_are_sorted_once_each_with_both_ends() -> None:
    assert log_steps(100, per_decade=2) == [0, 1, 3, 10, 32, 100]
    assert log_steps(1) == [0, 1]
    for num_steps in (7, 1000, 12345):
        steps = log_steps(num_steps)
        assert steps == sorted(set(steps))
        assert steps[0] == 0
        assert steps[-1] == num_steps


@pytest.mark.parametrize("bad", [{"num_steps": 0}, {"num_steps": 10, "per_decade": 0}])
def test_impossible_looks_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        log_steps(**bad)


def test_descend_is_plain_gradient_descent_seen_before_each_step() -> None:
    weight = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    seen: dict[int, float] = {}
    descend(
        torch.optim.SGD([weight], lr=0.1),
        lambda: weight**2 / 2,
        3,
        looks=(0, 2, 3),
        look=lambda step: seen.update({step: weight.item()}),
    )
    assert seen == pytest.approx({0: 1.0, 2: 0.9**2, 3: 0.9**3})


def test_several_optimizers_step_from_the_same_gradients() -> None:
    first, second = (torch.nn.Parameter(torch.tensor(value)) for value in (1.0, 2.0))
    optimizers = [torch.optim.SGD([first], lr=0.1), torch.optim.SGD([second], lr=0.01)]
    descend(optimizers, lambda: first * second, 1)
    assert (first.item(), second.item()) == pytest.approx((1 - 0.1 * 2, 2 - 0.01 * 1))


def test_gradients_are_clipped_to_one_norm_all_together() -> None:
    for max_norm, scale in ((1.0, 5**-0.5), (9.0, 1.0)):
        first, second = (torch.nn.Parameter(torch.tensor(value)) for value in (1.0, 2.0))
        optimizers = [torch.optim.SGD([first], lr=0.1), torch.optim.SGD([second], lr=0.01)]
        descend(optimizers, lambda: first * second, 1, max_norm=max_norm)  # noqa: B023
        assert (first.item(), second.item()) == pytest.approx((1 - 0.2 * scale, 2 - 0.01 * scale), rel=1e-5)
