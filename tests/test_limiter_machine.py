"""The real limiter under a fake clock, through every sequence of events that hypothesis can think of."""

import asyncio
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from asyncify.errors import LimitTimeout
from asyncify.limiter import Limiter
from asyncify.meter import CATCH_UP
from asyncify.permits import Permit
from asyncify.testing import FakeClock

EPSILON = 1e-9


class Waiter:
    """A call that came, and what has become of it."""

    def __init__(self, number: int, cost: float, slots: int, came: float, timeout: float | None) -> None:
        self.number = number
        self.cost = cost
        self.slots = slots
        self.came = came
        self.timeout = timeout
        self.task: asyncio.Task[Permit]
        self.admitted_at: float | None = None
        self.ended = False


class Observed(Limiter):
    """The limiter, which tells in what order it has admitted: at one moment it may admit several."""

    def __init__(self, **given: Any) -> None:
        self.order: list[Permit] = []
        super().__init__(**given)

    def _admit(self, permit: Permit, *, queue: bool = True) -> bool:
        admitted = super()._admit(permit, queue=queue)
        if admitted:
            self.order.append(permit)
        return admitted

    def _let_in(self, permit: Permit, now: float) -> None:
        super()._let_in(permit, now)
        self.order.append(permit)


class LimiterMachine(RuleBasedStateMachine):
    """Calls come, wait, are cancelled, time out, run and end; limits change and time passes."""

    @initialize(
        limit=st.none() | st.integers(1, 3),
        per_second=st.none() | st.sampled_from([1, 2, 10]),
        per_minute=st.none() | st.sampled_from([3, 20]),
        burst=st.integers(1, 3),
    )
    def begin(self, limit: int | None, per_second: float | None, per_minute: float | None, burst: int) -> None:
        if limit is per_second is per_minute is None:
            limit = 1
        rate = per_second or per_minute
        self.loop = asyncio.new_event_loop()
        self.clock = FakeClock()
        self.limiter = Observed(
            limit=limit,
            per_second=per_second,
            per_minute=per_minute,
            burst=min(burst, int(rate)) if rate else None,
            clock=self.clock,
        )
        self.calls: list[Waiter] = []
        self.started: list[Waiter] = []
        self.paused_until = 0.0

    # --- rules ---

    @rule(
        cost=st.sampled_from([1, 1, 1, 2, 0.5, 0]),
        slots=st.sampled_from([1, 1, 1, 0]),
        timeout=st.none() | st.just(0.7),
    )
    def come(self, cost: float, slots: int, timeout: float | None) -> None:
        if cost > self.limiter._limits.largest_cost:
            return
        waiter = Waiter(len(self.calls), cost, slots, self.clock.now(), timeout)
        waiter.task = self.loop.create_task(self.limiter.aenter(cost, slots, timeout))
        self.calls.append(waiter)
        self.settle()

    @precondition(lambda self: self.running())
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        waiter = data.draw(st.sampled_from(self.running()))
        waiter.ended = True
        waiter.task.result().end()
        self.settle()

    @precondition(lambda self: self.waiting())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.waiting())).task.cancel()
        self.settle()

    @precondition(lambda self: self.running() and self.waiting())
    @rule(data=st.data())
    def end_and_cancel_whoever_is_admitted(self, data: st.DataObject) -> None:
        """A slot is given back and the waiter that gets it is cancelled before its loop runs."""
        waiting = self.waiting()
        waiter = data.draw(st.sampled_from(self.running()))
        waiter.ended = True
        waiter.task.result().end()
        for other in waiting[:2]:
            other.task.cancel()
        self.settle()

    @rule(limit=st.integers(1, 4))
    def resize(self, limit: int) -> None:
        old = self.limiter._limits.limit
        if old is not None:
            self.limiter.resize(limit=limit)
            self.settle()

    @rule(seconds=st.sampled_from([0.0, 0.1, 0.25, 0.7, 1.0, 5.0, 61.0]))
    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.settle()

    # --- what is true at all times ---

    @invariant()
    def slots_add_up(self) -> None:
        stats = self.limiter.stats()

        assert stats.in_flight == sum(waiter.slots for waiter in self.running())
        assert stats.waiting == len(self.waiting())

    @invariant()
    def nobody_waits_in_vain(self) -> None:
        """If the front waits, there is a reason: no slot, or a timer that will let it in."""
        if waiting := self.waiting():
            front = waiting[0]
            stats = self.limiter.stats()
            full = stats.limit is not None and stats.in_flight >= stats.limit and front.slots
            assert full or ", 0 timers" not in repr(self.clock)

    # --- helpers ---

    def running(self) -> list[Waiter]:
        return [waiter for waiter in self.started if not waiter.ended]

    def waiting(self) -> list[Waiter]:
        return [waiter for waiter in self.calls if not waiter.task.done()]

    def settle(self) -> None:
        """Let the loop run until nothing more happens, and look at who came in."""
        for _ in range(4):
            self.loop.call_soon(self.loop.stop)
            self.loop.run_forever()
        done = [waiter for waiter in self.calls if waiter.task.done() and not waiter.task.cancelled()]
        new = [waiter for waiter in done if waiter.task.exception() is None and waiter not in self.started]
        for waiter in new:
            self.check_admission(waiter, waiter.task.result())
        for waiter in new:
            self.check_pace(waiter)
        for waiter in done:
            if waiter.task.exception() is not None:
                self.check_timeout(waiter)

    def check_timeout(self, waiter: Waiter) -> None:
        assert isinstance(waiter.task.exception(), LimitTimeout)
        assert waiter.timeout is not None
        assert self.clock.now() >= waiter.came + waiter.timeout

    def check_admission(self, waiter: Waiter, permit: Permit) -> None:
        assert permit.at is not None
        waiter.admitted_at = permit.at
        limits = self.limiter._limits
        ahead = [other for other in self.waiting() if other.number < waiter.number]
        assert not [other for other in ahead if other.slots == 0 or waiter.slots], "overtaken"
        self.started.append(waiter)
        if limits.limit is not None and waiter.slots:
            assert sum(other.slots for other in self.running()) <= limits.limit
        for rate in limits.rates:
            times = [(waiter.admitted_at or 0.0, waiter.cost) for waiter in self.started]
            assert sum(cost for at, cost in times if at <= permit.at < at + rate.period) <= rate.amount + EPSILON

    def check_pace(self, waiter: Waiter) -> None:
        limits = self.limiter._limits
        if not limits.rates:
            return
        interval = limits.rates[0].period / limits.rates[0].amount
        in_order = sorted(self.started, key=lambda other: self.limiter.order.index(other.task.result()))
        due = 0.0
        for earlier in reversed(in_order[: in_order.index(waiter)]):
            due += earlier.cost * interval
            assert waiter.admitted_at is not None
            assert earlier.admitted_at is not None
            passed = waiter.admitted_at - earlier.admitted_at
            assert passed >= due - CATCH_UP - (limits.burst - 1) * interval - EPSILON

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        for _ in range(1000):
            for waiter in self.running():
                waiter.ended = True
                waiter.task.result().end()
            self.advance(1.0)
            if not self.waiting() and not self.running():
                break
        stats = self.limiter.stats()
        self.loop.close()
        assert (stats.in_flight, stats.waiting) == (0, 0)


TestLimiterMachine = LimiterMachine.TestCase
TestLimiterMachine.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
