"""A clock for tests of limits; fakes of pairs are put in their place by `registry.override`."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable

from asyncify.arguments import check_not_negative
from asyncify.clock import Timer

__all__ = ["FakeClock"]


class FakeClock:
    """A clock that moves only when it is told to, so that a test of a limit needs no real second.

    Give it to the limiter under test: `Limiter(per_second=5, clock=FakeClock())`.

    Args:
        start: the time to begin at, in seconds; not negative.

    Raises:
        TypeError, ValueError: it is no such time.
    """

    def __init__(self, start: float = 0.0) -> None:
        self._now = check_not_negative("start", start, "FakeClock(start=5)")
        self._lock = threading.RLock()  # a finalizer may set a timer in the middle of `call_at`
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()

    def now(self) -> float:
        """Return the time in seconds."""
        return self._now

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """Run `callback` when `advance` reaches `when`."""
        timer = Timer(when, callback)
        with self._lock:
            heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    def advance(self, seconds: float) -> None:
        """Let time pass, and run the timers that are due on the way, each at its own time.

        Raises:
            TypeError, ValueError: time would go back, or stop.
        """
        end = self._now + check_not_negative("seconds", seconds, "advance(0.5)")
        while (timer := self._next_until(end)) is not None:
            self._now = max(self._now, timer.when)
            timer.callback()
        self._now = max(self._now, end)  # a timer may have let time pass too

    def _next_until(self, end: float) -> Timer | None:
        with self._lock:
            while self._timers and self._timers[0][0] <= end:
                timer = heapq.heappop(self._timers)[2]
                if not timer.cancelled:
                    return timer
        return None

    def __repr__(self) -> str:
        """Show the time and the timers: `<FakeClock 1.5 s, 2 timers>`."""
        pending = sum(not timer.cancelled for _, _, timer in self._timers)
        return f"<FakeClock {self._now:g} s, {pending} timers>"
