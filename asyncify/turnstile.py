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
from asyncio import _get_running_loop, get_running_loop
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from asyncify.adaptive import AdaptiveLimit
from asyncify.clock import Clock, Timer
from asyncify.congestion import congestion_of
from asyncify.errors import DeadlockError, LimitTimeout
from asyncify.meter import Limits, Meter
from asyncify.permits import UNUSED, Permit, held_by_this_task, held_by_this_thread, innermost, permits

__all__ = ["RECENT", "Turnstile", "check_affordable"]

RECENT = 1000
"""Admissions whose waiting times are kept."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """What an error taught: a pause in seconds, a sign of congestion, or neither."""

    pause: float | None
    congested: bool


class Turnstile:
    """The queue of waiters and the meter that admits them.

    Args:
        limits: what the meter holds calls to.
        adaptive: what moves the limit on the calls at once, if anything does.
        timeout: seconds that a call may wait, unless it says otherwise.
        name: what errors call it.
        clock: where it gets the time, and has itself called back.
    """

    def __init__(
        self, limits: Limits, adaptive: AdaptiveLimit | None, *, timeout: float | None, name: str | None, clock: Clock
    ) -> None:
        self._meter = Meter(limits)
        self._adaptive = adaptive
        self.timeout = timeout
        self.name = name
        self.epoch: int = 0
        self._clock = clock
        self._now = clock.now
        self._admitted: int = 0
        self._rejected: int = 0
        self._waits: deque[tuple[int, float]] = deque(maxlen=RECENT)  # which admission had to wait, and how long
        self._begin()
        _turnstiles.add(self)

    def _begin(self) -> None:
        """Start with nobody inside and nobody waiting."""
        self._lock = threading.Lock()
        self._queue: OrderedDict[Permit, None] = OrderedDict()
        self._rate_only: OrderedDict[Permit, None] = OrderedDict()  # those of the queue who need no slot
        self._departed: deque[Permit] = deque()
        self._blocked: Counter[Permit] = Counter()  # calls inside, by the waiters that keep each from ending
        self._timer: Timer | None = None
        self._is_certain = True  # that a permit which looks held is held

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
            ready = allocate_lock()
            ready.acquire()
            permit.ready = ready  # only now, as it may be released from this moment on
            try:
                if self._must_wait(permit, held_by_this_thread, timeout):
                    ready.acquire()
            except BaseException:
                permit.give_up()
                raise
            self._check_in_time(permit)
        permit.begin()
        return permit

    async def aenter(self, cost: float = 1, slots: int = 1, timeout: float | None = None) -> Permit:
        """Wait in this task for a slot and the rate; the caller must `leave()` the permit."""
        permit = Permit(self, cost, slots)
        if not self._admit(permit):
            permit.loop = loop = get_running_loop()
            permit.ready = ready = loop.create_future()
            try:
                if self._must_wait(permit, held_by_this_task, timeout):
                    await ready
            except BaseException:
                permit.give_up()
                raise
            self._check_in_time(permit)
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
            if queue:
                permit.queue_up(now, len(self._queue))
                self._enqueue(permit)
            return False
        finally:
            lock.release()

    def _may_pass(self, permit: Permit) -> bool:
        """Whether all who are ahead wait for a slot, and this call, which may be inside already, needs none."""
        return not permit.slots and not self._rate_only and self._meter.is_full

    def _check_certain_end(self, permit: Permit, held: Iterable[Permit], timeout: float | None) -> None:
        """Note which calls inside wait for `permit`; it is doomed if they are all that are inside.

        A waiter that will give up some day lets the calls that it blocks end, so it is no proof for others.
        """
        blocks = tuple({other for other in held if other.place is self and other.slots})
        with self._lock:
            if not blocks or permit not in self._queue or not self._is_certain:
                return
            inside = {other for other in (*self._blocked, *blocks) if not other.ended}
            doomed = len(inside) >= (self._meter.limits.limit or math.inf)
            self._rejected += doomed
            if timeout is None:
                permit.blocks = blocks
                self._blocked.update(blocks)
        self._settle()
        if doomed:
            raise DeadlockError(self._deadlock_message())

    def _must_wait(self, permit: Permit, held: Callable[[], list[Permit]], timeout: float | None) -> bool:
        """Look after a call that has been queued and can be woken now; False if it was admitted meanwhile.

        The queue admits a call and then looks whether it can be woken; here it is the other way round: so one sees
        the other.
        """
        timeout = self.timeout if timeout is None else timeout
        if permit.outer is not None and permit.slots:
            self._check_certain_end(permit, held(), timeout)
        if self._departed:
            self._settle()
        if permit.at is None and timeout is not None:
            permit.timer = self._clock.call_at(permit.since + timeout, partial(self._expire, permit))
        return permit.at is None

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
        if error is None:
            self._departed.append(permit)
            if self._queue:
                self._settle()
            return
        try:
            permit.outcome = self._judge(error)
        finally:
            self._departed.append(permit)
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
        here = _get_running_loop() if granted else None
        for permit in granted:
            ready = permit.ready
            if ready is None:
                continue  # it has not begun to wait, and will see that it is admitted
            if permit.loop is None:
                ready.release()
            elif permit.loop is here:
                _set_done(ready)
            else:
                try:
                    permit.loop.call_soon_threadsafe(_set_done, ready)
                except RuntimeError:  # the event loop is closed: nobody is left to start this call
                    permit.outcome = UNUSED
                    permit.ended = True
                    self._departed.append(permit)  # the caller settles; to settle here would nest, once a waiter

    def _entered(self) -> Permit | None:
        """Return the innermost permit of this limiter that this context runs under."""
        permit = innermost.get()
        while permit is not None and (permit.place is not self or permit.ended):
            permit = permit.outer
        return permit

    def _title(self) -> str:
        return f"limiter {self.name}" if self.name else "limiter"

    def _deadlock_message(self) -> str:
        return (
            f"{self._title()}: all {self._meter.limits.limit} slots are held by calls that wait for a slot of this "
            "very limiter, so none can ever come free. Give the inner function a limiter of its own, or call its "
            "unlimited .func or .afunc."
        )


def check_affordable(cost: float, limits: Limits, what: str) -> None:
    """Raise a ValueError for a cost that could never be admitted."""
    if cost > limits.largest_cost:
        tightest = min(limits.rates, key=lambda rate: rate.amount)
        raise ValueError(f"{what}: a cost of {cost:g} can never be admitted, as the limit is {tightest}")


_turnstiles: weakref.WeakSet[Turnstile] = weakref.WeakSet()


def _after_fork() -> None:
    for turnstile in list(_turnstiles):
        turnstile.after_fork()


os.register_at_fork(after_in_child=_after_fork)


def _set_done(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
