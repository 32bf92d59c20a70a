"""The arithmetic of admission: slots, windows and pace. Time is an argument; nothing locks, sleeps or wakes.

Two published algorithms stand behind it. A *window* is the sliding log: the admissions of the last period, so
that no period, wherever it starts, exceeds the amount. The *pace* is the generic cell rate algorithm
(GCRA; ITU-T I.371, Annex A): one theoretical arrival time, moved on by every admission.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from asyncify.arguments import check_count, check_positive, shown

__all__ = ["CATCH_UP", "PERIODS", "Limits", "Meter", "Rate"]

PERIODS = {"per_second": 1.0, "per_minute": 60.0, "per_hour": 3600.0}
"""The argument names of the rates, with their periods in seconds, the shortest first."""

_UNITS = {period: name.removeprefix("per_") for name, period in PERIODS.items()}

CATCH_UP = 0.02
"""Seconds of lateness that a late wake-up may make up for; without it 50 per second were measured to reach 47."""

_SLACK = 1e-12
"""The share of an amount that counts as a rounding error."""

_GRAINS = 1000
"""Parts of a period that a window tells apart: this bounds its memory, and costs at most 0.1% of the rate."""


@dataclass(frozen=True, slots=True)
class Rate:
    """At most `amount` of cost in any window of `period` seconds."""

    amount: float
    period: float

    def __str__(self) -> str:
        return f"{shown(self.amount)} per {_UNITS[self.period]}"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a meter holds calls to: checked, with the rates sorted by period."""

    limit: int | None
    rates: tuple[Rate, ...]
    burst: int

    @classmethod
    def of(cls, *, limit: int | None, burst: int | None, **amounts: float | None) -> Limits:
        """Check the arguments of a limiter, whose rates are named `per_second` and the like.

        Raises:
            TypeError, ValueError: they limit nothing or can't be meant.
        """
        if limit is not None:
            limit = check_count("limit", limit, "limit=10")
        rates = tuple(
            Rate(check_positive(name, amount, f"{name}=50"), period)
            for name, period in PERIODS.items()
            if (amount := amounts[name]) is not None
        )
        if limit is None and not rates:
            raise TypeError("nothing to limit: give a limit or a rate, as in limit=10, per_second=50")
        return cls(limit, rates, 1 if burst is None else _checked_burst(burst, rates))

    @property
    def amounts(self) -> dict[str, float | None]:
        """The amounts by the names of their arguments; None for a rate that is not set."""
        by_period = {rate.period: rate.amount for rate in self.rates}
        return {name: by_period.get(period) for name, period in PERIODS.items()}

    @property
    def largest_cost(self) -> float:
        """The largest cost that can ever be admitted."""
        return min((max(rate.amount, 1) for rate in self.rates), default=math.inf)

    def check_affordable(self, cost: float, what: str) -> None:
        """Raise a ValueError for a cost that can never be admitted."""
        if cost > self.largest_cost:
            raise self.too_dear(cost, what)

    def too_dear(self, cost: float, what: str) -> ValueError:
        """Return the error for such a cost."""
        tightest = min(self.rates, key=lambda rate: rate.amount)
        return ValueError(f"{what}: a cost of {shown(cost)} can never be admitted, as the limit is {tightest}")


def _checked_burst(burst: object, rates: tuple[Rate, ...]) -> int:
    count = check_count("burst", burst, "burst=5")
    if not rates:
        raise ValueError(f"burst={count}: needs a rate, as in per_second=50, burst={count}")
    if count > max(rates[0].amount, 1):
        raise ValueError(f"burst={count}: must be no more than the rate, which is {rates[0]}")
    return count


class _Window:
    """The sliding log of one rate.

    Admissions within one grain share an entry. The entry leaves the window with the last of them, so that none ever
    leaves early. Half a call per period counts as one call in two periods, or none could ever start.
    """

    __slots__ = ("amount", "grain", "log", "open", "open_until", "period", "rate", "used")

    open: list[float]
    """The last entry, which admissions before `open_until` share."""

    def __init__(self, rate: Rate) -> None:
        self.rate = rate
        self.amount = max(rate.amount, 1)
        self.period = rate.period / min(rate.amount, 1)
        self.grain = self.period / _GRAINS
        self.log: list[list[float]] = []  # [time of the last admission, cost, time of the first]; some 1,000 at most
        self.used: float = 0
        self.open_until = -math.inf

    def free_at(self, now: float, cost: float) -> float:
        """Return the earliest time, not before `now`, at which `cost` more fits in."""
        self.expire(now)
        # Sums of fractions carry rounding errors; without the slack, one of them would cost a whole entry's wait.
        excess = self.used + cost - self.amount * (1 + _SLACK)
        if excess <= 0:
            return now
        for last, spent, _ in self.log:
            excess -= spent
            if excess <= 0:
                return last + self.period
        # Rounding may leave a remainder; when the log is empty, none is left.
        return self.log[-1][0] + self.period if self.log and cost <= self.amount else math.inf

    def expire(self, now: float) -> None:
        """Forget what is older than the period."""
        log, old, freed = self.log, 0, 0.0
        for last, spent, _ in log:
            if last + self.period > now:
                break
            old += 1
            freed += spent
        del log[:old]  # first: an interrupt in between leaves too little room, not too much
        self.used -= freed
        if not log:
            self.used = 0  # drops rounding errors
            self.open_until = -math.inf

    def add(self, now: float, cost: float) -> None:
        """Log an admission."""
        log = self.log
        if now < self.open_until:
            entry = self.open
            entry[0] = now
            entry[1] += cost
        else:
            if log and log[0][0] + self.period <= now:
                self.expire(now)  # may set `used` to 0, so add only afterwards
            self.open = [now, cost, now]
            self.open_until = now + self.grain
            log.append(self.open)
        self.used += cost

    def correct(self, at: float, change: float) -> None:
        """Change the cost of an admission made at `at`, if it is still in the window."""
        for entry in reversed(self.log):
            if entry[2] <= at <= entry[0]:
                entry[1] += change
                self.used += change
                return


class Meter:
    """How much may run: the calls in flight, and the cost over time.

    Every rate is a window. The one with the shortest period also sets the pace: calls start `period / amount`
    seconds apart for each unit of cost, up to `burst` of them back to back. Idle time earns no more than the
    burst. Time lost by a late wake-up is made up for, within `CATCH_UP` seconds.
    """

    __slots__ = (
        "_behind",
        "_interval",
        "_last",
        "_last_cost",
        "_longer",
        "_next",
        "_only_window",
        "_open_since",
        "_tolerance",
        "_was_full",
        "_windows",
        "inside",
        "largest_cost",
        "limits",
        "paused_until",
        "slots",
        "slots_alone",
    )

    def __init__(self, limits: Limits) -> None:
        self.inside: set[Any] = set()
        self.paused_until: float = -math.inf
        self._windows: tuple[_Window, ...] = ()
        self._next = -math.inf  # GCRA's theoretical arrival time
        self._last = -math.inf  # when the last call was admitted
        self._last_cost: float = 0
        self._behind = 0.0  # seconds by which the last admission was late
        self._interval = 0.0  # seconds between calls of cost 1
        self._open_since = -math.inf  # since when only the pace has delayed calls
        self._was_full = False  # when a slot was last requested
        self.configure(limits)

    def configure(self, limits: Limits) -> None:
        """Set the limits; what was admitted before counts against the new ones."""
        logs = {window.rate.period: window for window in self._windows}
        self.limits: Limits = limits
        self.largest_cost: float = limits.largest_cost
        self.slots: float = math.inf if limits.limit is None else limits.limit
        self._windows = tuple(_Window(rate) for rate in limits.rates)
        for window in self._windows:
            if (old := logs.get(window.rate.period)) is not None:
                window.log, window.used = old.log, old.used
        self.slots_alone: float = -1 if self._windows else self.slots  # the slots, if there are no rates
        self._longer = self._windows[1:]
        self._only_window = self._windows[0] if len(self._windows) == 1 else None
        interval = limits.rates[0].period / limits.rates[0].amount if limits.rates else 0.0
        if self._interval:  # the next call comes at the new pace, not at the old one
            as_charged = self._next == self._last + self._last_cost * self._interval
            # The quotient has a rounding error, which a longer interval would enlarge.
            units = self._last_cost if as_charged else (self._next - self._last) / self._interval
            self._next = self._last + units * interval
        self._interval = interval
        self._tolerance = (limits.burst - 1) * self._interval

    def is_idle(self, now: float) -> bool:
        """Whether no call runs and no earlier one still counts: a new meter would decide the same."""
        longest = max((window.period for window in self._windows), default=0.0)
        return not self.inside and now >= max(self._last + longest, self._next, self.paused_until)

    @property
    def is_full(self) -> bool:
        """Whether no slot is free."""
        return len(self.inside) >= self.slots

    def admit(self, now: float, cost: float, since: float, call: object | None = None) -> float:
        """Admit a call that has waited since `since`, or say when to ask again; a `call` of None takes no slot.

        Returns 0.0 if the call is admitted, else the time at which to ask again: infinity if a slot has to be
        given back first.
        """
        inside = self.inside
        if call is not None:
            if len(inside) >= self.slots:
                self._was_full = True
                return math.inf
            if self._was_full:
                self._was_full = False
                if now > self._open_since:
                    self._open_since = now
        if now < self.paused_until:
            return self.paused_until
        window = self._only_window
        if (
            window is not None
            and self._next <= now == since
            and not self._behind
            and window.used + cost <= window.amount
        ):  # it is on time and nobody is before it: a fast path of `_charge`
            if now < window.open_until:  # `add()`, without a call
                entry = window.open
                entry[0] = now
                entry[1] += cost
                window.used += cost
            else:
                window.add(now, cost)
            self._next = now + cost * self._interval
            self._last = now
            self._last_cost = cost
        elif self._windows and (at := self._charge(now, cost, since)) > now:
            return at
        if call is not None:
            inside.add(call)
        return 0.0

    def release(self, call: object) -> bool:
        """Give a call's slot back, and tell whether it had one: in a single step, so that it needs no lock."""
        try:
            self.inside.remove(call)
        except KeyError:
            return False
        return True

    def _charge(self, now: float, cost: float, since: float) -> float:
        """Return the time at which all rates have room for `cost`; if that is now, they are charged."""
        # Comparisons instead of max(), which would take as long as all the rest: this runs for every call.
        window = self._windows[0]
        at = now if window.used + cost <= window.amount else window.free_at(now, cost)
        opens = self._longer_free_at(now, cost) if self._longer else now
        ready = self._open_since if self._open_since > since else since
        if ready > opens:  # a longer window opens early, by a correction or by new limits
            ready = self._open_since = opens
        if self._behind:
            if ready - self._last > CATCH_UP:
                self._behind = 0.0
            ready -= self._behind
        base = self._next if self._next > ready else ready
        if base < now - CATCH_UP:
            base = now - CATCH_UP
        due = base - self._tolerance
        if due > now or at > now or opens > now:
            at = at if at > opens else opens
            return due if due > at else at
        window.add(now, cost)
        for longer in self._longer:
            longer.add(now, cost)
        self._behind = now - (due if due > ready else ready)
        self._next = base + cost * self._interval
        self._last = now
        self._last_cost = cost
        return now

    def _longer_free_at(self, now: float, cost: float) -> float:
        """Return when the windows that set no pace have room, and note it: waiting for them does not count as late."""
        at = max(window.free_at(now, cost) for window in self._longer)
        if at > now:
            self._open_since = max(self._open_since, at)
        return at

    def pause(self, until: float) -> None:
        """Admit nobody before `until`; a shorter pause does not end a longer one."""
        self.paused_until = max(self.paused_until, until)
        self._open_since = max(self._open_since, self.paused_until)

    def correct(self, at: float, change: float) -> None:
        """Change the cost of the call admitted at `at`; if it never started, `change` is minus its cost."""
        for window in self._windows:
            window.correct(at, change)
        corrected = self._next + change * self._interval
        if at < self._last and corrected < self._next:  # what a later call has already waited for is not given back
            corrected = max(corrected, min(self._next, self._last + self._last_cost * self._interval))
        self._next = corrected
