"""The adaptive limit: its arguments, its steps, and what they come to against a server with a hidden capacity."""

import asyncio
import heapq
import itertools
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from numpy import int64

from asyncify import Adaptive, Limiter
from asyncify.adaptive import AdaptiveLimit
from asyncify.testing import FakeClock


class RefusedError(Exception):
    """What an HTTP client raises for a 429 or 503."""

    def __init__(self, status_code: int = 429, retry_after: float = 0.0) -> None:
        super().__init__(f"HTTP {status_code}")
        self.status_code = status_code
        self.headers = {"Retry-After": str(retry_after)}


def adaptive(**options: Any) -> AdaptiveLimit:
    """Make the state of a limit."""
    return AdaptiveLimit(Adaptive(**options))


def succeed(limit: AdaptiveLimit, times: int, now: float = 0.0) -> None:
    """Note successes at one moment, all of the limit being in use."""
    for _ in range(times):
        limit.succeeded(now, limit.limit)


def hurt(limit: AdaptiveLimit, now: float) -> None:
    """Note a congestion of a call that was admitted a moment before, all of the limit being in use."""
    limit.failed(now, now - 0.001, limit.limit)


# Arguments


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"min": 0}, ValueError, "min=0"),
        ({"max": -1}, ValueError, "max=-1"),
        ({"start": 0}, ValueError, "start=0"),
        ({"min": True}, TypeError, "min=True"),
        ({"max": 10.0}, TypeError, r"max=10\.0"),
        ({"min": 5, "max": 4}, ValueError, "min <= start <= max"),
        ({"min": 5, "start": 4}, ValueError, "min <= start <= max"),
        (
            {"max": 5, "start": 6},
            ValueError,
            r"^Adaptive\(min=1, max=5, start=6\): the numbers .*, min <= start <= max",
        ),
        ({"on": 429}, TypeError, "on=429"),
        ({"on": asyncio.sleep}, TypeError, "on=<function sleep"),
        ({"on": TimeoutError}, TypeError, r"on=<class 'TimeoutError'>: .* on=lambda error: isinstance\(error, Time"),
        ({"on": lambda: True}, TypeError, "on=<function <lambda>"),
        ({"on": isinstance}, TypeError, "on=<built-in function isinstance>"),
    ],
)
def test_bad_arguments_are_told(options: dict[str, Any], error: type[Exception], says: str) -> None:
    """What can't be meant is refused where it is written, and named."""
    with pytest.raises(error, match=says):
        Adaptive(**options)


def test_it_starts_at_the_least() -> None:
    """Without `start` the limit begins at `min`."""
    assert adaptive(min=3).limit == 3


def test_it_starts_where_it_is_told() -> None:
    """`start` is the first limit."""
    assert adaptive(min=3, start=7).limit == 7


def test_numbers_of_numpy_are_numbers() -> None:
    """They come out of a computation, and are counted in as plain ones."""
    made = Adaptive(min=int64(1), max=int64(8), start=int64(4))  # type: ignore[arg-type]  # not in the types

    assert [type(number) for number in (made.min, made.max, made.start)] == [int, int, int]


def test_min_and_max_may_be_one() -> None:
    """A range of a single number is a fixed limit."""
    limit = adaptive(min=4, max=4)

    succeed(limit, 100)
    hurt(limit, now=1)

    assert limit.limit == 4


# Growing


def test_before_the_first_congestion_a_round_doubles_it() -> None:
    """Slow start: one more for every success, so that a round of successes doubles the limit."""
    limit = adaptive(start=4)

    succeed(limit, 4)

    assert limit.limit == 8


def test_it_grows_to_the_most_and_no_further() -> None:
    """The limit stops at `max`."""
    limit = adaptive(start=4, max=6)

    succeed(limit, 100)

    assert limit.limit == 6


def test_a_limit_that_is_not_in_use_does_not_grow() -> None:
    """Successes with less than half of the slots in use prove nothing about a higher limit."""
    limit = adaptive(start=10)

    changed = [limit.succeeded(0.0, in_flight=4) for _ in range(100)]

    assert not any(changed)
    assert limit.limit == 10


def test_a_limit_that_is_half_in_use_grows() -> None:
    """From half of the slots on, a limit is in use."""
    limit = adaptive(start=10)

    assert limit.succeeded(0.0, in_flight=5)
    assert limit.limit == 11


def test_after_a_congestion_it_grows_after_a_run_of_successes() -> None:
    """The nearer the limit is to its target, the more successes in a row it takes for one more slot."""
    limit = adaptive(start=40)
    hurt(limit, now=0)
    while limit.limit < 37:
        limit.succeeded(2.0, limit.limit)

    runs = [next(n for n in itertools.count(1) if limit.succeeded(2.0, limit.limit)) for _ in range(2)]

    assert limit.limit == 39
    assert runs == [19, 41]  # ceil(limit / (38.95 - limit)): after two seconds the curve stands at 38.95


def test_a_congestion_of_the_same_burst_begins_the_run_anew() -> None:
    """Only successes in a row count: a refused call between them takes the run back to nothing."""
    limit = adaptive(start=40)
    hurt(limit, now=0.5)
    limit.succeeded(1.5, 20)

    limit.failed(1.5, admitted_at=0.4, in_flight=20)

    assert not limit.succeeded(1.5, 20)
    assert limit.succeeded(1.5, 20)


# Shrinking


def test_a_congestion_halves_it() -> None:
    """After a congestion the limit is half of what was in flight."""
    limit = adaptive(start=40)

    assert limit.failed(5.0, admitted_at=4.0, in_flight=40)
    assert limit.limit == 20


def test_it_is_halved_from_what_was_in_flight() -> None:
    """A limit that was not in use is no measure: 10 calls were too many, so 5 are left."""
    limit = adaptive(start=40)

    limit.failed(5.0, admitted_at=4.0, in_flight=10)

    assert limit.limit == 5


def test_it_shrinks_to_the_least_and_no_further() -> None:
    """The limit stops at `min`."""
    limit = adaptive(min=3, start=4)

    hurt(limit, now=1)
    hurt(limit, now=2)

    assert limit.limit == 3


def test_a_burst_of_congestion_shrinks_it_once() -> None:
    """Forty calls that were admitted together and are all refused halve the limit once."""
    limit = adaptive(start=40)

    changes = [limit.failed(1.0 + n / 100, admitted_at=0.5, in_flight=40 - n) for n in range(40)]

    assert changes == [True] + [False] * 39
    assert limit.limit == 20


def test_a_burst_within_one_instant_shrinks_it_once() -> None:
    """Calls that come and fail in one instant of the clock are one burst too."""
    limit = adaptive(start=40)

    for n in range(40):
        limit.failed(0.0, admitted_at=0.0, in_flight=40 - n)

    assert limit.limit == 20


def test_a_call_admitted_after_the_shrinking_shrinks_it_again() -> None:
    """If the smaller limit is still too much, it is halved again."""
    limit = adaptive(start=40)
    hurt(limit, now=1)

    limit.failed(2.0, admitted_at=1.5, in_flight=20)

    assert limit.limit == 10


# What it learned hurts


def test_it_comes_back_to_what_did_not_hurt() -> None:
    """With 40 calls in flight one was refused, so 39 were not too many: there it is again after 2.3 s."""
    limit = adaptive(start=40)
    hurt(limit, now=0)

    succeed(limit, 1000, now=2.4)

    assert limit.limit == 39


def test_it_stays_there_until_time_has_passed() -> None:
    """However many calls succeed, none is risked above what hurt within 4 s."""
    limit = adaptive(start=10)
    hurt(limit, now=0)

    for tenth in range(40):
        succeed(limit, 100, now=tenth / 10)

    assert limit.limit == 9


def test_it_stays_there_until_calls_have_succeeded() -> None:
    """However much time passes, none is risked above what hurt before 100 calls have succeeded."""
    limit = adaptive(start=10)
    hurt(limit, now=0)

    for minute in range(1, 100):
        succeed(limit, 1, now=60 * minute)

    assert limit.limit == 9


def test_then_it_tries_more() -> None:
    """After both the limit goes above what once hurt."""
    limit = adaptive(start=10)
    hurt(limit, now=0)

    succeed(limit, 100, now=4.0)
    succeed(limit, 100, now=6.0)

    assert limit.limit > 10


def test_each_congestion_asks_for_successes_of_its_own() -> None:
    """What succeeded before the last congestion says nothing about the time after it."""
    limit = adaptive(start=10)
    hurt(limit, now=0)
    succeed(limit, 100, now=2.5)
    hurt(limit, now=3.0)

    succeed(limit, 50, now=8.0)
    succeed(limit, 49, now=9.0)

    assert limit.limit == 8


def test_it_leaves_what_hurt_from_a_stand() -> None:
    """However late the hundredth success comes, the limit leaves its ceiling slowly, not in one leap."""
    limit = adaptive(start=10)
    hurt(limit, now=0)
    for second in range(1, 51):
        succeed(limit, 2, now=second)
    assert limit.limit == 9

    succeed(limit, 1000, now=51.0)

    assert limit.limit == 10  # one second after leaving 9 the curve stands at 9.36


# Through the limiter


def slots(limiter: Limiter) -> int | None:
    """Return the limit as it is now."""
    return limiter.stats().limit


@pytest.mark.parametrize("error", [RefusedError(429), RefusedError(503), TimeoutError()])
def test_a_sign_of_congestion_halves_the_limit_of_a_limiter(error: Exception) -> None:
    """HTTP 429, 503 and a timeout count by their shape."""
    limiter = Limiter(limit=Adaptive(start=8), clock=FakeClock())
    permits = [limiter.enter() for _ in range(8)]

    permits.pop().leave(error)

    assert slots(limiter) == 4


@pytest.mark.parametrize("error", [RefusedError(429), RefusedError(503), TimeoutError()])
async def test_a_sign_of_congestion_halves_the_limit_of_a_limiter_a(error: Exception) -> None:
    """The same on the async path."""
    limiter = Limiter(limit=Adaptive(start=8), clock=FakeClock())
    permits = [await limiter.aenter() for _ in range(8)]

    permits.pop().leave(error)

    assert slots(limiter) == 4


@pytest.mark.parametrize("error", [RefusedError(404), ValueError(), KeyboardInterrupt()])
def test_another_error_neither_shrinks_nor_grows_it(error: BaseException) -> None:
    """An error of the caller's own says nothing about the server."""
    limiter = Limiter(limit=Adaptive(start=8), clock=FakeClock())
    permits = [limiter.enter() for _ in range(8)]

    permits.pop().leave(error)

    assert slots(limiter) == 8


def test_a_success_makes_the_limit_of_a_limiter_grow() -> None:
    """A call that ends well counts."""
    limiter = Limiter(limit=Adaptive(start=1), clock=FakeClock())

    with limiter:
        pass

    assert slots(limiter) == 2


async def test_a_success_makes_the_limit_of_a_limiter_grow_a() -> None:
    """The same on the async path."""
    limiter = Limiter(limit=Adaptive(start=1), clock=FakeClock())

    async with limiter:
        pass

    assert slots(limiter) == 2


def test_what_counts_as_congestion_may_be_told() -> None:
    """`on=` takes the place of the rule: its errors shrink the limit, a 429 does not."""
    limiter = Limiter(limit=Adaptive(start=8, on=lambda error: isinstance(error, KeyError)), clock=FakeClock())
    permits = [limiter.enter() for _ in range(8)]

    permits.pop().leave(RefusedError(429))
    assert slots(limiter) == 8
    permits.pop().leave(KeyError())

    assert slots(limiter) == 3  # half of the 7 that were in flight


# The simulation


@dataclass
class Server:
    """A server that takes so many calls at once and refuses any more, after 5 ms; times are in seconds."""

    capacity: int
    latency: float
    random: random.Random
    in_flight: int = 0

    def arrive(self) -> tuple[bool, float]:
        """Take a call in or refuse it; say for how long it will be there."""
        taken = self.in_flight < self.capacity
        self.in_flight += taken
        return taken, self.latency * self.random.uniform(0.8, 1.2) if taken else 0.005

    def leave(self) -> None:
        """Let a call go that was taken in."""
        self.in_flight -= 1


@dataclass
class Log:
    """When calls ended, and whether they were answered or refused."""

    answered: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)

    def rate(self, start: float, end: float) -> float:
        """Return the calls answered a second."""
        return sum(start <= at < end for at in self.answered) / (end - start)

    def share_refused(self, start: float) -> float:
        """Return the share of calls refused after the start."""
        answered, refused = (sum(at >= start for at in times) for times in (self.answered, self.refused))
        return refused / (answered + refused)


Change = tuple[float, int]  # at this time the server gets this capacity


def simulate(server: Server, seconds: float, change: Change | None = None, retry_after: float = 0.0) -> Log:
    """Send calls as fast as the limit and the pauses that the server asks for let them, in virtual time."""
    limit, log, now, in_flight, paused_until = adaptive(max=500), Log(), 0.0, 0, 0.0
    ends: list[tuple[float, int, float, bool]] = []  # when a call ends, its number, its admission, whether it was taken
    number = itertools.count()
    while now < seconds:
        if change and now >= change[0]:
            server.capacity, change = change[1], None
        while in_flight < limit.limit and now >= paused_until:
            in_flight += 1
            taken, stay = server.arrive()
            heapq.heappush(ends, (now + stay, next(number), now, taken))
        if not ends or now < paused_until < ends[0][0]:
            now = paused_until
            continue
        now, _, admitted_at, taken = heapq.heappop(ends)
        if taken:
            server.leave()
            limit.succeeded(now, in_flight)
            log.answered.append(now)
        else:
            limit.failed(now, admitted_at, in_flight, retry_after)
            log.refused.append(now)
            paused_until = max(paused_until, now + retry_after)
        in_flight -= 1
    return log


async def simulate_limiter(
    server: Server, seconds: float, change: Change | None = None, retry_after: float = 0.0
) -> Log:
    """Send calls from 100 tasks through a real limiter, under a clock that is moved on by 10 ms at a time."""
    clock, log = FakeClock(), Log()
    limiter = Limiter(limit=Adaptive(max=100), clock=clock)

    async def call() -> None:
        taken, stay = server.arrive()
        ended = asyncio.Event()
        clock.call_at(clock.now() + stay, ended.set)
        await ended.wait()
        if not taken:
            raise RefusedError(retry_after=retry_after)
        server.leave()

    async def worker() -> None:
        while True:
            try:
                async with limiter:
                    await call()
                log.answered.append(clock.now())
            except RefusedError:
                log.refused.append(clock.now())

    workers = [asyncio.create_task(worker()) for _ in range(100)]
    while clock.now() < seconds:
        if change and clock.now() >= change[0]:
            server.capacity, change = change[1], None
        for _ in range(6):  # turns of the loop from a call's end to the start of the next
            await asyncio.sleep(0)
        clock.advance(0.01)
    for task in workers:
        task.cancel()
    await asyncio.gather(*workers, return_exceptions=True)
    return log


def windows(start: float, end: float, length: float = 10.0) -> list[tuple[float, float]]:
    """Return the windows of a length within a span, one second apart."""
    return [(start + n, start + n + length) for n in range(int(end - start - length) + 1)]


def assert_near_capacity(log: Log, capacity: int, latency: float, start: float, end: float) -> None:
    """Check that in no window of 10 s the rate was 20% off what the capacity gives."""
    possible = capacity / latency
    rates = [log.rate(*window) / possible for window in windows(start, end)]

    assert min(rates) >= 0.8
    assert max(rates) <= 1.2


CAPACITIES = [5, 10, 25, 100]
LATENCIES = [0.05, 0.2, 0.33]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("latency", LATENCIES)
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_it_finds_the_capacity(capacity: int, latency: float, seed: int) -> None:
    """After 10 s the rate is within 20% of the server's, and under 2% of the calls are refused."""
    log = simulate(Server(capacity, latency, random.Random(seed)), seconds=60)

    assert_near_capacity(log, capacity, latency, start=10, end=60)
    assert log.share_refused(10) < 0.02


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("capacity", [25, 100])
def test_it_finds_the_capacity_of_a_slow_server(capacity: int, seed: int) -> None:
    """The same where an answer takes a second."""
    log = simulate(Server(capacity, 1.0, random.Random(seed)), seconds=60)

    assert_near_capacity(log, capacity, 1.0, start=10, end=60)
    assert log.share_refused(10) < 0.02


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("latency", LATENCIES)
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_it_tries_less_often_where_a_try_costs_a_pause(capacity: int, latency: float, seed: int) -> None:
    """With `Retry-After: 1` in each refusal, it is within 20% of the capacity all the same, over a minute."""
    log = simulate(Server(capacity, latency, random.Random(seed)), seconds=70, retry_after=1.0)

    assert log.rate(10, 70) >= 0.8 * capacity / latency
    assert log.share_refused(10) < 0.02


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("latency", LATENCIES)
@pytest.mark.parametrize(("before", "after"), [(25, 50), (25, 100), (10, 20), (50, 25), (100, 25), (20, 10)])
def test_it_recovers_from_a_step(before: int, after: int, latency: float, seed: int) -> None:
    """Within 10 s of a step, down or up to the fourfold, the rate is the new one, and few calls are refused."""
    at = 30.0 + 1.7 * seed  # somewhere else in its cycle each time

    log = simulate(Server(before, latency, random.Random(seed)), seconds=70, change=(at, after))

    assert_near_capacity(log, after, latency, start=at + 10, end=70)
    assert log.share_refused(10) < 0.02


@pytest.mark.parametrize("after", [10, 50])
async def test_a_limiter_finds_the_capacity_and_recovers_from_a_step(after: int) -> None:
    """The same holds through a real limiter, whose tasks wait in its queue."""
    server = Server(25, 0.2, random.Random(7))

    log = await simulate_limiter(server, seconds=60, change=(30, after))

    assert_near_capacity(log, 25, 0.2, start=10, end=30)
    assert_near_capacity(log, after, 0.2, start=40, end=60)
    assert log.share_refused(10) < 0.02
    assert log.refused


async def test_a_limiter_tries_less_often_where_a_try_costs_a_pause() -> None:
    """What a `Retry-After` costs is told to the adaptive limit by a real limiter, too."""
    log = await simulate_limiter(Server(25, 0.2, random.Random(7)), seconds=70, retry_after=1.0)

    assert log.rate(10, 70) >= 0.8 * 25 / 0.2
    assert log.refused
