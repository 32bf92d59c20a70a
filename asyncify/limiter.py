"""One gate for threads and event loops: a queue of waiters over a meter.

Whoever ends a call, gives up or is called by the clock *pumps* the queue: it admits from the front for as long as
the meter allows, and wakes those it admitted. A waiter never fetches its own admission, so a frozen event loop or
a slow thread at the front delays only itself.
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
import weakref
from _thread import allocate_lock
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import EllipsisType, TracebackType
from typing import Any

from langchain_core.rate_limiters import BaseRateLimiter

from asyncify.clock import Clock, Timer, monotonic_clock
from asyncify.errors import DeadlockError, LimitTimeout
from asyncify.meter import Meter, Rate

__all__ = ["Gate", "Limiter", "LimiterStats", "Permit"]

_PERIODS = {"per_second": 1.0, "per_minute": 60.0, "per_hour": 3600.0}

_WAITS_KEPT = 1000

_innermost: ContextVar[Permit | None] = ContextVar("asyncify_permit", default=None)
"""The permit under which this context runs; those around it follow by `outer`."""


class Permit:
    """One call's place at a limiter, from the moment it asks until it has ended."""

    __slots__ = (
        "ahead",
        "at",
        "blocks",
        "cost",
        "ended",
        "epoch",
        "limiter",
        "outer",
        "since",
        "slots",
        "task",
        "thread",
        "timer",
        "wake",
    )

    at: float | None  # when it was admitted; None while it waits
    since: float
    ahead: int
    blocks: tuple[Permit, ...]
    timer: Timer | None
    wake: Callable[[], None]

    def __init__(self, limiter: Limiter, cost: float, slots: int, task: asyncio.Task[Any] | None) -> None:
        self.limiter = limiter
        self.epoch = limiter._epoch
        self.cost = cost
        self.slots = slots
        self.task = task
        self.thread = threading.get_ident()
        self.outer = _innermost.get()
        self.ended = False

    def leave(self) -> None:
        """End the call, in the context that entered."""
        self.step_out()
        self.end()

    def step_out(self) -> None:
        """Leave the context of the call, which goes on elsewhere and ends there."""
        if _innermost.get() is self:
            _innermost.set(self.outer)

    def move_to_this_thread(self) -> None:
        """Note that the call now runs in this thread, and no longer in the task that entered."""
        self.task = None
        self.thread = threading.get_ident()

    def end(self) -> None:
        """End the call, from any thread and any context, a finalizer's included; only the first time counts."""
        if not self.ended:
            self.ended = True
            self.limiter._departed.append(self)
            self.limiter._settle()


def permits() -> Iterator[Permit]:
    """Yield the permits under which this context runs, the innermost first."""
    permit = _innermost.get()
    while permit is not None:
        if not permit.ended:
            yield permit
        permit = permit.outer


@dataclass(frozen=True, slots=True)
class LimiterStats:
    """What a limiter has seen; waits are in seconds, over the last 1,000 admissions."""

    in_flight: int
    waiting: int
    admitted: int
    rejected: int
    limit: int | None
    wait_p50: float
    wait_p95: float
    wait_p99: float


class Limiter(BaseRateLimiter):
    """Hold calls to `limit` at once and to rates over time, for all threads and event loops together.

    As a context manager (`with`, `async with`) it grants a slot and a rate token in one moment. As a LangChain
    `BaseRateLimiter` (`acquire`, `aacquire`) it grants the rate alone. First come, first served.

    Args:
        limit: calls that may run at once.
        per_second, per_minute, per_hour: calls that may start in any such window, wherever it begins. Calls are
            spaced evenly by the one with the shortest window; the longer ones only cap.
        burst: calls that may start back to back; the windows still hold.
        timeout: seconds that a call may wait before it gets a `LimitTimeout`.
        name: what errors and `repr` call it.

    Raises:
        TypeError, ValueError: for arguments that limit nothing or can't be meant.
    """

    def __init__(
        self,
        *,
        limit: int | None = None,
        per_second: float | None = None,
        per_minute: float | None = None,
        per_hour: float | None = None,
        burst: int | None = None,
        timeout: float | None = None,
        name: str | None = None,
        clock: Clock = monotonic_clock,
    ) -> None:
        rates = _rates(per_second=per_second, per_minute=per_minute, per_hour=per_hour)
        if limit is None and not rates:
            raise TypeError("nothing to limit: give a limit or a rate, as in limit=10, per_second=50")
        self._meter = Meter(limit=_limit(limit), rates=rates, burst=_burst(burst, rates))
        self.timeout = None if timeout is None else _positive("timeout", timeout)
        self.name = name
        self._clock = clock
        self._now = clock.now
        self._epoch = 0
        self._admitted = 0
        self._rejected = 0
        self._waits: deque[float] = deque(maxlen=_WAITS_KEPT)
        self._begin()
        _limiters.add(self)

    def _begin(self) -> None:
        """Start with nobody inside and nobody waiting."""
        self._lock = threading.Lock()
        self._queue: OrderedDict[Permit, None] = OrderedDict()
        self._departed: deque[Permit] = deque()
        self._blocked = 0
        self._timer: Timer | None = None

    def _after_fork(self) -> None:
        """Keep, in a forked child, only the calls that the forking thread is inside of."""
        self._epoch += 1
        self._begin()
        mine = [permit for permit in permits() if permit.limiter is self]
        for permit in mine:
            permit.epoch = self._epoch
        self._meter.in_flight = sum(permit.slots for permit in mine)

    # --- entering ---

    def enter(self, *, cost: float = 1, slots: int = 1, timeout: float | None = None) -> Permit:
        """Wait in this thread for a slot and the rate; the caller must `leave()` the permit."""
        permit = Permit(self, cost, slots, None)
        if not self._admit_at_once(permit):
            ready = allocate_lock()
            ready.acquire()
            self._join(permit, ready.release, timeout)
            try:
                ready.acquire()
            except BaseException:
                permit.end()
                raise
            self._check_in_time(permit)
        _innermost.set(permit)
        return permit

    async def aenter(self, *, cost: float = 1, slots: int = 1, timeout: float | None = None) -> Permit:
        """Wait in this task for a slot and the rate; the caller must `leave()` the permit."""
        permit = Permit(self, cost, slots, asyncio.current_task())
        if not self._admit_at_once(permit):
            loop = asyncio.get_running_loop()
            ready = loop.create_future()
            self._join(permit, partial(_resolve, loop, ready), timeout)
            try:
                await ready
            except BaseException:
                permit.end()
                raise
            self._check_in_time(permit)
        _innermost.set(permit)
        return permit

    def _admit_at_once(self, permit: Permit) -> bool:
        with self._lock:
            if self._queue:
                return False
            now = self._now()
            if self._meter.admit(now, permit.cost, now, permit.slots):
                return False
            permit.at = now
            self._admitted += 1
            self._waits.append(0.0)
        if self._departed:
            self._settle()
        return True

    def _join(self, permit: Permit, wake: Callable[[], None], timeout: float | None) -> None:
        """Put a call at the end of the queue, unless it would wait for itself."""
        permit.at = None
        permit.wake = wake
        permit.timer = None
        with self._lock:
            permit.since = self._now()
            permit.ahead = len(self._queue)
            permit.blocks = self._blocked_by(permit)
            self._blocked += len(permit.blocks)
            self._queue[permit] = None
            doomed = permit.slots and permit.blocks and self._blocked == self._meter.limit
            granted = [] if doomed else self._pump()
        self._finish(granted)
        if doomed:
            self._rejected += 1
            permit.end()
            raise DeadlockError(self._deadlock_message())
        timeout = self.timeout if timeout is None else timeout
        if timeout is not None and permit.at is None:
            permit.timer = self._clock.call_at(permit.since + timeout, partial(self._expire, permit))

    def _check_in_time(self, permit: Permit) -> None:
        if permit.timer is not None:
            permit.timer.cancel()
        if permit.at is None:
            waited = self._now() - permit.since
            raise LimitTimeout(
                f"{self._title()}: not admitted within {waited:.3g} s; {permit.ahead} calls were ahead of it. "
                "Raise timeout=, or the limit, or send less."
            )

    def _expire(self, permit: Permit) -> None:
        """Turn a waiter away whose time is up; the clock calls this."""
        with self._lock:
            late = permit in self._queue
        if late:
            self._rejected += 1
            permit.end()
            permit.wake()

    # --- the queue; called with the lock held ---

    def _pump(self) -> list[Permit]:
        """Admit from the front while the meter allows; return those who must be woken."""
        queue = self._queue
        granted: list[Permit] = []
        while queue:
            permit = next(iter(queue))
            now = self._now()
            if at := self._meter.admit(now, permit.cost, permit.since, permit.slots):
                self._wake_up_at(at)
                break
            del queue[permit]
            self._unblock(permit)
            permit.at = now
            self._admitted += 1
            self._waits.append(now - permit.since)
            granted.append(permit)
        return granted

    def _wake_up_at(self, at: float) -> None:
        if at == math.inf or (self._timer is not None and self._timer.when <= at):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._clock.call_at(at, self._tick)

    def _blocked_by(self, permit: Permit) -> tuple[Permit, ...]:
        """Return the calls inside this limiter that can't end before `permit` is admitted.

        A call is one of them only if the task or thread it runs in is the very one that waits. That a context
        was inherited proves nothing: a task left running in the background has inherited it too.
        """
        return tuple(
            held
            for held in permits()
            if held.limiter is self
            and held.slots
            and (held.task is permit.task if permit.task else held.thread == permit.thread)
        )

    def _unblock(self, permit: Permit) -> None:
        self._blocked -= len(permit.blocks)

    # --- leaving, and being woken; called without the lock ---

    def _settle(self) -> None:
        """Take back the places of those who left, and admit the next.

        A finalizer may end a call in the middle of anything, in a thread that holds the lock just then. So this
        never waits for the lock: whoever holds it looks again after letting go.
        """
        while self._departed and self._lock.acquire(blocking=False):
            try:
                while self._departed:
                    self._take_back(self._departed.popleft())
                granted = self._pump()
            finally:
                self._lock.release()
            self._wake(granted)

    def _take_back(self, permit: Permit) -> None:
        if permit.epoch != self._epoch:
            return
        if permit.at is None:
            if self._queue.pop(permit, permit) is None:
                self._unblock(permit)
        elif permit.slots:
            self._meter.release(self._now())

    def _tick(self) -> None:
        with self._lock:
            self._timer = None
            granted = self._pump()
        self._finish(granted)

    def _finish(self, granted: list[Permit]) -> None:
        self._wake(granted)
        if self._departed:
            self._settle()

    def _wake(self, granted: list[Permit]) -> None:
        for permit in granted:
            try:
                permit.wake()
            except RuntimeError:  # its event loop is closed: nobody is left to start this call
                permit.end()

    # --- the faces ---

    def __enter__(self) -> None:
        """Wait in this thread for a slot and the rate."""
        self.enter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the slot back."""
        self._leave()

    async def __aenter__(self) -> None:
        """Wait in this task for a slot and the rate."""
        await self.aenter()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the slot back."""
        self._leave()

    def _leave(self) -> None:
        permit = next(permit for permit in permits() if permit.limiter is self)
        permit.leave()

    def acquire(self, *, blocking: bool = True) -> bool:
        """Wait in this thread for the rate alone; without `blocking`, say whether it was there at once."""
        if blocking:
            self.enter(slots=0).leave()
            return True
        return self._try()

    async def aacquire(self, *, blocking: bool = True) -> bool:
        """Wait in this task for the rate alone; without `blocking`, say whether it was there at once."""
        if blocking:
            (await self.aenter(slots=0)).leave()
            return True
        return self._try()

    def _try(self) -> bool:
        admitted = self._admit_at_once(Permit(self, 1, 0, None))
        self._rejected += not admitted
        return admitted

    def resize(
        self,
        *,
        limit: int | EllipsisType | None = ...,
        per_second: float | EllipsisType | None = ...,
        per_minute: float | EllipsisType | None = ...,
        per_hour: float | EllipsisType | None = ...,
        burst: int | EllipsisType | None = ...,
    ) -> None:
        """Change the limits, for those already waiting too; what is not named stays, None takes it away."""
        meter = self._meter
        amounts: dict[str, float | None] = {
            name: next((rate.amount for rate in meter.rates if rate.period == period), None)
            for name, period in _PERIODS.items()
        }
        changes = {"per_second": per_second, "per_minute": per_minute, "per_hour": per_hour}
        amounts.update((name, amount) for name, amount in changes.items() if not isinstance(amount, EllipsisType))
        rates = _rates(**amounts)
        new_limit = meter.limit if isinstance(limit, EllipsisType) else _limit(limit)
        if new_limit is None and not rates:
            raise TypeError("nothing would be left to limit: keep a limit or a rate")
        new_burst = meter.burst if isinstance(burst, EllipsisType) else burst
        checked = _burst(new_burst if rates and new_burst != 1 else None, rates)
        with self._lock:
            meter.configure(limit=new_limit, rates=rates, burst=checked)
            granted = self._pump()
        self._finish(granted)

    def stats(self) -> LimiterStats:
        """Return what the limiter has seen so far."""
        with self._lock:
            waits = sorted(self._waits)
            numbers = (self._meter.in_flight, len(self._queue), self._admitted, self._rejected, self._meter.limit)
        self._finish([])
        p50, p95, p99 = (_percentile(waits, share) for share in (0.50, 0.95, 0.99))
        return LimiterStats(*numbers, wait_p50=p50, wait_p95=p95, wait_p99=p99)

    @property
    def bounds_calls(self) -> bool:
        """Whether there is a limit on the calls in flight, and not on their rate alone."""
        return self._meter.limit is not None

    def _title(self) -> str:
        return f"limiter {self.name}" if self.name else "limiter"

    def _deadlock_message(self) -> str:
        return (
            f"{self._title()}: all {self._meter.limit} slots are held by calls that wait for a slot of this very "
            "limiter, so none can ever come free. Give the inner function a limiter of its own, or call its "
            "unlimited .func."
        )

    def __repr__(self) -> str:
        """Show the state: `<Limiter quotes 3/10 in flight, 50 per second, 7 waiting>`."""
        name = f"{self.name} " if self.name else ""
        return f"<Limiter {name}{self.state()}>"

    def state(self) -> str:
        """Say what it holds now: `3/10 in flight, 50 per second, 7 waiting`."""
        meter = self._meter
        flight = [] if meter.limit is None else [f"{meter.in_flight}/{meter.limit} in flight"]
        return ", ".join([*flight, *map(str, meter.rates), f"{len(self._queue)} waiting"])


_limiters: weakref.WeakSet[Limiter] = weakref.WeakSet()


def _after_fork() -> None:
    for limiter in list(_limiters):
        limiter._after_fork()


os.register_at_fork(after_in_child=_after_fork)


def _resolve(loop: asyncio.AbstractEventLoop, ready: asyncio.Future[None]) -> None:
    """Wake a waiting task, from any thread; RuntimeError if its loop is closed."""
    if asyncio._get_running_loop() is loop:
        _set_done(ready)
    else:
        loop.call_soon_threadsafe(_set_done, ready)


def _set_done(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def _percentile(ordered: list[float], share: float) -> float:
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else 0.0


def _limit(limit: int | None) -> int | None:
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise TypeError(f"limit={limit!r}: must be a whole number of calls, as in limit=10")
    if limit < 1:
        raise ValueError(f"limit={limit!r}: must be at least 1, as in limit=10")
    return limit


def _positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r}: must be a number, as in {name}=50")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r}: must be more than 0 and finite, as in {name}=50")
    return value


def _rates(**amounts: float | None) -> tuple[Rate, ...]:
    return tuple(
        Rate(_positive(name, amount), _PERIODS[name]) for name, amount in amounts.items() if amount is not None
    )


def _burst(burst: float | None, rates: tuple[Rate, ...]) -> float:
    if burst is None:
        return 1
    if not rates:
        raise ValueError(f"burst={burst!r} needs a rate, as in per_second=50, burst={burst!r}")
    if isinstance(burst, bool) or not isinstance(burst, int):
        raise TypeError(f"burst={burst!r}: must be a whole number of calls, as in burst=5")
    shortest = min(rates, key=lambda rate: rate.period)
    if not 1 <= burst <= shortest.amount:
        raise ValueError(f"burst={burst!r}: must be from 1 to the rate, which is {shortest}")
    return burst


@dataclass(frozen=True, slots=True)
class Gate:
    """How the calls of one pair use a limiter."""

    limiter: Limiter
    timeout: float | None = None

    def enter(self) -> Permit:
        """Wait in this thread until the call may start."""
        return self.limiter.enter(timeout=self.timeout)

    async def aenter(self) -> Permit:
        """Wait in this task until the call may start."""
        return await self.limiter.aenter(timeout=self.timeout)
