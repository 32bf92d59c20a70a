"""The arithmetic of admission, against a slow model that keeps every admission and adds up every window."""

import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy import float32, int64

from asyncify.meter import CATCH_UP, PERIODS, Limits, Meter, Rate, _Window

EPSILON = 1e-9
GRAIN = 1 / 1000  # what coarse windows may cost, as a share of their period


def limits(*, limit: int | None = None, burst: int | None = None, **amounts: float) -> Limits:
    """Return limits by the names that a limiter gives them."""
    return Limits.of(limit=limit, burst=burst, **{**dict.fromkeys(PERIODS), **amounts})


def run(
    meter: Meter, until: float, *, cost: float = 1, start: float = 0, late: Callable[[], float] = float
) -> list[float]:
    """Return when the calls of an endless queue start, if each wake comes `late()` seconds after its time."""
    starts = []
    now = start
    while now < until:
        at = meter.admit(now, cost, start, "the only one")
        if at:
            now = at + late()
        else:
            starts.append(now)
            meter.release("the only one")
    return starts


@dataclass(eq=False)
class Waiter:
    cost: float
    slots: int
    since: float


@dataclass
class Call:
    number: int
    at: float
    waiter: Waiter
    running: bool = True

    @property
    def cost(self) -> float:
        return self.waiter.cost


class Model:
    """A queue before a meter, with every admission written down and every promise checked by adding up."""

    def __init__(self, first: Limits) -> None:
        self.now = 0.0
        self.meter = Meter(first)
        self.queue: deque[Waiter] = deque()
        self.calls: list[Call] = []  # all that count: those that never started are taken out
        self.even_since = 0  # the pace is checked from this call on: a resize starts anew
        self.numbers = itertools.count()
        self.rate_since = {rate.period: 0 for rate in first.rates}  # the first call that a rate knows of
        self.paused_until = 0.0
        self.burst = first.burst  # the largest so far: what was started back to back is paid for later

    @property
    def limits(self) -> Limits:
        return self.meter.limits

    def in_flight(self) -> int:
        return sum(call.waiter.slots for call in self.calls if call.running)

    def spent(self, rate: Rate, now: float) -> float:
        """Return what has been spent in the window that ends at `now`, added up call by call."""
        return sum(c.cost for c in self.calls if c.at + rate.period > now and c.number >= self.rate_since[rate.period])

    def room_at(self, cost: float) -> float:
        """Return the earliest moment at which all windows have room, by trying every moment that might be it."""
        moments = sorted({self.now, *(c.at + r.period for c in self.calls for r in self.limits.rates)})
        return next(
            moment
            for moment in moments
            if moment >= self.now
            and all(self.spent(rate, moment) + cost <= rate.amount + EPSILON for rate in self.limits.rates)
        )

    def pump(self) -> float:
        """Let the front of the queue in; return when the meter wants to be asked again."""
        while self.queue:
            waiter = self.queue[0]
            if waiter.cost > self.limits.largest_cost:
                self.queue.popleft()  # a limiter turns it away
                continue
            at = self.meter.admit(self.now, waiter.cost, waiter.since, waiter if waiter.slots else None)
            if at:
                self.check_refusal(waiter, at)
                return at
            self.queue.popleft()
            self.check_admission(waiter)
        return math.inf

    def check_admission(self, waiter: Waiter) -> None:
        call = Call(next(self.numbers), self.now, waiter)
        self.calls.append(call)
        assert self.now >= self.paused_until
        assert len(self.meter.inside) == self.in_flight()
        if self.limits.limit is not None and waiter.slots:
            assert self.in_flight() <= self.limits.limit
        for rate in self.limits.rates:
            assert self.spent(rate, self.now) <= rate.amount + EPSILON, f"window over: {rate}"
        if self.limits.rates:
            self.check_pace()

    def check_pace(self) -> None:
        interval = self.limits.rates[0].period / self.limits.rates[0].amount
        allowed = CATCH_UP + (self.limits.burst - 1) * interval + EPSILON
        for first in range(self.even_since, len(self.calls)):
            due = sum(call.cost for call in self.calls[first:-1]) * interval
            assert self.now - self.calls[first].at >= due - allowed, "more was made up for than may be"

    def check_refusal(self, waiter: Waiter, at: float) -> None:
        """Nobody waits without a reason, nor longer than the reason lasts."""
        assert at > self.now
        if math.isinf(at):
            assert waiter.slots
            assert self.limits.limit is not None
            assert self.in_flight() >= self.limits.limit
            return
        reasons = [self.paused_until]
        if self.limits.rates:
            reasons.append(self.room_at(waiter.cost) + GRAIN * max(rate.period for rate in self.limits.rates))
            if self.calls:
                interval = self.limits.rates[0].period / self.limits.rates[0].amount
                reasons.append(self.calls[-1].at + (self.calls[-1].cost + self.burst - 1) * interval)
        assert at <= max(reasons) + EPSILON

    # --- what may happen to it ---

    def arrive(self, cost: float, slots: int) -> None:
        self.queue.append(Waiter(cost, slots, self.now))
        if len(self.queue) == 1:
            self.pump()

    def cancel(self, number: int) -> None:
        if self.queue:
            del self.queue[number % len(self.queue)]
            self.pump()

    def finish(self, number: int) -> None:
        if running := [call for call in self.calls if call.running]:
            call = running[number % len(running)]
            call.running = False
            assert self.meter.release(call.waiter) == bool(call.waiter.slots)
            self.pump()

    def never_started(self, number: int) -> None:
        known_since = max(self.rate_since.values(), default=0)
        if running := [call for call in self.calls if call.running and call.number >= known_since]:
            call = running[number % len(running)]
            self.even_since -= self.calls.index(call) < self.even_since
            self.calls.remove(call)
            self.meter.correct(call.at, -call.cost)
            assert self.meter.release(call.waiter) == bool(call.waiter.slots)
            self.pump()

    def resize(self, new: Limits) -> None:
        coming = next(self.numbers)
        self.rate_since = {rate.period: self.rate_since.get(rate.period, coming) for rate in new.rates}
        self.burst = max(self.burst, new.burst)
        self.meter.configure(new)
        self.even_since = len(self.calls)
        self.pump()

    def pause(self, seconds: float) -> None:
        self.paused_until = max(self.paused_until, self.now + seconds)
        self.meter.pause(self.now + seconds)

    def pass_punctually(self, seconds: float) -> None:
        """Let time pass, with a wake at every moment that the meter names."""
        end = self.now + seconds
        while (at := self.pump()) <= end:
            self.now = at
        self.now = end
        self.pump()

    def pass_asleep(self, seconds: float) -> None:
        """Let time pass with no wake but one at the end."""
        self.now += seconds
        self.pump()


COSTS = st.sampled_from([1, 1, 1, 0, 0.1, 0.5, 2, 3.7])
SECONDS = st.sampled_from([0.0, 0.001, 0.01, 0.02, 0.05, 0.3, 1.0, 2.5, 61.0])
NUMBERS = st.integers(0, 50)


@st.composite
def any_limits(draw: st.DrawFn) -> Limits:
    """Draw limits of every mixture."""
    limit = draw(st.none() | st.integers(1, 4))
    amounts = {name: draw(st.none() | st.sampled_from([1, 2, 3.5, 5, 20, 1000])) for name in PERIODS}
    if limit is None and not any(amounts.values()):
        limit = 1
    shortest = next((amount for amount in amounts.values() if amount), None)
    burst = draw(st.none() | st.integers(1, int(shortest)) | st.just(int(shortest))) if shortest else None
    return Limits.of(limit=limit, burst=burst, **amounts)


EVENTS = st.one_of(
    st.tuples(st.just(Model.arrive), COSTS, st.sampled_from([1, 1, 0])),
    st.tuples(st.just(Model.arrive), st.just(1), st.just(1)),
    st.tuples(st.just(Model.cancel), NUMBERS),
    st.tuples(st.just(Model.finish), NUMBERS),
    st.tuples(st.just(Model.never_started), NUMBERS),
    st.tuples(st.just(Model.resize), any_limits()),
    st.tuples(st.just(Model.pause), SECONDS),
    st.tuples(st.just(Model.pass_punctually), SECONDS),
    st.tuples(st.just(Model.pass_asleep), SECONDS),
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(any_limits(), st.lists(EVENTS, max_size=60))
def test_no_sequence_of_events_breaks_a_promise(first: Limits, events: list[tuple[Any, ...]]) -> None:
    """No window over, no place lost, no wait without a reason, whatever comes in whatever order."""
    model = Model(first)
    for event, *arguments in events:
        event(model, *arguments)

    assert len(model.meter.inside) == model.in_flight()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(any_limits(), st.lists(EVENTS, max_size=60))
@example(  # the second was told 3605.0000000012 and not 3605
    Limits(limit=None, rates=(Rate(1000, 1.0),), burst=1),
    [
        (Model.pass_punctually, 2.5),
        (Model.pass_punctually, 2.5),
        (Model.arrive, 1, 1),
        (Model.arrive, 1, 1),
        (Model.resize, Limits(limit=None, rates=(Rate(1, 3600.0),), burst=1)),
    ],
)
def test_everybody_who_waits_comes_in_the_end(first: Limits, events: list[tuple[Any, ...]]) -> None:
    """Once the calls inside end and time passes, the queue is empty and all slots are free."""
    model = Model(first)
    for event, *arguments in events:
        event(model, *arguments)
    while model.queue or model.in_flight():
        model.finish(0)
        model.pass_punctually(3600.0)

    assert not model.meter.inside


def test_what_rounding_leaves_costs_no_wait() -> None:
    """0.1 and 1 and 1 are over 2 by just 0.1, though floats say a little more: the call waits for the 0.1 alone."""
    meter = Meter(limits(per_hour=2, per_second=1000))
    meter.admit(0, 0.1, 0)
    meter.admit(6, 1, 0)

    assert meter.admit(7, 1, 0) == 3600


class TestPace:
    @pytest.mark.parametrize("amount", [1, 3, 10, 50, 500])
    def test_calls_start_evenly(self, amount: int) -> None:
        """Under load and with punctual wakes, calls start `period / amount` seconds apart, to the nanosecond."""
        starts = run(Meter(limits(per_second=amount)), until=5)

        assert starts == pytest.approx([n / amount for n in range(5 * amount)], abs=1e-9)

    @pytest.mark.parametrize("cost", [2, 5])
    def test_the_next_call_waits_for_what_the_last_one_cost(self, cost: int) -> None:
        """A call of cost n takes n times the pace."""
        starts = run(Meter(limits(per_second=10)), until=3, cost=cost)

        assert starts == pytest.approx([n * cost / 10 for n in range(30 // cost)])

    def test_idle_time_earns_nothing(self) -> None:
        """After a long pause in the traffic, calls that come together start as far apart as ever."""
        meter = Meter(limits(per_second=10))
        run(meter, until=0.05)

        assert run(meter, until=100.45, start=100) == pytest.approx([100, 100.1, 100.2, 100.3, 100.4])

    def test_a_slightly_late_wake_is_made_up_for(self) -> None:
        """A wake 15 ms late delays its own call alone: the next one starts on the old schedule."""
        meter = Meter(limits(per_second=10))
        delays = iter([0.0, 0.015, 0.0, 0.0, 0.0])

        starts = run(meter, until=0.45, late=lambda: next(delays))

        assert starts == pytest.approx([0, 0.1, 0.215, 0.3, 0.4])

    def test_a_very_late_wake_is_made_up_for_within_the_bound(self) -> None:
        """Of a wake that comes 70 ms late, 20 ms are made up for; the schedule moves by the rest."""
        meter = Meter(limits(per_second=10))
        delays = iter([0.07, 0.0, 0.0])

        starts = run(meter, until=0.3, late=lambda: next(delays))

        assert starts == pytest.approx([0, 0.17, 0.25])

    @pytest.mark.parametrize("amount", [50, 500])
    def test_the_rate_is_reached_although_wakes_come_late(self, amount: int) -> None:
        """With every wake up to 10 ms late, at least 99% of the rate is admitted."""
        chance = random.Random(amount)

        starts = run(Meter(limits(per_second=amount)), until=60, late=lambda: chance.uniform(0, 0.01))

        assert len(starts) >= 0.99 * 60 * amount

    def test_waiting_for_a_slot_is_no_lateness(self) -> None:
        """Calls that waited for one slot start evenly once it is free, with nothing to make up for."""
        meter = Meter(limits(limit=1, per_second=10))
        meter.admit(0, 1, 0, "first")
        assert math.isinf(meter.admit(0.5, 1, 0.5, "second"))
        meter.release("first")

        assert meter.admit(1.0, 1, 0.5, "second") == 0
        meter.release("second")
        assert meter.admit(1.01, 1, 0.5, "third") == pytest.approx(1.1)

    def test_a_late_wake_is_made_up_for_after_all_slots_were_taken(self) -> None:
        """That they once were is no reason why a later wake, for a call that needed only its turn, should count."""
        meter = Meter(limits(limit=1, per_second=10))
        meter.admit(0, 1, 0, "first")
        assert math.isinf(meter.admit(0.5, 1, 0.5, "second"))
        meter.release("first")
        meter.admit(1.0, 1, 0.5, "second")
        meter.release("second")

        assert meter.admit(1.115, 1, 1.0, "third") == 0
        meter.release("third")
        assert meter.admit(1.2001, 1, 1.0, "fourth") == 0

    def test_a_late_wake_of_the_first_call_is_made_up_for(self) -> None:
        """The schedule begins when the first call came, not when it was admitted."""
        meter = Meter(limits(limit=1, per_second=10))
        meter.admit(0.015, 1, 0, "first")
        meter.release("first")

        assert meter.admit(0.1, 1, 0, "second") == 0

    def test_a_late_wake_is_made_up_for_beside_a_longer_window(self) -> None:
        """A window that was open all the time takes nothing off what a late wake may make up for."""
        meter = Meter(limits(per_second=10, per_minute=100))
        delays = iter([0.015, 0.0, 0.0, 0.0])

        assert run(meter, until=0.35, late=lambda: next(delays)) == pytest.approx([0, 0.115, 0.2, 0.3])

    def test_one_caller_whose_sleeps_end_late_reaches_the_rate(self) -> None:
        """Who asks again when the last call was admitted, and so late, is not late for that."""
        meter = Meter(limits(per_second=5000))
        now = asked = 0.0
        admitted = 0
        while now < 10:
            if at := meter.admit(now, 1, asked):
                now = at + 0.001
            else:
                admitted += 1
                asked = now

        assert 0.99 * 50_000 <= admitted <= 50_000 + 1

    def test_lateness_counts_for_as_long_as_it_was(self) -> None:
        """A call that comes by itself may make up for what the one before it was late, and for no more."""
        meter = Meter(limits(per_second=100))
        meter.admit(0, 1, 0)
        assert meter.admit(0.011, 1, 0) == 0  # due at 0.01, and so the next at 0.02
        assert meter.admit(0.025, 1, 0.025) == 0

        assert meter.admit(0.026, 1, 0.026) == pytest.approx(0.034)

    def test_lateness_is_forgotten_in_an_idle_time(self) -> None:
        """Calls that come much later start evenly."""
        meter = Meter(limits(per_second=50))
        meter.admit(0, 1, 0)
        assert meter.admit(0.035, 1, 0) == 0  # due at 0.02
        assert meter.admit(10, 1, 10) == 0

        assert meter.admit(10.001, 1, 10.001) == pytest.approx(10.02)

    @pytest.mark.parametrize(("idle", "at"), [(CATCH_UP, 0.0), (CATCH_UP + 0.001, CATCH_UP + 0.011)])
    def test_an_idle_time_in_which_lateness_is_forgotten_is_longer_than_what_is_made_up(
        self, idle: float, at: float
    ) -> None:
        """After just so many seconds it still counts."""
        meter = Meter(limits(per_second=100))
        assert meter.admit(0, 1, -0.01) == 0
        assert meter.admit(idle, 1, idle) == 0

        assert meter.admit(idle, 1, idle) == pytest.approx(at)

    def test_a_pause_is_no_lateness(self) -> None:
        """After a pause calls start evenly, however many had been due during it."""
        meter = Meter(limits(per_second=10))
        meter.pause(5.0)

        assert run(meter, until=5.35) == pytest.approx([5.0, 5.1, 5.2, 5.3])

    def test_waiting_for_a_longer_window_is_no_lateness(self) -> None:
        """After the minute's budget has been waited for, calls start evenly."""
        starts = run(Meter(limits(per_second=10, per_minute=5)), until=61)

        assert starts == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 60, 60.1, 60.2, 60.3, 60.4])

    def test_the_shortest_window_alone_sets_the_pace(self) -> None:
        """A longer window caps and does not slow: 30 a minute start at 10 per second."""
        starts = run(Meter(limits(per_second=10, per_minute=30)), until=59)

        assert starts == pytest.approx([n / 10 for n in range(30)])


class TestBurst:
    def test_calls_start_back_to_back_and_the_window_holds(self) -> None:
        """A burst of 4 lets 4 start at once; the rest come at the pace, and no second has more than 10."""
        starts = run(Meter(limits(per_second=10, burst=4)), until=1.5)

        assert starts[:6] == pytest.approx([0, 0, 0, 0, 0.1, 0.2])
        assert max(sum(t <= u < t + 1 - EPSILON for u in starts) for t in starts) == 10

    def test_a_burst_is_no_lateness(self) -> None:
        """That calls of a burst start before the pace has come to them gives the next burst not one more."""
        meter = Meter(limits(per_second=1000, burst=10))
        meter.admit(0, 1, 0)
        meter.admit(0, 1, 0)

        assert meter.admit(0.01, 1, 0.01) == 0

        assert [meter.admit(0.0101, 1, 0.01) == 0 for _ in range(11)] == [True] * 9 + [False] * 2

    def test_idle_time_earns_one_burst(self) -> None:
        """After any idle time as many calls start at once as the burst says, and no more."""
        meter = Meter(limits(per_second=10, burst=3))
        run(meter, until=0.2)

        assert run(meter, until=50.15, start=50) == pytest.approx([50, 50, 50, 50.1])

    def test_a_full_burst_is_a_window_a_second(self) -> None:
        """With burst equal to the rate, all of a second's calls start at its beginning."""
        starts = run(Meter(limits(per_second=5, burst=5)), until=1.1)

        assert starts[:10] == pytest.approx([0] * 5 + [1] * 5)


class TestWindows:
    @pytest.mark.parametrize(("name", "period"), PERIODS.items())
    def test_a_place_comes_free_exactly_one_period_later(self, name: str, period: float) -> None:
        """An admission counts for one period, not a moment less."""
        meter = Meter(limits(**{name: 1}))
        assert meter.admit(7.0, 1, 7.0) == 0

        assert meter.admit(7.0, 1, 7.0) == 7.0 + period
        assert meter.admit(7.0 + period, 1, 7.0) == 0

    def test_half_a_call_a_second_is_one_in_two_seconds(self) -> None:
        """A rate under one admits calls of cost 1, that much further apart."""
        starts = run(Meter(limits(per_second=0.5)), until=7)

        assert starts == pytest.approx([0, 2, 4, 6])

    def test_half_a_call_a_minute_is_one_in_two_minutes(self) -> None:
        """That holds for a window that sets no pace as well."""
        meter = Meter(limits(per_second=50, per_minute=0.5))
        meter.admit(0, 1, 0)

        assert meter.admit(40, 1, 1) == 120

    def test_a_cost_above_new_limits_never_fits(self) -> None:
        """The answer is infinity, also while others are still in the window."""
        meter = Meter(limits(per_second=10, burst=10))
        meter.admit(0, 1, 0)
        meter.configure(limits(per_second=3))

        assert math.isinf(meter.admit(0.5, 4, 0.5))

    def test_a_trace_of_rounding_waits_for_the_last_admission_and_no_longer(self) -> None:
        """When the log does not add up to what is used, all of it is free when all of the log has left."""
        window = _Window(Rate(10, 1.0))
        window.add(0, 4)
        window.add(0.2, 2)
        window.add(0.3, 1)
        window.used += 1e-6

        assert window.free_at(0.5, 10) == 1.3

    def test_a_correction_leaves_the_window_with_its_admission(self) -> None:
        """What is corrected is the whole entry, which may hold more than one call: all of it leaves together."""
        window = _Window(Rate(10, 1.0))
        window.add(100, 2)
        window.add(100, 2)
        window.add(100.5, 3)
        window.correct(100, -1)
        assert window.used == 6
        window.expire(101)

        assert window.used == 3

    def test_a_rate_under_one_keeps_its_log_when_it_changes(self) -> None:
        """What was admitted at one call in two seconds counts at one call in four."""
        meter = Meter(limits(per_second=0.5))
        meter.admit(0, 1, 0)
        meter.configure(limits(per_second=0.25))

        assert meter.admit(1, 1, 1) == pytest.approx(4)

    def test_rounding_never_stops_the_queue(self) -> None:
        """A call as large as its window waits until the small one before it has left, and no longer."""
        meter = Meter(limits(per_minute=90_000))
        meter.admit(0, 0.1, 0)

        assert meter.admit(1, 90_000, 1) == pytest.approx(60)
        assert meter.admit(60, 90_000, 1) == 0

    def test_memory_does_not_grow_with_the_rate(self) -> None:
        """A million admissions in one window are kept as a thousand sums."""
        meter = Meter(limits(per_second=100_000, burst=100_000))
        for number in range(100_000):
            meter.admit(number / 100_000, 1, 0)

        assert len(meter._windows[0].log) <= 1001
        assert meter._windows[0].used == 100_000

    def test_memory_does_not_grow_with_time(self) -> None:
        """Where there is always room, what has left the window is dropped all the same."""
        meter = Meter(limits(per_second=1_000_000_000))
        for second in range(1000):
            meter.admit(second, 5000, second)

        assert len(meter._windows[0].log) == 1

    def test_calls_that_leave_a_window_together_leave_it_once(self) -> None:
        """Those that come next, in two windows of which each is full, wait for one another and not for them."""
        meter = Meter(limits(per_minute=3, burst=3))
        assert [meter.admit(second, 1, second) for second in (0, 1, 2)] == [0, 0, 0]
        assert [meter.admit(second, 1, second) for second in (100, 101, 102)] == [0, 0, 0]

        assert meter.admit(140, 1, 140) == 160
        assert meter.admit(160, 1, 140) == 0

    def test_the_first_call_after_an_idle_time_counts(self) -> None:
        """An admission that finds only old ones in the window is counted like any other."""
        meter = Meter(limits(per_second=2, burst=2))
        meter.admit(0, 1, 0)
        meter.admit(5, 1, 5)

        assert meter.admit(5, 2, 5) == 6

    def test_coarse_sums_leave_with_the_last_of_them(self) -> None:
        """Two calls that share a sum both count until the second of them is one period old."""
        meter = Meter(limits(per_second=2, burst=2))
        meter.admit(0, 1, 0)
        meter.admit(0.0009, 1, 0)

        assert meter.admit(0.5, 1, 0.5) == 1.0009

    def test_calls_a_grain_apart_are_told_apart(self) -> None:
        """A sum takes no call that comes a thousandth of the period after its first."""
        meter = Meter(limits(per_second=2, burst=2))
        meter.admit(0, 1, 0)
        meter.admit(0.001, 1, 0)

        assert meter.admit(0.5, 1, 0.5) == 1.0

    def test_calls_at_the_pace_of_a_grain_are_told_apart(self) -> None:
        """They come in their time, which is looked at in another place."""
        meter = Meter(limits(per_second=1000))
        meter.admit(0, 1, 0)
        meter.admit(0.001, 999, 0.001)

        assert meter.admit(1.0005, 1, 1.0005) == 0

    def test_calls_that_share_an_entry_leave_the_window_with_all_that_they_cost(self) -> None:
        """A fast pace puts many calls into one entry: it counts until the last of them is a period old, and in full."""
        meter = Meter(limits(per_second=10_000))
        for at, cost in ((0, 1), (0.0002, 2), (0.0005, 3), (0.5, 1)):
            assert meter.admit(at, cost, at) == 0
        assert meter.admit(1.0004, 9994, 1.0004) == 1.0005

        assert meter.admit(1.0005, 10_000, 1.0005) == 1.5
        assert meter.admit(1.0005, 9999, 1.0005) == 0

    def test_every_rate_holds_at_once(self) -> None:
        """The tightest of the moment decides; the hour tells no finer apart than 3.6 s."""
        starts = run(Meter(limits(per_second=1, per_minute=3, per_hour=5)), until=3602.5)

        assert starts == pytest.approx([0, 1, 2, 60, 61, 3602])


class TestCorrections:
    def test_a_call_that_never_started_costs_nothing(self) -> None:
        """Its token and its turn go to the next."""
        meter = Meter(limits(per_second=1))
        meter.admit(0, 1, 0)
        meter.correct(0, -1)

        assert meter.admit(0.1, 1, 0.1) == 0

    def test_a_call_that_cost_more_delays_the_next(self) -> None:
        """A correction upwards counts in the windows and moves the pace."""
        meter = Meter(limits(per_second=10))
        meter.admit(0, 1, 0)
        meter.correct(0, 4)

        assert meter.admit(0.1, 1, 0.1) == pytest.approx(0.5)
        assert meter.admit(0.5, 6, 0.1) == pytest.approx(1.0)

    def test_a_longer_window_that_a_correction_opens_lets_the_next_in(self) -> None:
        """Who waits for the minute to pass waits no longer when the call that filled it never started."""
        meter = Meter(limits(per_second=10, per_minute=1))
        meter.admit(0, 1, 0)
        assert meter.admit(1, 1, 1) == 60
        meter.correct(0, -1)

        assert meter.admit(1, 1, 1) == 0

    def test_a_correction_finds_its_own_admission(self) -> None:
        """What a call cost is corrected where it was logged, so that it leaves with it."""
        meter = Meter(limits(per_second=10, burst=10))
        for at in (0.0, 0.2, 0.4):
            meter.admit(at, 1, at)
        meter.correct(0.2, 7)

        assert meter.admit(0.5, 1, 0.5) == 1.0
        assert meter.admit(1.0, 1, 0.5) == 0
        assert meter.admit(1.1, 5, 1.1) == 1.2

    def test_a_late_correction_does_not_draw_the_next_call_nearer(self) -> None:
        """When another call has started meanwhile, the next one keeps its distance from that."""
        meter = Meter(limits(per_second=10))
        meter.admit(0, 1, 0)
        meter.admit(5, 1, 5)
        meter.correct(0, -1)

        assert meter.admit(5, 1, 5) == pytest.approx(5.1)

    def test_a_late_correction_gives_back_what_is_left_of_a_burst(self) -> None:
        """Of a burst that is still being paid for, the part that never started is not."""
        meter = Meter(limits(per_second=10, burst=3))
        for at in (0.0, 0.01, 0.02):
            meter.admit(at, 1, at)
        meter.correct(0.01, -1)

        assert meter.admit(0.03, 1, 0.03) == 0
        assert meter.admit(0.03, 1, 0.03) == pytest.approx(0.1)

    def test_a_correction_that_comes_too_late_changes_no_window(self) -> None:
        """An admission that has left its window is not brought back."""
        meter = Meter(limits(per_second=2, burst=2))
        meter.admit(0, 1, 0)
        meter.admit(5, 1, 5)
        meter.correct(0, -1)

        assert meter.admit(5, 2, 5) == 6


class TestConfigure:
    def test_what_was_admitted_counts_against_the_new_limits(self) -> None:
        """A lower rate waits until enough of the past has left its window."""
        meter = Meter(limits(per_second=10, burst=10))
        for at in (0.0, 0.1, 0.2, 0.3):
            meter.admit(at, 1, at)
        meter.configure(limits(per_second=3, burst=3))

        assert meter.admit(0.5, 1, 0.5) == pytest.approx(1.1)

    def test_the_next_call_comes_at_the_new_pace(self) -> None:
        """After a rise from one an hour to one a second, nobody waits for the hour to end."""
        meter = Meter(limits(per_hour=1))
        meter.admit(0, 1, 0)
        assert meter.admit(1, 1, 1) == 3600
        meter.configure(limits(per_hour=3600))

        assert meter.admit(1, 1, 1) == 0

    def test_a_slower_pace_counts_from_the_last_call(self) -> None:
        """After a fall from ten a second to one a second, the next call starts a second after the last."""
        meter = Meter(limits(per_second=10))
        meter.admit(0, 1, 0)
        meter.configure(limits(per_second=1))

        assert meter.admit(0.1, 1, 0.1) == pytest.approx(1.0)

    @pytest.mark.parametrize(("change", "at"), [(0, 1.2), (2, 1.6)])
    def test_what_the_last_call_cost_is_charged_at_the_new_pace(self, change: float, at: float) -> None:
        """As it has been corrected, where it has been."""
        meter = Meter(limits(per_second=10))
        meter.admit(1, 1, 1)
        meter.correct(1, change)
        meter.configure(limits(per_second=5))

        assert meter.admit(1.1, 1, 1.1) == pytest.approx(at)

    def test_a_longer_window_that_opens_early_lets_the_next_in(self) -> None:
        """Who waits for the hour to pass waits no longer when the hour admits more."""
        meter = Meter(limits(per_second=10, per_hour=1))
        meter.admit(0, 1, 0)
        assert meter.admit(1, 1, 1) == 3600
        meter.configure(limits(per_second=10, per_hour=100))

        assert run(meter, until=2.15, start=2) == pytest.approx([2, 2.1])

    def test_a_longer_window_that_becomes_shorter_is_waited_for_no_longer(self) -> None:
        """Who waits for the hour to pass waits for the minute when that is the longer window now."""
        meter = Meter(limits(per_minute=1, per_hour=1))
        meter.admit(0, 1, 0)
        assert meter.admit(0, 1, 0) == 3600
        meter.configure(limits(per_second=1, per_minute=1))

        assert meter.admit(0, 1, 0) == 60

    def test_rates_that_were_taken_away_may_come_back(self) -> None:
        """A meter without rates admits by slots alone, and later by the pace again."""
        meter = Meter(limits(limit=9, per_second=1))
        meter.admit(0, 1, 0)
        meter.configure(limits(limit=9))
        assert meter.admit(0.1, 1, 0.1) == 0
        meter.configure(limits(limit=9, per_second=2))

        assert meter.admit(0.2, 1, 0.2) == 0
        assert meter.admit(0.2, 1, 0.2) == pytest.approx(0.7)


class TestSlots:
    def test_a_full_meter_says_never(self) -> None:
        """Without a free slot no moment can be named; a slot given back opens it."""
        meter = Meter(limits(limit=2))
        assert [meter.admit(0, 1, 0, call) for call in "abc"] == [0, 0, math.inf]
        meter.release("a")

        assert meter.admit(1, 1, 0, "c") == 0
        assert meter.inside == {"b", "c"}

    def test_a_slot_is_given_back_once(self) -> None:
        """Who holds none, or has given it back, frees none."""
        meter = Meter(limits(limit=2))
        meter.admit(0, 1, 0, "a")
        meter.admit(0, 1, 0, "b")

        assert [meter.release(call) for call in "aac"] == [True, False, False]
        assert meter.inside == {"b"}

    def test_the_rate_alone_needs_no_slot(self) -> None:
        """A call without a slot is admitted by a full meter and takes none."""
        meter = Meter(limits(limit=1, per_second=10))
        meter.admit(0, 1, 0, "a")

        assert meter.admit(0.1, 1, 0.1) == 0
        assert meter.inside == {"a"}

    def test_a_refused_call_costs_nothing(self) -> None:
        """To be asked is not to be charged."""
        meter = Meter(limits(limit=1, per_second=2, burst=2))
        meter.admit(0, 1, 0, "a")
        for _ in range(10):
            meter.admit(0, 1, 0, "b")
        meter.release("a")

        assert meter.admit(0, 1, 0, "b") == 0


class TestPause:
    def test_nobody_is_admitted_before_its_end(self) -> None:
        """A paused meter names the end of the pause."""
        meter = Meter(limits(limit=3))
        meter.pause(4.0)

        assert meter.admit(3.9, 1, 0) == 4.0
        assert meter.admit(4.0, 1, 0) == 0

    def test_a_shorter_pause_does_not_end_a_longer_one(self) -> None:
        """The longest pause counts."""
        meter = Meter(limits(limit=3))
        meter.pause(4.0)
        meter.pause(2.0)

        assert meter.admit(3.0, 1, 0) == 4.0


class TestIdle:
    def test_a_call_inside_is_not_idle(self) -> None:
        """A meter is idle only when its slots are free."""
        meter = Meter(limits(limit=3))
        meter.admit(0, 1, 0, "a")
        assert not meter.is_idle(100)
        meter.release("a")

        assert meter.is_idle(0)

    @pytest.mark.parametrize(
        ("amounts", "idle_at"),
        [
            ({"per_second": 2}, 1.0),
            ({"per_second": 2, "per_minute": 9}, 60.0),
            ({"per_second": 0.01, "per_minute": 9}, 100.0),
        ],
    )
    def test_a_call_that_still_counts_is_not_idle(self, amounts: dict[str, Any], idle_at: float) -> None:
        """A meter is idle when a new one would decide the same: when all windows are empty."""
        meter = Meter(limits(**amounts))
        meter.admit(0, 1, 0)

        assert not meter.is_idle(idle_at - 0.001)
        assert meter.is_idle(idle_at)

    def test_rates_that_were_taken_away_count_no_longer(self) -> None:
        """What was admitted under them keeps the place of the next call, and nothing else."""
        meter = Meter(limits(per_second=10))
        meter.admit(5, 1, 5)
        meter.configure(limits(limit=1))

        assert meter.is_idle(5.2)

    def test_a_debt_to_the_pace_is_not_idle(self) -> None:
        """A cost that was corrected far upwards counts for as long as it delays the next call."""
        meter = Meter(limits(per_second=1))
        meter.admit(0, 1, 0)
        meter.correct(0, 4)

        assert not meter.is_idle(4.9)
        assert meter.is_idle(5)

    def test_a_paused_meter_is_not_idle(self) -> None:
        """A new meter would not know of the pause."""
        meter = Meter(limits(per_second=1))
        meter.pause(3)

        assert not meter.is_idle(2.9)
        assert meter.is_idle(3)


class TestLimits:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({}, TypeError, "nothing to limit: give a limit or a rate, as in limit=10, per_second=50"),
            ({"limit": 0}, ValueError, "limit=0: must be at least 1, as in limit=10"),
            ({"limit": -3}, ValueError, "limit=-3: must be at least 1, as in limit=10"),
            ({"limit": True}, TypeError, "limit=True: must be a whole number, as in limit=10"),
            ({"limit": 1.5}, TypeError, "limit=1.5: must be a whole number, as in limit=10"),
            ({"per_second": 0}, ValueError, "per_second=0: must be above 0 and finite, as in per_second=50"),
            ({"per_minute": -1}, ValueError, "per_minute=-1: must be above 0 and finite, as in per_minute=50"),
            ({"per_hour": math.nan}, ValueError, "per_hour=nan: must be above 0 and finite, as in per_hour=50"),
            ({"per_hour": math.inf}, ValueError, "per_hour=inf: must be above 0 and finite, as in per_hour=50"),
            ({"per_second": True}, TypeError, "per_second=True: must be a number, as in per_second=50"),
            ({"per_second": "5"}, TypeError, "per_second='5': must be a number, as in per_second=50"),
            ({"limit": 3, "burst": 2}, ValueError, "burst=2: needs a rate, as in per_second=50, burst=2"),
            ({"per_second": 5, "burst": 0}, ValueError, "burst=0: must be at least 1, as in burst=5"),
            ({"per_second": 5, "burst": False}, TypeError, "burst=False: must be a whole number, as in burst=5"),
            (
                {"per_second": 5, "per_hour": 9, "burst": 6},
                ValueError,
                "burst=6: must be no more than the rate, which is 5 per second",
            ),
            (
                {"per_second": 1, "burst": 2},
                ValueError,
                "burst=2: must be no more than the rate, which is 1 per second",
            ),
        ],
    )
    def test_bad_arguments_are_told(self, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
        """What limits nothing or can't be meant is an error that names the argument and how to write it."""
        with pytest.raises(error) as caught:
            limits(**arguments)

        assert str(caught.value) == message
        assert type(caught.value) is error

    def test_the_least_that_may_be_meant_is_taken(self) -> None:
        """One call, one slot, a burst as large as the rate."""
        made = limits(limit=1, per_second=1, burst=1)

        assert made == Limits(limit=1, rates=(Rate(1, 1.0),), burst=1)

    def test_numbers_of_numpy_are_numbers(self) -> None:
        """They come out of a computation, and are counted in as plain ones, which are quick."""
        made = limits(limit=int64(3), per_second=float32(5), burst=int64(2))  # type: ignore[arg-type]  # not in the types

        assert [type(number) for number in (made.limit, made.rates[0].amount, made.burst)] == [int, float, int]

    def test_rates_are_sorted_by_their_period(self) -> None:
        """The shortest comes first, in whatever order they are written."""
        made = limits(per_hour=9, per_second=1, per_minute=5)

        assert [str(rate) for rate in made.rates] == ["1 per second", "5 per minute", "9 per hour"]
        assert made.burst == 1

    @pytest.mark.parametrize(
        ("amounts", "largest"),
        [({"limit": 2}, math.inf), ({"per_second": 5, "per_hour": 3}, 3), ({"per_second": 0.1}, 1)],
    )
    def test_the_largest_cost_is_what_the_tightest_rate_holds(self, amounts: dict[str, Any], largest: float) -> None:
        """A rate under one holds one call all the same."""
        assert limits(**amounts).largest_cost == largest
