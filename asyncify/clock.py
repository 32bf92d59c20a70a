"""Time and timers: what the limiter waits by, and the seam where a test puts a clock of its own."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from _thread import allocate_lock
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from asyncify.forks import at_fork, check_not_ending

__all__ = ["Clock", "MonotonicClock", "Timer", "monotonic_clock"]

_IDLE_SECONDS = 5.0
_LONGEST_SLEEP = 3600.0  # seconds; a system takes no timeout of 300 years, as a `Retry-After` may ask for
_SWEEP = 64


class Timer:
    """A callback that runs once, at a time of its clock, unless it is cancelled first."""

    __slots__ = ("callback", "cancelled", "when")

    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when: float = when
        self.callback: Callable[[], None] = callback
        self.cancelled: bool = False

    def cancel(self) -> None:
        """Never run the callback; harmless when it has run."""
        self.cancelled = True
        # Until its time has come it is among the other timers, and would keep what its callback leads to.
        self.callback = _nothing


def _nothing() -> None:
    """Stand for a callback that is not run any more."""


class Clock(Protocol):
    """Where a limiter gets its time, in seconds, and has itself called back."""

    def now(self) -> float:
        """Return the time in seconds; it never goes back."""
        ...

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """Run `callback` at `when` or as soon after it as can be, from any thread."""
        ...


class MonotonicClock:
    """The real time, with one daemon thread for all timers of the process.

    The thread belongs to no caller, so that a frozen event loop or a slow thread delays nobody else's
    timer. It is started by the first timer, and ends when there has been none for five seconds.
    """

    def __init__(self) -> None:
        self._reset()
        at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        # A fork takes no thread along, and a lock that another thread held would stay locked.
        # Both are re-entrant: a finalizer may set a timer in the middle of anything, of `call_at` itself too.
        self._lock = threading.RLock()
        # Released to wake the thread. No queue: `SimpleQueue.get` of Python 3.11 and 3.12 waits for ever if its time is
        # up as it looks at the clock a second time.
        self._wakeup = allocate_lock()
        self._wakeup.acquire()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._sweep_at = _SWEEP
        self._running = False

    now: staticmethod[[], float] = staticmethod(time.monotonic)
    """Return the time in seconds."""

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """Run `callback` on the timer thread at `when`; it must be short and must not raise."""
        check_not_ending()
        timer = Timer(when, callback)
        with self._lock:
            if len(self._timers) >= self._sweep_at:
                self._sweep()
            entry = (when, next(self._order), timer)  # made first: a finalizer in between may put another list there
            heapq.heappush(self._timers, entry)
            if not self._running:
                self._running = True  # before it starts: a finalizer may set a timer in between
                try:
                    threading.Thread(target=self._run, name="asyncify-timer", daemon=True).start()
                except BaseException:  # at the end of the program, say
                    self._running = False
                    raise
            elif self._timers[0][2] is timer:
                self._wake_up()
        return timer

    def _wake_up(self) -> None:
        with suppress(RuntimeError):  # it has been woken already
            self._wakeup.release()

    def _sweep(self) -> None:
        """Drop the cancelled timers; as the heap must double in between, a timer pays O(1) for it."""
        fresh: list[tuple[float, int, Timer]] = []  # made first, for the same reason
        timers, self._timers = self._timers, fresh
        self._timers.extend([entry for entry in timers if not entry[2].cancelled])
        heapq.heapify(self._timers)
        self._sweep_at = 2 * len(self._timers) + _SWEEP

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException:
            self._running = False  # the next timer starts another thread
            raise

    def _serve(self) -> None:
        while True:
            while (timer := self._take_due()) is not None:
                if not timer.cancelled:
                    timer.callback()
            if not self._wakeup.acquire(timeout=self._until_next()) and self._may_end():
                return

    def _take_due(self) -> Timer | None:
        with self._lock:
            if not self._timers:
                return None
            entry = heapq.heappop(self._timers)  # taken before it is looked at: another may come to the front
            if entry[2].cancelled or entry[0] <= time.monotonic():
                return entry[2]
            heapq.heappush(self._timers, entry)
            return None

    def _until_next(self) -> float:
        with self._lock:
            if not self._timers:
                return _IDLE_SECONDS
            return min(max(self._timers[0][0] - time.monotonic(), 0.0), _LONGEST_SLEEP)

    def _may_end(self) -> bool:
        with self._lock:
            if not self._timers:
                self._running = False
            return not self._running


monotonic_clock: Clock = MonotonicClock()
"""The clock of every limiter that is not given another."""
