"""When a probe looks: within a budget of wall time, or every so many steps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@runtime_checkable
class Schedule(Protocol):
    """Decides before each step which probes look at it, and learns afterwards what they cost."""

    def due(self, step: int, now: float) -> frozenset[str]:
        """The probes that look at `step`; `now` is the clock's reading in seconds."""

    def spent(self, costs: Mapping[str, float], shared: float = 0.0) -> None:
        """Tell what the probes of one step cost, and what the watch took beside them, in seconds."""

    def drop(self, probe: str) -> None:
        """Forget a probe that was switched off."""


class Every:
    """Every probe looks at each `interval`-th step, beginning with the first: repeatable, and the same on all ranks.

    >>> Every(["gradients"], interval=50).due(step=100, now=0.0)
    frozenset({'gradients'})
    """

    def __init__(self, probes: Sequence[str], interval: int) -> None:
        if interval < 1:
            raise ValueError(f"every must be a whole number of steps, at least 1, not {interval}")
        self._probes = set(probes)
        self._interval = interval

    def due(self, step: int, now: float) -> frozenset[str]:
        """All probes on multiples of the interval, none in between."""
        return frozenset(self._probes) if step % self._interval == 0 else frozenset()

    def spent(self, costs: Mapping[str, float], shared: float = 0.0) -> None:
        """An interval does not depend on costs."""

    def drop(self, probe: str) -> None:
        """Forget a probe that was switched off."""
        self._probes.discard(probe)


@dataclass
class _Account:
    """One probe's share of the budget: what it has saved up (seconds) and what one look is expected to cost."""

    credit: float = 0.0
    cost: float | None = None


class Budget:
    """Keeps the time that watching takes within `fraction` of the wall time, shared equally among the probes.

    Each probe saves up its share of the passing time and looks once its savings cover what a look costs (the larger of
    its last cost and its running mean). Probes that look together share the price of one shadow pass or one parameter
    copy, so a look by one lets those with at least half of their own price ride along and go into debt. Between the
    two limits nothing changes: that band is the hysteresis which keeps probes from scattering over all steps.

    A probe's first look has no known price and is taken at once; all accounts bear it alike, so that a dear probe does not
    overdraw a short run. Savings are capped at two looks, so that a long pause does not end in a burst.

    The bound: time in the watch ≤ fraction × wall time + the price of one look of every probe.
    """

    ride_along = 0.5
    savings_cap = 2.0
    # What probes cannot be charged with: the writing thread, the looks for findings, caches that a look has emptied.
    kept_back = 0.3

    def __init__(self, probes: Sequence[str], fraction: float) -> None:
        if not 0.0 < fraction < 1.0 or math.isnan(fraction):
            raise ValueError(
                f"budget is the share of wall time that probes may take, above 0 and below 1, not {fraction:g}; "
                "to record only the loss, give no probes (--probes none)"
            )
        self.fraction = fraction
        self._accounts = {probe: _Account() for probe in probes}
        self._last_time: float | None = None

    def due(self, step: int, now: float) -> frozenset[str]:
        """The probes whose savings cover a look, with those that ride along."""
        if not self._accounts:
            return frozenset()
        # A clock that was set back brings no income; it must not bring debt either.
        elapsed = 0.0 if self._last_time is None else max(0.0, now - self._last_time)
        self._last_time = now
        income = (1 - self.kept_back) * self.fraction * elapsed / len(self._accounts)
        for account in self._accounts.values():
            account.credit = min(account.credit + income, self.savings_cap * (account.cost or math.inf))
        ready = [name for name, account in self._accounts.items() if self._share_saved(account) >= 1.0]
        if not ready:
            return frozenset()
        return frozenset(
            name for name, account in self._accounts.items() if self._share_saved(account) >= self.ride_along
        )

    def _share_saved(self, account: _Account) -> float:
        if account.cost is None:
            return 1.0  # the first look is free of savings: without it no price would ever be known
        return account.credit / account.cost if account.cost > 0 else math.inf

    def spent(self, costs: Mapping[str, float], shared: float = 0.0) -> None:
        """Charge each probe's account and update its expected price; all bear what is shared, and first looks."""
        for name, cost in costs.items():
            account = self._accounts.get(name)
            if account is None:
                continue
            if account.cost is None:
                account.cost = cost
                shared += cost
            else:
                account.credit -= cost
                account.cost = max(cost, 0.7 * account.cost + 0.3 * cost)
        for account in self._accounts.values():
            account.credit -= shared / len(self._accounts)

    def drop(self, probe: str) -> None:
        """Forget a probe that was switched off; the others share its part."""
        self._accounts.pop(probe, None)
