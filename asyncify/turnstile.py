"""One queue for threads and event loops, over a meter.

Whoever ends a call, gives up or is called by the clock *pumps* the queue: it admits calls from the front for as long
as the meter allows, and wakes them. A waiter never fetches its own admission, so a frozen event loop or
a slow thread at the front delays only itself.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import math
import threading
import weakref
from _thread import allocate_lock
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import repeat

from asyncify.adaptive import AdaptiveLimit
from asyncify.arguments import check_not_negative, check_positive
from asyncify.clock import Clock, Timer, monotonic_clock
from asyncify.congestion import congestion_of
from asyncify.deadlock.detection import come_to_wait, look_at_threads
from asyncify.deadlock.holds import held_by_this_task, held_by_this_thread
from asyncify.deadlock.lookout import SHARE
from asyncify.errors import LimitTimeout
from asyncify.forks import at_fork, in_worker
from asyncify.meter import Limits, Meter
from asyncify.permits import Permit, permits, set_innermost
from asyncify.scopes import get_scope
from asyncify.wakeups import Wakeups, wakeups_of

__all__ = ["RECENT", "Turnstile"]

RECENT = 1000
"""Admissions whose waiting times are kept."""

_ABANDONED = 64
"""How many empty places a queue may have before it is checked whether they are most of it."""

_UNUSED = object()
"""The outcome of a call that never started: it gave up before or after it was admitted."""

_CALLED_OFF = object()
"""The outcome of a call that is to give up if it still waits."""

_OUTER_ENDED = "what this call is part of has ended while it waited for a limiter"


@dataclass(frozen=True, slots=True)
class _Failure:
    """What an error tells: a pause in seconds, a sign of congestion, or neither."""

    pause: float | None
    congested: bool


class Turnstile:
    """The queue of waiters and the meter that admits them.

    Args:
        limits: what the meter holds calls to.
        adaptive: what adapts the limit on the calls in flight, if anything does.
        timeout: seconds that a call may wait, unless the call says otherwise.
        name: what errors call it.
        clock: gives it the time, and calls it back.
    """

    def __init__(
        self, limits: Limits, adaptive: AdaptiveLimit | None, *, timeout: float | None, name: str | None, clock: Clock
    ) -> None:
        self._meter = Meter(limits)
        self._adaptive = adaptive
        self.timeout = timeout
        self.name = name
        self._clock = clock
        self._now = clock.now  # read before it is called: `self._now()` would be looked up as a method each time
        self._admitted: int = 0
        self._rejected: int = 0
        self._waits: deque[tuple[int, float]] = deque(maxlen=RECENT)  # which admission had to wait, and how long
        self._wakeups: Wakeups | None = None  # of the loop in which a task last waited
        self._loops: set[Wakeups] = set()  # of all loops in which a task has waited
        self._begin()
        _turnstiles.add(self)

    def _begin(self) -> None:
        """Start with nobody inside and nobody waiting."""
        self._lock = threading.Lock()
        # A `for` over one of these takes the lock, or tries to. An interrupt may come between `acquire()` and `try`,
        # but not between `for` and `try`, nor after `with`, which takes twice as long and can't merely try.
        self._locking = iter(self._lock.acquire, None)
        self._trying = map(self._lock.acquire, repeat(False))  # noqa: FBT003  (of `repeat`)
        self._queue: deque[Permit] = deque()  # the first one waits; behind it may be some that have left
        self._abandoned: int = 0  # how many of these there are
        self._rate_only: deque[Permit] = deque()  # those in the queue that need no slot
        self._departed: deque[tuple[Permit, object]] = deque()  # with the outcome of the call
        self._must_look = False  # something has changed since the queue was last checked
        self._look_below: int = 0  # with fewer calls inside than this, waiters may be in a deadlock
        self._look_is_due = False
        self._look_not_before = 0.0
        self._timer: Timer | None = None
        self._knows_permits = True  # a permit that looks held is held

    def _after_fork(self) -> None:
        """Keep, in a forked child, only the calls that the forking thread is in."""
        self._begin()
        self._meter.inside.clear()
        for permit in permits():
            if permit.issuer is self and permit.slots and permit.thread:  # else a thread that is not here may leave it
                self._meter.inside.add(permit)

    @property
    def _waiting(self) -> int:
        return len(self._queue) - self._abandoned

    # --- entering ---

    def _enter(self, cost: float = 1, slots: int = 1, timeout: float | None = None) -> Permit:
        """Wait in this thread for a slot and the rate; code that runs in this context leaves the permit."""
        if cost != 1 or slots != 1 or timeout is not None:
            cost, timeout = _checked(cost, slots, timeout)
        permit = Permit().ask(self, cost, slots)
        if not self._admit(permit):
            ready = allocate_lock()
            ready.acquire()
            permit.ready = ready  # set only now, as it may be released from this moment on
            try:
                self._drop_closed_loops()
                self._guard_wait(permit, held_by_this_thread, timeout)
                if permit.queue is not None:
                    ready.acquire()
            except BaseException:
                permit.give_up()
                raise
            if permit.timer is not None or permit.at is None:
                self._check_admitted(permit)
        permit.token = set_innermost(permit)  # `begin()`, without a call
        return permit

    async def _aenter(self, cost: float = 1, slots: int = 1, timeout: float | None = None) -> Permit:
        """Wait in this task for a slot and the rate; code that runs in this context leaves the permit."""
        if cost != 1 or slots != 1 or timeout is not None:
            cost, timeout = _checked(cost, slots, timeout)
        permit = Permit().ask(self, cost, slots)
        permit.in_task = True
        if not self._admit(permit):
            try:
                ready: asyncio.Future[None] = asyncio.Future()  # looks up the running loop, which is slow: done once
                loop, wakeups = ready.get_loop(), self._wakeups
                if wakeups is None or wakeups.loop() is not loop:
                    self._wakeups = wakeups = wakeups_of(loop)
                    self._drop_closed_loops()
                    self._loops.add(wakeups)
                permit.wakeups = wakeups
                permit.ready = ready
                if permit.outer or timeout is not None or self.timeout is not None or get_scope():
                    self._guard_wait(permit, held_by_this_task, timeout)
                if permit.queue is not None:  # checked last: whoever admits it checks `ready` last
                    await ready
            except BaseException:
                permit.give_up()
                raise
            if permit.timer is not None or permit.at is None:
                self._check_admitted(permit)
        permit.token = set_innermost(permit)  # `begin()`, without a call
        return permit

    def _admit(self, permit: Permit, *, queue: bool = True) -> bool:  # noqa: C901  (the `for` is a `with`)
        """Admit a call at once, or put it at the end of the queue."""
        for _ in self._locking:
            try:
                read_clock, at = self._now, 0.0
                now = read_clock()
                if self._departed:
                    self._take_back(now)
                if not self._queue or (not permit.slots and self._may_pass()):
                    at = self._meter.admit(now, permit.cost, now, permit if permit.slots else None)
                    if not at:
                        permit.at = now
                        self._admitted += 1
                        return True
                if permit.cost > self._meter.largest_cost:
                    self._meter.limits.check_affordable(permit.cost, self._title())
                if queue:
                    if at:
                        self._call_back_at(at)
                    permit.queue_up(self._queue, now, len(self._queue) - self._abandoned)
                    if not permit.slots:
                        self._rate_only.append(permit)
                    if self._departed or (
                        len(self._meter.inside) < self._meter.slots and (self._timer is None or at == math.inf)
                    ):
                        # A call left after the slot was asked for, and saw no queue; or an interrupt kept it from
                        # checking the queue.
                        self._must_look = True
                break
            finally:
                self._lock.release()
                if self._must_look:
                    self._settle()
        return False

    def _drop_closed_loops(self) -> None:
        """Take back the places of waiters whose event loop is closed, and of calls that are inside because of them.

        Their tasks never go on, but refer to what awaits them, which may be the call that has the slot.
        """
        closed = {wakeups for wakeups in list(self._loops) if wakeups.is_closed()}
        if not closed:
            return
        waiting: list[Permit] = []
        for got in self._trying:
            if not got:
                return  # a finalizer may run this in a thread that holds the lock
            try:
                waiting = [permit for permit in self._queue if permit.queue is not None and permit.is_on(closed)]
            finally:
                self._lock.release()
            break
        self._loops.difference_update(closed)
        self._settle()
        if not waiting:
            return
        while waiting:
            permit = waiting.pop()
            permit.ready = None  # it refers to the task
            permit.give_up()
            del permit
        gc.collect()  # such a call is garbage now, in a reference cycle, and its slot is needed

    def _may_pass(self) -> bool:
        """Whether all calls ahead wait for a slot; then a call that needs none, being inside already, may pass them."""
        return not self._rate_only and self._meter.is_full

    # --- for deadlock detection; called without the lock, as calls leave without it ---

    def _inside(self) -> frozenset[Permit]:
        """Return the calls inside at this moment."""
        return frozenset(self._meter.inside)

    def _places(self) -> float:
        """Return how many calls inside must be stuck for none to be admitted; infinity if that would prove nothing."""
        limit = self._meter.limits.limit
        return math.inf if limit is None or not self._knows_permits else limit

    def _waiting_on(self, loop: asyncio.AbstractEventLoop) -> list[asyncio.Future[None]]:
        """Return the futures that tasks of a loop wait on without a timeout."""
        with self._lock:
            waiting = [permit for permit in self._queue if permit.in_task and permit.timer is None]
        self._settle()
        futures = [permit.ready for permit in waiting if permit.queue is not None]  # not those of empty places
        return [future for future in futures if future is not None and future.get_loop() is loop and not future.done()]

    def _title(self) -> str:
        """Return what errors call it."""
        return f"limiter {self.name}" if self.name else "limiter"

    def _count_rejected(self) -> None:
        """Count a call that is turned away."""
        with self._lock:
            self._rejected += 1
        self._settle()

    def _guard_wait(self, permit: Permit, held: Callable[[], list[Permit]], timeout: float | None) -> None:
        """Make sure that a queued call ends its wait if it is deadlocked, late or called off."""
        timeout = self.timeout if timeout is None else timeout
        if (scope := get_scope()) is not None and not scope.watch(permit):
            raise asyncio.CancelledError(_OUTER_ENDED)
        if permit.slots and (permit.outer is not None or not permit.in_task):
            come_to_wait(permit, held(), scope, gives_up=timeout is not None)
        if permit.queue is not None and timeout is not None:
            permit.timer = self._clock.call_at(permit.since + timeout, partial(self._expire, permit))

    def _expire(self, permit: Permit) -> None:
        """Turn away a waiter whose time is up; the clock calls this."""
        with self._lock:
            if permit.queue is self._queue:
                self._turn_away(permit)
        self._settle()

    def _check_admitted(self, permit: Permit) -> None:
        """Raise the reason why a call that has waited was not admitted, if it was not."""
        if permit.timer is not None:
            permit.timer.cancel()
        waits = permit.queue is not None  # checked first: `at` is set before an admitted call leaves the queue
        if permit.at is not None:
            return
        if permit.told is not None:
            try:
                raise permit.told
            finally:
                permit.told = None  # its traceback holds this frame
        if waits or permit.ended:
            permit.give_up()
            raise asyncio.CancelledError(_OUTER_ENDED)
        raise self._timed_out(permit)

    def _timed_out(self, permit: Permit) -> LimitTimeout:
        paused = self._paused_for()
        way_out = "Raise timeout= or the limit, or send less."
        if paused > 0:
            way_out = f"By a Retry-After all calls are paused for another {paused:.4g} s."
        return LimitTimeout(
            f"{self._title()}: not admitted within {self._now() - permit.since:.3g} s; {permit.ahead} calls were "
            f"ahead of it when it came. {way_out}"
        )

    def _paused_for(self) -> float:
        """Return for how many more seconds no call is admitted; 0 or less if there is no pause."""
        return self._meter.paused_until - self._now()

    # --- the queue; called with the lock held ---

    def _pump(self, now: float) -> None:
        """Admit from the front while the meter allows."""
        queue, meter = self._queue, self._meter
        while queue:
            permit = queue[0]
            if at := meter.admit(now, permit.cost, permit.since, permit if permit.slots else None):
                if at < math.inf or not self._rate_only:
                    self._call_back_at(at)
                    break
                permit = self._rate_only[0]  # a call that needs no slot passes those that wait for one
                if at := meter.admit(now, permit.cost, permit.since):
                    self._call_back_at(at)
                    break
            self._let_in(permit, now)

    def _let_in(self, permit: Permit, now: float) -> None:
        """Take a waiter that the meter has admitted out of the queue, count it, and wake it."""
        permit.at = now  # before it leaves the queue, as who finds itself outside looks whether it was admitted
        if permit.slots and permit.within is None and not self._abandoned:
            permit.queue = None  # `_dequeue()` of the first, without a call
            self._queue.popleft()
        else:
            self._dequeue(permit)
        self._admitted = admitted = self._admitted + 1
        self._waits.append((admitted, now - permit.since))
        self._wake(permit)

    def _wake(self, permit: Permit) -> None:
        """Wake the waiter of a permit that has just left the queue: now, so that tasks start in queue order."""
        ready = permit.ready
        if ready is None:
            return  # it has not begun to wait, and will see the outcome
        if permit.in_task:
            wakeups = permit.wakeups
            wakeups.woken.append(permit)
            pending = wakeups.pending  # `ask_for_round()`, without a call
            if pending() is None:
                wakeups.schedule()
        else:
            ready.release()

    def _dequeue(self, permit: Permit) -> None:
        """Take a waiter out. Unless it is first, its place stays, empty, until it is first or most places are."""
        queue = self._queue
        permit.queue = None
        if permit is queue[0]:
            queue.popleft()
            while queue and queue[0].queue is None:
                queue.popleft()
                self._abandoned -= 1
        else:
            self._abandoned += 1
            if self._abandoned > _ABANDONED and 2 * self._abandoned > len(queue):
                self._close_up()
        if not permit.slots:
            while self._rate_only and self._rate_only[0].queue is None:
                self._rate_only.popleft()
        if permit.within is not None:
            permit.end_wait()

    def _close_up(self) -> None:
        """Drop the empty places. This runs only when most places are empty, so it costs O(1) per waiter."""
        for queue in (self._queue, self._rate_only):
            waiting = [permit for permit in queue if permit.queue is not None]
            queue.clear()
            queue.extend(waiting)
        self._abandoned = 0

    def _turn_away(self, permit: Permit) -> None:
        self._dequeue(permit)
        self._rejected += 1
        self._wake(permit)

    def _call_back_at(self, at: float) -> None:
        if at == math.inf or (self._timer is not None and self._timer.when <= at):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._clock.call_at(at, self._tick)

    def _take_back(self, now: float) -> None:
        """Take back the places of calls that have departed, and learn from their outcomes."""
        while self._departed:
            permit, outcome = self._departed.popleft()
            if permit.at is None:
                if getattr(permit, "queue", None) is self._queue and (outcome is _UNUSED or outcome is _CALLED_OFF):
                    permit.ended = True
                    self._dequeue(permit)
                    if outcome is _CALLED_OFF:
                        self._wake(permit)
                continue
            if outcome is _CALLED_OFF:
                continue  # it was admitted before
            self._learn(permit, outcome, permit.at, now)
            if permit.slots and not self._meter.release(permit) and permit in _robbed:
                self._rob_another()
            permit.at = None  # two threads may give it up at the same moment; take it back only once

    def _rob_another(self) -> None:
        """Give back the slot of some other call, for a call whose own is gone; the other call will do the same."""
        for other in list(self._meter.inside):
            _robbed.add(other)  # before its slot is taken, or it could leave unnoticed
            if self._meter.release(other):
                return
            _robbed.discard(other)

    def _learn(self, permit: Permit, outcome: object, at: float, now: float) -> None:
        if outcome is _UNUSED:
            self._meter.correct(at, -permit.cost)
            return
        if isinstance(outcome, _Failure) and outcome.pause is not None:
            self._meter.pause(now + outcome.pause)
        if self._adaptive is not None and permit.slots and self._adapt(self._adaptive, outcome, at, now):
            self._configure(dataclasses.replace(self._meter.limits, limit=self._adaptive.limit))

    def _adapt(self, adaptive: AdaptiveLimit, outcome: object, at: float, now: float) -> bool:
        in_flight = len(self._meter.inside)
        if isinstance(outcome, _Failure):
            return outcome.congested and adaptive.failed(now, at, in_flight, outcome.pause or 0.0)
        return adaptive.succeeded(now, in_flight)

    def _configure(self, limits: Limits) -> None:
        self._meter.configure(limits)
        inside = len(self._meter.inside)
        self._look_below = 0 if inside < self._meter.slots else inside + 1

    def _heed_shrinking(self) -> None:
        """Schedule a check for a deadlock of the calls left inside, after the limit shrank below their number.

        At a limit that has not shrunk, the last call that begins to wait sees the deadlock. The timer thread does the
        check, as this may run in a finalizer.
        """
        inside = len(self._meter.inside)
        if inside < self._look_below:
            self._look_below = inside if inside > self._meter.slots else 0
            if self._queue and not self._look_is_due:
                self._look_is_due = True
                try:
                    monotonic_clock.call_at(self._look_not_before, self._look_at_threads)
                except RuntimeError:  # the program is ending, and can start no more threads
                    self._look_is_due = False

    def _look_at_threads(self) -> None:
        start = monotonic_clock.now()
        self._look_is_due = False  # a call that leaves from now on may be missed
        with self._lock:
            waiting = [permit for permit in self._queue if not permit.in_task and permit.blocks]
        self._settle()
        look_at_threads(waiting)
        end = monotonic_clock.now()
        self._look_not_before = end + SHARE * (end - start)

    # --- leaving; called without the lock ---

    def _give_back(self, permit: Permit, error: BaseException | None) -> None:
        """Take back the place of a call that has ended; `error` is what it raised.

        A finalizer may end a call in the middle of anything, even in the thread that holds the lock. So leaving never
        waits for the lock: whoever holds it checks the queue once more after releasing it.
        """
        if error is None and self._adaptive is None:
            try:
                if permit.slots:
                    self._meter.inside.remove(permit)  # `release()`, without a call
            except KeyError:
                pass  # its slot has already been given back
            else:
                if self._queue:
                    self._pass_on()
                return
        outcome: object = None
        try:
            outcome = None if error is None else self._judge(error)
        finally:
            self._departed.append((permit, outcome))
            if error is not None or self._queue:
                self._settle()

    def _give_back_other(self, error: BaseException | None) -> None:
        """Take back the place of some call inside, as it is not known which one has ended.

        The slot is then free, but its permit still looks held where it was entered. So from then on no deadlock is
        certain.
        """
        self._knows_permits = False
        permit = Permit().ask(self, 1, 1)
        permit.at = self._now()
        _robbed.add(permit)
        permit.end(error)

    def _give_up(self, permit: Permit) -> None:
        """Take back the place of a call that will never start, whether it still waits or has been admitted."""
        self._departed.append((permit, _UNUSED))
        self._settle()

    def _call_off(self, permit: Permit) -> None:
        """Make a call that still waits give up: its place is taken at once, and it is woken."""
        if permit.queue is not None:
            permit.is_called_off = True
            self._departed.append((permit, _CALLED_OFF))
            self._settle()

    def _judge(self, error: BaseException) -> _Failure:
        """Return what an error tells; the error itself must propagate, whatever happens while it is examined."""
        pause = None
        try:
            congestion = congestion_of(error)
            pause = None if congestion is None else congestion.retry_after
            return _Failure(pause, congested=self._adaptive is not None and bool(self._adaptive.config.on(error)))
        except Exception as failure:  # noqa: BLE001  (the error's own attributes, or the user's `on=`)
            error.add_note(f"{self._title()}: whether this is a congestion can't be told: {failure!r}")
            return _Failure(pause, congested=False)

    def _pass_on(self) -> None:
        """Give a free slot to the first waiter: a fast path of `_settle()` for when only slots limit."""
        for got in self._trying:
            if not got:
                break
            first = None
            try:
                queue, meter, read_clock = self._queue, self._meter, self._now
                now = read_clock()
                if (
                    len(meter.inside) + 1 == meter.slots_alone
                    and now >= meter.paused_until
                    and not self._departed
                    and queue
                    and queue[0].slots
                ):
                    first = queue[0]
                    meter.inside.add(first)
                    self._let_in(first, now)
            finally:
                self._lock.release()
                if first is None or self._must_look:
                    self._settle()
            return
        self._settle()

    def _settle(self) -> None:
        """Take back the places of departed calls, and admit the next: now, or once the holder of the lock releases it.

        So whoever holds the lock has to call this after releasing it.
        """
        self._must_look = True
        for got in self._trying:
            if not got:
                return
            try:
                self._must_look = False
                read_clock = self._now
                now = read_clock()
                if self._departed:
                    self._take_back(now)
                self._pump(now)
                if not self._queue and self._timer is not None:
                    self._timer.cancel()  # else it would keep the limiter alive
                    self._timer = None
                if self._look_below:
                    self._heed_shrinking()
            except BaseException:
                self._must_look = True  # left to the next caller
                raise
            finally:
                self._lock.release()
            if not self._must_look:
                return

    def _tick(self) -> None:
        with self._lock:
            self._timer = None
        self._settle()

    def _entered(self) -> Permit | None:
        """Return the innermost permit of this limiter in this context."""
        return next((permit for permit in permits() if permit.issuer is self), None)


def _checked(cost: float, slots: int, timeout: float | None) -> tuple[float, float | None]:
    if slots not in (0, 1):
        raise ValueError(f"slots={slots!r}: a call takes one slot, or with slots=0 the rate alone")
    seconds = None if timeout is None else check_positive("timeout", timeout, "timeout=30")
    return check_not_negative("cost", cost, "cost=20"), seconds


_robbed: weakref.WeakSet[Permit] = weakref.WeakSet()
"""Calls inside whose slots others have given back; one set for all limiters, as it is nearly always empty."""

_turnstiles: weakref.WeakSet[Turnstile] = weakref.WeakSet()


def _after_fork() -> None:
    for turnstile in list(_turnstiles):
        turnstile._after_fork()


at_fork(after_in_child=_after_fork)


def _forget_calls() -> None:
    set_innermost(None)
    _after_fork()


in_worker(_forget_calls)
