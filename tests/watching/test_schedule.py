"""The budget is kept on a clock that the test holds in its hand."""

import pytest

from dynascope.watching.schedule import Budget, Every


def share_spent(budget: Budget, costs: dict[str, float], step_time: float, steps: int) -> tuple[float, list[set[str]]]:
    """Runs a training of `steps` steps on a fake clock; returns probes' share of wall time and who looked when."""
    now, spent, looks = 0.0, 0.0, []
    for step in range(steps):
        due = budget.due(step, now)
        looks.append(set(due))
        cost = {name: costs[name] for name in due}
        budget.spent(cost)
        spent += sum(cost.values())
        now += step_time + sum(cost.values())
    return spent / now, looks


@pytest.mark.parametrize("fraction", [0.005, 0.02, 0.2])
def test_share_of_wall_time_stays_within_the_budget(fraction: float) -> None:
    costs = {"cheap": 0.001, "usual": 0.01, "dear": 0.5}
    share, _ = share_spent(Budget(list(costs), fraction), costs, step_time=0.1, steps=20_000)
    # The stated bound: the fraction, and one look of every probe on top of it.
    assert share <= fraction + sum(costs.values()) / (20_000 * 0.1)


def test_the_budget_is_used_where_probes_can_use_it() -> None:
    costs = {"one": 0.01, "other": 0.02}
    share, _ = share_spent(Budget(list(costs), 0.02), costs, step_time=0.05, steps=20_000)
    assert share > 0.8 * (1 - Budget.kept_back) * 0.02


def test_a_dear_first_look_is_paid_off_within_a_short_run() -> None:
    costs = {f"cheap {number}": 0.001 for number in range(9)} | {"dear": 0.2}
    share, looks = share_spent(Budget(list(costs), 0.02), costs, step_time=0.1, steps=200)
    assert share <= 0.02
    assert sum(bool(look) for look in looks) > 2  # the cheap ones look again once it is paid


def test_every_probe_looks_at_the_first_step() -> None:
    _, looks = share_spent(Budget(["a", "b"], 0.02), {"a": 0.1, "b": 0.1}, step_time=0.1, steps=1)
    assert looks[0] == {"a", "b"}


def test_a_cheap_probe_looks_more_often_than_a_dear_one() -> None:
    costs = {"cheap": 0.001, "dear": 0.1}
    _, looks = share_spent(Budget(list(costs), 0.02), costs, step_time=0.05, steps=5_000)
    count = {name: sum(name in look for look in looks) for name in costs}
    assert count["cheap"] > 20 * count["dear"]
    assert count["dear"] >= 5


def test_probes_of_like_price_look_together() -> None:
    costs = {"a": 0.01, "b": 0.012, "c": 0.009}
    _, looks = share_spent(Budget(list(costs), 0.02), costs, step_time=0.05, steps=5_000)
    together = [look for look in looks if look]
    assert sum(len(look) == 3 for look in together) / len(together) > 0.5


def test_a_long_pause_does_not_end_in_a_burst() -> None:
    budget = Budget(["probe"], 0.02)
    budget.due(0, 0.0)
    budget.spent({"probe": 0.01})
    now, looks = 1e6, 0
    for step in range(1, 100):
        if budget.due(step, now):
            looks += 1
            budget.spent({"probe": 0.01})
        now += 0.001
    assert looks <= Budget.savings_cap


def test_a_clock_set_back_neither_pays_nor_costs() -> None:
    budget = Budget(["probe"], 0.5)
    budget.due(0, 100.0)
    budget.spent({"probe": 1.0})
    assert budget.due(1, 50.0) == frozenset()
    assert budget.due(2, 56.0) == {"probe"}


def test_a_probe_that_was_dropped_leaves_its_share_to_the_others() -> None:
    budget = Budget(["kept", "dropped"], 0.02)
    budget.drop("dropped")
    share, looks = share_spent(budget, {"kept": 0.01}, step_time=0.05, steps=10_000)
    assert set().union(*looks) == {"kept"}
    assert share > 0.8 * (1 - Budget.kept_back) * 0.02


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 2, float("nan")])
def test_impossible_budgets_are_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="above 0 and below 1"):
        Budget(["probe"], float(fraction))


def test_an_interval_looks_at_its_multiples_only() -> None:
    every = Every(["probe"], 50)
    assert [step for step in range(120) if every.due(step, 0.0)] == [0, 50, 100]


def test_an_interval_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Every(["probe"], 0)
