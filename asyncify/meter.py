"""The arithmetic of admission: slots, windows and pace. Time is an argument; nothing locks, sleeps or wakes.

Two published algorithms stand behind it. A *window* is the sliding log: the admissions of the last period, so
that no period, wherever it starts, holds more than the amount. The *pace* is the generic cell rate algorithm
(GCRA; ITU-T I.371, Annex A): one theoretical arrival time, moved on by every admission.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

__all__ = ["CATCH_UP", "Meter", "Rate"]

CATCH_UP = 0.02
"""Seconds that a late wake may make up for: without it 50 per second were measured to reach only 47."""

_GRAINS = 1000
"""Parts of a period that a window tells apart: bounds its memory, and costs at most 0.1% of the rate."""


@dataclass(frozen=True, slots=True)
class Rate:
    """At most `amount` of cost in any window of `period` seconds."""

    amount: float
    period: float

    def __str__(self) -> str:
        unit = {1.0: "second", 60.0: "minute", 3600.0: "hour"}.get(self.period, f"{self.period:g} s")
        return f"{self.amount:g} per {unit}"


class _Window:
    """The sliding log of one rate.

    Admissions that fall into one grain share an entry, which leaves the window with the last of them, so that
    none ever leaves early.
    """

    __slots__ = ("amount", "grain", "log", "period", "used")

    def __init__(self, rate: Rate) -> None:
        self.amount = rate.amount
        self.period = rate.period
        self.grain = rate.period / _GRAINS
        self.log: deque[list[float]] = deque()  # [time of the last admission, cost, time of the first]
        self.used: float = 0

    def free_at(self, now: float, cost: float) -> float:
        """Return the earliest time, not before `now`, at which `cost` more fits in."""
        log = self.log
        while log and log[0][0] + self.period <= now:
            self.used -= log.popleft()[1]
        if not log:
            self.used = 0  # drops what rounding left behind
        excess = self.used + cost - self.amount
        if excess <= 0:
            return now
        for last, spent, _ in log:
            excess -= spent
            if excess <= 0:
                return last + self.period
        return math.inf

    def add(self, now: float, cost: float) -> None:
        """Log an admission."""
        self.used += cost
        log = self.log
        if log and now - log[-1][2] < self.grain:
            log[-1][0] = now
            log[-1][1] += cost
        else:
            log.append([now, cost, now])

    def correct(self, at: float, change: float) -> None:
        """Change the cost of an admission made at `at`, if it is still in the window."""
        for entry in reversed(self.log):
            if entry[2] <= at <= entry[0]:
                entry[1] += change
                self.used += change
                return


class Meter:
    """How much may run: `limit` calls at once, and `rates` over time.

    Every rate is a window. The one with the shortest period also sets the pace: calls start `period / amount`
    seconds apart for each unit of cost, up to `burst` of them back to back. Idle time earns no more than the
    burst; time that was lost because a wake came late is made up for, within `CATCH_UP` seconds.
    """

    __slots__ = (
        "_behind",
        "_interval",
        "_last",
        "_next",
        "_open_since",
        "_tolerance",
        "_windows",
        "burst",
        "in_flight",
        "limit",
        "paused_until",
        "rates",
    )

    def __init__(self, *, limit: int | None = None, rates: tuple[Rate, ...] = (), burst: float = 1) -> None:
        self.in_flight = 0
        self.paused_until = -math.inf
        self._windows: tuple[_Window, ...] = ()
        self._next = -math.inf  # GCRA's theoretical arrival time
        self._last = -math.inf  # when the last call was admitted
        self._behind = 0.0  # seconds that the last admission came after its time
        self._open_since = -math.inf  # since when nothing but the pace has been in the way
        self.configure(limit=limit, rates=rates, burst=burst)

    def configure(self, *, limit: int | None, rates: tuple[Rate, ...], burst: float) -> None:
        """Set the limits; what was admitted before counts against the new ones."""
        logs = {window.period: window for window in self._windows}
        self.limit = limit
        self.rates = tuple(sorted(rates, key=lambda rate: rate.period))
        self.burst = burst
        self._windows = tuple(_Window(rate) for rate in self.rates)
        for window in self._windows:
            if window.period in logs:
                window.log, window.used = logs[window.period].log, logs[window.period].used
        self._interval = self.rates[0].period / self.rates[0].amount if self.rates else 0.0
        self._tolerance = (burst - 1) * self._interval

    @property
    def largest_cost(self) -> float:
        """The largest cost that can ever be admitted."""
        return min((rate.amount for rate in self.rates), default=math.inf)

    def admit(self, now: float, cost: float, since: float, slots: int = 1) -> float:
        """Admit a call that has been next in line since `since`, or say when to ask again.

        Returns 0.0 if the call is admitted, else the time at which to ask again: infinity if a slot has to be
        given back first.
        """
        if self.limit is not None and slots and self.in_flight >= self.limit:
            return math.inf
        if now < self.paused_until:
            return self.paused_until
        if self._windows:
            at = self._take(now, cost, since)
            if at > now:
                return at
        self.in_flight += slots
        return 0.0

    def _take(self, now: float, cost: float, since: float) -> float:
        """Return the time at which all rates have room for `cost`; if that is now, they are charged."""
        windows = self._windows
        at = windows[0].free_at(now, cost)
        if len(windows) > 1:
            for window in windows[1:]:
                if (opens := window.free_at(now, cost)) > now:
                    self._open_since = max(self._open_since, opens)
                    at = max(at, opens)
        ready = max(since, self._open_since)
        if ready - self._last > CATCH_UP:
            self._behind = 0.0
        base = max(self._next, ready - self._behind, now - CATCH_UP)
        due = base - self._tolerance
        if due > now or at > now:
            return max(due, at)
        for window in windows:
            window.add(now, cost)
        self._behind = min(now - max(due, ready - self._behind), CATCH_UP)
        self._next = base + cost * self._interval
        self._last = now
        return now

    def release(self, now: float) -> None:
        """Give a slot back."""
        if self.in_flight == self.limit:
            self._open_since = max(self._open_since, now)
        self.in_flight -= 1

    def pause(self, until: float) -> None:
        """Admit nobody before `until`; a shorter pause does not end a longer one."""
        self.paused_until = max(self.paused_until, until)
        self._open_since = max(self._open_since, self.paused_until)

    def correct(self, at: float, change: float) -> None:
        """Change what the call admitted at `at` has cost: by minus its cost if it never started."""
        for window in self._windows:
            window.correct(at, change)
        self._next += change * self._interval
