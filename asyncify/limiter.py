"""One gate for threads and event loops: a queue of waiters over a meter.

Whoever ends a call, gives up or is called by the clock *pumps* the queue: it admits from the front for as long as
the meter allows, and wakes those it admitted. A waiter never fetches its own admission, so a frozen event loop or
a slow thread at the front delays only itself.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
import threading
import weakref
from _thread import allocate_lock
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import EllipsisType

from langchain_core.rate_limiters import BaseRateLimiter

from asyncify.adaptive import Adaptive, AdaptiveLimit
from asyncify.clock import Clock, Timer, monotonic_clock
from asyncify.congestion import congestion_of
from asyncify.errors import DeadlockError, LimitTimeout
from asyncify.meter import PERIODS, Limits, Meter, check_positive
from asyncify.permits import UNUSED, Permit, held_by_this_task, held_by_this_thread, innermost, permits

__all__ = ["Limiter", "LimiterStats"]

_RECENT = 1000
"""Admissions that the waiting times of `stats()` are taken from."""


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


@dataclass(frozen=True, slots=True)
class _Failure:
    """What an error taught: a pause in seconds, a sign of congestion, or neither."""

    pause: float | None
    congested: bool


class Limiter(BaseRateLimiter):
    """Hold calls to `limit` at once and to rates over time, for all threads and event loops together.

    As a context manager (`with`, `async with`) it grants a slot and a rate token in one moment. As a LangChain
    `BaseRateLimiter` (`acquire`, `aacquire`) it grants the rate alone. First come, first served. An error that
    passes through it with a `Retry-After` (HTTP 429, 503) pauses it for that long.

    Args:
        limit: calls that may run at once; or an `Adaptive`, which finds the number.
        per_second, per_minute, per_hour: cost that may start in any such window, wherever it begins; a call costs
            1 unless told otherwise. The shortest window also sets the pace: its calls start evenly spaced, in the
            order of their coming; the longer ones only cap.
        burst: calls that may start back to back; the windows still hold.
        timeout: seconds that a call may wait before it gets a `LimitTimeout`; for ever by default.
        name: what errors and `repr` call it.
        clock: where it gets the time, for tests.

    Raises:
        TypeError, ValueError: the arguments limit nothing or can't be meant.
    """

    def __init__(
        self,
        *,
        limit: int | Adaptive | None = None,
        per_second: float | None = None,
        per_minute: float | None = None,
        per_hour: float | None = None,
        burst: int | None = None,
        timeout: float | None = None,
        name: str | None = None,
        clock: Clock = monotonic_clock,
    ) -> None:
        self._adaptive, slots = _adaptive_limit(limit)
        self._meter = Meter(
            Limits.of(
                limit=slots,
                burst=burst,
                per_second=per_second,
                per_minute=per_minute,
                per_hour=per_hour,
            )
        )
        self.timeout = None if timeout is None else check_positive("timeout", timeout, "timeout=30")
        self.name = name
        self.epoch = 0
        self._clock = clock
        self._now = clock.now
        self._admitted = 0
        self._rejected = 0
        self._waits: deque[tuple[int, float]] = deque(maxlen=_RECENT)  # which admission had to wait, and how long
        self._begin()
        _limiters.add(self)

    def _begin(self) -> None:
        """Start with nobody inside and nobody waiting."""
        self._lock = threading.Lock()
        self._queue: OrderedDict[Permit, None] = OrderedDict()
        self._rate_only: OrderedDict[Permit, None] = OrderedDict()  # those of the queue who need no slot
        self._departed: deque[Permit] = deque()
        self._blocked: Counter[Permit] = Counter()  # calls inside, by the waiters that keep each from ending
        self._timer: Timer | None = None

    def after_fork(self) -> None:
        """Keep, in a forked child, only the calls that the forking thread is inside of."""
        self.epoch += 1
        self._begin()
        mine = [permit for permit in permits() if permit.place is self]
        for permit in mine:
            permit.epoch = self.epoch
        self._meter.in_flight = sum(permit.slots for permit in mine)

    # --- entering ---

    def enter(self, cost: float = 1, slots: int = 1, timeout: float | None = None) -> Permit:
        """Wait in this thread for a slot and the rate; the caller must `leave()` the permit."""
        permit = Permit(self, cost, slots)
        if not self._admit(permit):
            self._wait(permit, timeout)
        permit.begin()
        return permit

    async def aenter(self, cost: float = 1, slots: int = 1, timeout: float | None = None) -> Permit:
        """Wait in this task for a slot and the rate; the caller must `leave()` the permit."""
        permit = Permit(self, cost, slots)
        if not self._admit(permit):
            await self._await(permit, timeout)
        permit.begin()
        return permit

    def _admit(self, permit: Permit, *, queue: bool = True) -> bool:
        """Admit a call at once, or put it at the end of the queue."""
        lock = self._lock
        lock.acquire()  # not `with`, which takes twice as long
        try:
            now = self._now()
            while self._departed:
                self._take_back(self._departed.popleft(), now)
            if not self._queue or self._may_pass(permit):
                at = self._meter.admit(now, permit.cost, now, permit.slots)
                if not at:
                    permit.at = now
                    self._admitted += 1
                    return True
                check_affordable(permit.cost, self._meter.limits, self._title())
                if queue:
                    self._call_back_at(at)
            permit.at = None
            permit.wake = None
            if queue:
                permit.since = now
                permit.ahead = len(self._queue)
                self._enqueue(permit)
            return False
        finally:
            lock.release()

    def _may_pass(self, permit: Permit) -> bool:
        """Whether all who are ahead wait for a slot, and this call, which may be inside already, needs none."""
        return not permit.slots and not self._rate_only and self._meter.is_full

    def _wait(self, permit: Permit, timeout: float | None) -> None:
        ready = allocate_lock()
        ready.acquire()
        try:
            if permit.outer is not None and permit.slots:
                self._check_certain_end(permit, held_by_this_thread(), timeout)
            if self._must_wait(permit, ready.release, timeout):
                ready.acquire()
        except BaseException:
            permit.give_up()
            raise
        self._check_in_time(permit)

    async def _await(self, permit: Permit, timeout: float | None) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        try:
            if permit.outer is not None and permit.slots:
                self._check_certain_end(permit, held_by_this_task(), timeout)
            if self._must_wait(permit, partial(_resolve, loop, ready), timeout):
                await ready
        except BaseException:
            permit.give_up()
            raise
        self._check_in_time(permit)

    def _check_certain_end(self, permit: Permit, held: Iterable[Permit], timeout: float | None) -> None:
        """Note which calls inside this limiter wait for `permit`; it is doomed if they are all that are inside.

        A waiter that will give up some day lets the calls that it blocks end, so it is no proof for others.
        """
        blocks = tuple({other for other in held if other.place is self and other.slots})
        with self._lock:
            if not blocks or permit not in self._queue:
                return
            inside = {other for other in (*self._blocked, *blocks) if not other.ended}
            doomed = len(inside) >= (self._meter.limits.limit or math.inf)
            self._rejected += doomed
            if self._timeout_of(timeout) is None:
                permit.blocks = blocks
                self._blocked.update(blocks)
        self._settle()
        if doomed:
            raise DeadlockError(self._deadlock_message())

    def _must_wait(self, permit: Permit, wake: Callable[[], None], timeout: float | None) -> bool:
        """Say how to wake a queued call; False if it has been admitted meanwhile.

        The queue admits first and looks for `wake` then, here it is the other way round: so one sees the other.
        """
        permit.wake = wake
        if self._departed:
            self._settle()
        timeout = self._timeout_of(timeout)
        if permit.at is None and timeout is not None:
            permit.timer = self._clock.call_at(permit.since + timeout, partial(self._expire, permit))
        return permit.at is None

    def _timeout_of(self, timeout: float | None) -> float | None:
        return self.timeout if timeout is None else timeout

    def _expire(self, permit: Permit) -> None:
        """Turn a waiter away whose time is up; the clock calls this."""
        with self._lock:
            late = permit in self._queue
            if late:
                self._turn_away(permit)  # at once, as it might be admitted when the lock is free
        if late:
            self._wake([permit])
        self._settle(wait=True)

    def _check_in_time(self, permit: Permit) -> None:
        if permit.timer is not None:
            permit.timer.cancel()
        if permit.at is None:
            check_affordable(permit.cost, self._meter.limits, self._title())
            raise LimitTimeout(
                f"{self._title()}: not admitted within {self._now() - permit.since:.3g} s; {permit.ahead} calls were "
                "ahead of it when it came. Raise timeout= or the limit, or send less."
            )

    # --- the queue; called with the lock held ---

    def _pump(self, now: float) -> list[Permit]:
        """Admit from the front while the meter allows; return those who must be woken."""
        queue = self._queue
        granted: list[Permit] = []
        while queue:
            permit = next(iter(queue))
            at = self._meter.admit(now, permit.cost, permit.since, permit.slots)
            if at == math.inf and self._rate_only:  # who needs no slot passes those who wait for one
                permit = next(iter(self._rate_only))
                at = self._meter.admit(now, permit.cost, permit.since, permit.slots)
            if at:
                self._call_back_at(at)
                break
            self._dequeue(permit)
            permit.at = now
            self._admitted += 1
            self._waits.append((self._admitted, now - permit.since))
            granted.append(permit)
        return granted

    def _enqueue(self, permit: Permit) -> None:
        self._queue[permit] = None
        if not permit.slots:
            self._rate_only[permit] = None

    def _dequeue(self, permit: Permit) -> None:
        del self._queue[permit]
        if not permit.slots:
            del self._rate_only[permit]
        for other in permit.blocks:
            self._blocked[other] -= 1
            if not self._blocked[other]:
                del self._blocked[other]

    def _turn_away(self, permit: Permit) -> None:
        self._dequeue(permit)
        self._rejected += 1
        permit.ended = True

    def _call_back_at(self, at: float) -> None:
        if at == math.inf or (self._timer is not None and self._timer.when <= at):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._clock.call_at(at, self._tick)

    def _take_back(self, permit: Permit, now: float) -> None:
        """Take back the place of a call that has ended or given up, and learn from how it ended."""
        if permit.epoch != self.epoch:
            return  # it belongs to the process that this one was forked from
        if permit.at is None:
            if permit in self._queue:
                self._dequeue(permit)
            return
        if permit.outcome is not None or (self._adaptive is not None and permit.slots):
            self._learn(permit, permit.at, now)
        if permit.slots:
            self._meter.release(now)
        permit.at = None  # two threads may have given it up at the same moment; it is taken back once

    def _learn(self, permit: Permit, at: float, now: float) -> None:
        outcome = permit.outcome
        if outcome is UNUSED:
            self._meter.correct(at, -permit.cost)
            return
        if isinstance(outcome, _Failure) and outcome.pause is not None:
            self._meter.pause(now + outcome.pause)
        if self._adaptive is not None and self._adapt(self._adaptive, outcome, at, now):
            self._meter.configure(dataclasses.replace(self._meter.limits, limit=self._adaptive.limit))

    def _adapt(self, adaptive: AdaptiveLimit, outcome: object, at: float, now: float) -> bool:
        in_flight = self._meter.in_flight
        if isinstance(outcome, _Failure):
            return outcome.congested and adaptive.failed(now, at, in_flight)
        return adaptive.succeeded(now, in_flight)

    # --- leaving, and being woken; called without the lock ---

    def give_back(self, permit: Permit, error: BaseException | None) -> None:
        """Take back the place of a call that has ended or given up; `error` is what it raised.

        A finalizer may end a call in the middle of anything, in a thread that holds the lock just then. So nobody
        who leaves waits for the lock: whoever holds it looks at `_departed` after letting go. And if nobody waits
        for the place, it is taken back when the next call comes.
        """
        try:
            if error is not None:
                permit.outcome = self._judge(error)
        finally:
            self._departed.append(permit)
            if self._queue or permit.outcome is not None:
                self._settle()

    def _judge(self, error: BaseException) -> _Failure:
        congestion = congestion_of(error)
        return _Failure(
            pause=None if congestion is None else congestion.retry_after,
            congested=self._adaptive is not None and self._adaptive.config.on(error),
        )

    def _settle(self, *, wait: bool = False) -> None:
        """Take back the places of all who left, and admit the next.

        Without `wait` it does nothing if another holds the lock, for that one will look at `_departed` next.
        """
        while self._lock.acquire(wait):
            try:
                now = self._now()
                while self._departed:
                    self._take_back(self._departed.popleft(), now)
                granted = self._pump(now)
            finally:
                self._lock.release()
            self._wake(granted)
            if not self._departed:
                return

    def _tick(self) -> None:
        with self._lock:
            self._timer = None
        self._settle(wait=True)

    def _wake(self, granted: list[Permit]) -> None:
        for permit in granted:
            if permit.wake is not None:
                try:
                    permit.wake()
                except RuntimeError:  # its event loop is closed: nobody is left to start this call
                    permit.outcome = UNUSED
                    permit.ended = True
                    self._departed.append(permit)  # the caller settles; to settle here would nest, once a waiter

    # --- the faces ---

    def __enter__(self) -> None:
        """Wait in this thread for a slot and the rate."""
        permit = Permit(self, 1, 1)
        if not self._admit(permit):
            self._wait(permit, None)
        permit.begin()

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Give the slot back."""
        self._entered().leave(error)

    async def __aenter__(self) -> None:
        """Wait in this task for a slot and the rate."""
        permit = Permit(self, 1, 1)
        if not self._admit(permit):
            await self._await(permit, None)
        permit.begin()

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Give the slot back."""
        self._entered().leave(error)

    def _entered(self) -> Permit:
        """Return the innermost permit of this limiter that this context runs under."""
        permit = innermost.get()
        while permit is not None:
            if permit.place is self and not permit.ended:
                return permit
            permit = permit.outer
        raise RuntimeError(f"{self._title()}: this context is not inside a call that it has admitted")

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
        admitted = self._admit(Permit(self, 1, 0), queue=False)
        if not admitted:
            with self._lock:
                self._rejected += 1
            self._settle(wait=True)
        return admitted

    def record(self, actual: float) -> None:
        """Correct, from inside a call, what it was estimated to cost.

        Raises:
            RuntimeError: this context is not inside a call that the limiter has admitted.
            ValueError: the cost is negative or not finite.
        """
        permit = self._entered()
        check_cost(actual)
        with self._lock:
            if permit.at is not None:
                self._meter.correct(permit.at, actual - permit.cost)
            permit.cost = actual
        self._settle(wait=True)

    def resize(
        self,
        *,
        limit: int | Adaptive | EllipsisType | None = ...,
        per_second: float | EllipsisType | None = ...,
        per_minute: float | EllipsisType | None = ...,
        per_hour: float | EllipsisType | None = ...,
        burst: int | EllipsisType | None = ...,
    ) -> None:
        """Change the limits, for those already waiting too; what is not named stays, None takes it away.

        Raises:
            TypeError, ValueError: nothing would be left to limit, or an argument can't be meant.
        """
        changes = {"per_second": per_second, "per_minute": per_minute, "per_hour": per_hour}
        with self._lock:
            old = self._meter.limits
            amounts: dict[str, float | None] = dict.fromkeys(PERIODS)
            amounts |= {name: rate.amount for rate in old.rates for name in PERIODS if PERIODS[name] == rate.period}
            amounts |= {name: amount for name, amount in changes.items() if not isinstance(amount, EllipsisType)}
            adaptive, slots = (self._adaptive, old.limit) if isinstance(limit, EllipsisType) else _adaptive_limit(limit)
            new_burst = (old.burst if old.burst > 1 else None) if isinstance(burst, EllipsisType) else burst
            limits = Limits.of(limit=slots, burst=new_burst, **amounts)
            self._adaptive = adaptive
            self._meter.configure(limits)
            hopeless = [permit for permit in self._queue if permit.cost > limits.largest_cost]
            for permit in hopeless:
                self._turn_away(permit)
        self._wake(hopeless)
        self._settle(wait=True)

    # --- what it tells ---

    @property
    def bounds_calls(self) -> bool:
        """Whether there is a limit on the calls in flight, and not on their rate alone."""
        return self._meter.limits.limit is not None

    @property
    def limits(self) -> Limits:
        """The limits as they are now."""
        return self._meter.limits

    def is_idle(self) -> bool:
        """Whether nobody is inside or waits, and nothing that was admitted still counts."""
        self._settle()
        return not self._queue and self._meter.is_idle(self._now())

    def stats(self) -> LimiterStats:
        """Return what the limiter has seen so far."""
        self._settle(wait=True)
        with self._lock:
            waits = [wait for number, wait in self._waits if number > self._admitted - _RECENT]
            at_once = min(self._admitted, _RECENT) - len(waits)
            counts = (self._meter.in_flight, len(self._queue), self._admitted, self._rejected)
        self._settle()
        ordered = [0.0] * at_once + sorted(waits)
        p50, p95, p99 = (_percentile(ordered, share) for share in (0.50, 0.95, 0.99))
        return LimiterStats(*counts, self._meter.limits.limit, wait_p50=p50, wait_p95=p95, wait_p99=p99)

    def state(self) -> str:
        """Say what it holds now: `3/10 in flight, 50 per second, 7 waiting`."""
        self._settle()
        limits = self._meter.limits
        flight = [] if limits.limit is None else [f"{self._meter.in_flight}/{limits.limit} in flight"]
        return ", ".join([*flight, *map(str, limits.rates), f"{len(self._queue)} waiting"])

    def __repr__(self) -> str:
        """Show the state: `<Limiter quotes 3/10 in flight, 50 per second, 7 waiting>`."""
        name = f"{self.name} " if self.name else ""
        return f"<Limiter {name}{self.state()}>"

    def _title(self) -> str:
        return f"limiter {self.name}" if self.name else "limiter"

    def _deadlock_message(self) -> str:
        return (
            f"{self._title()}: all {self._meter.limits.limit} slots are held by calls that wait for a slot of this "
            "very limiter, so none can ever come free. Give the inner function a limiter of its own, or call its "
            "unlimited .func or .afunc."
        )


def _adaptive_limit(limit: int | Adaptive | None) -> tuple[AdaptiveLimit | None, int | None]:
    """Return the state of an adaptive limit, if it is one, and the number of slots to begin with."""
    if not isinstance(limit, Adaptive):
        return None, limit
    adaptive = AdaptiveLimit(limit)
    return adaptive, adaptive.limit


def check_cost(cost: object) -> float:
    """Return `cost` if it is a number, not negative and finite."""
    if isinstance(cost, bool) or not isinstance(cost, (int, float)):
        raise TypeError(f"cost={cost!r}: must be a number")
    if not 0 <= cost < math.inf:
        raise ValueError(f"cost={cost!r}: must be finite and not negative")
    return cost


def check_affordable(cost: float, limits: Limits, what: str) -> None:
    """Raise a ValueError for a cost that could never be admitted."""
    if cost > limits.largest_cost:
        tightest = min(limits.rates, key=lambda rate: rate.amount)
        raise ValueError(f"{what}: a cost of {cost:g} can never be admitted, as the limit is {tightest}")


_limiters: weakref.WeakSet[Limiter] = weakref.WeakSet()


def _after_fork() -> None:
    for limiter in list(_limiters):
        limiter.after_fork()


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
