"""When those who wait are looked at, and what a timer of their loop may do to them."""

import asyncio
import heapq
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import Any, cast

import pytest

from asyncify.deadlock.lookout import HeldUp, Lookout
from asyncify.permits import Issuer, Permit


class _Handle:
    def __init__(self, at: float, run: Callable[[], None]) -> None:
        self.at, self.run = at, run

    def __lt__(self, other: "_Handle") -> bool:
        return self.at < other.at


class _Loop:
    """As much of an event loop as a lookout uses, with a time of its own."""

    def __init__(self) -> None:
        self.now = 100.0
        self.handles: list[_Handle] = []

    def time(self) -> float:
        return self.now

    def call_soon(self, function: Callable[..., None], *args: object, context: Context) -> _Handle:
        return self.call_at(self.now, function, *args, context=context)

    def call_at(self, at: float, function: Callable[..., None], *args: object, context: Context) -> _Handle:
        assert not context, "whose it is would be kept until then"
        handle = _Handle(at, lambda: context.run(function, *args))
        heapq.heappush(self.handles, handle)
        return handle

    def run_until(self, end: float) -> None:
        while self.handles and self.handles[0].at <= end:
            handle = heapq.heappop(self.handles)
            self.now = max(self.now, handle.at)
            asyncio._set_running_loop(cast("asyncio.AbstractEventLoop", self))
            handle.run()
            asyncio._set_running_loop(None)
        self.now = max(self.now, end)


class _Watch:
    """A lookout on a loop of its own, with what it has looked at, and when."""

    def __init__(self, *, takes: float = 0.0) -> None:
        self.loop: Any = _Loop()
        self.seen: list[tuple[float, list[Permit]]] = []
        self.takes = takes
        self.tells = 0
        self.lookout = Lookout()

    def look(self, loop: Any, waiting: list[Permit]) -> bool:
        assert loop is self.loop
        self.seen.append((round(self.loop.now - 100, 6), waiting))
        self.loop.now += self.takes
        self.tells -= 1
        return self.tells >= 0

    def note(self) -> Permit:
        permit = Permit().ask(cast("Issuer", None), 1, 1)
        permit.queue_up(deque(), 0, 0)
        self.lookout.note(permit, self.loop, self.look)
        return permit

    @property
    def moments(self) -> list[float]:
        return [moment for moment, _ in self.seen]


def test_who_comes_to_wait_is_looked_at_in_the_next_turn() -> None:
    """All who came in this one together, in their order."""
    watch = _Watch()
    both = [watch.note(), watch.note()]

    assert watch.seen == []

    watch.loop.run_until(100)

    assert watch.seen == [(0, both)]


def test_who_waits_on_is_looked_at_whenever_as_much_time_has_passed_again() -> None:
    """So a wait of an hour takes no more than some twenty looks."""
    watch = _Watch()
    permit = watch.note()
    watch.loop.run_until(103)

    assert permit.queue is not None
    assert watch.moments == [0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6]


def test_who_comes_later_is_looked_at_at_once() -> None:
    """And from then on so are all, as if they had come then."""
    watch = _Watch()
    first = watch.note()
    watch.loop.run_until(103)
    watch.seen.clear()
    second = watch.note()
    watch.loop.run_until(103.1)

    assert watch.seen == [(moment, [first, second]) for moment in (3, 3.05, 3.1)]


def test_who_waits_no_longer_is_looked_at_no_longer() -> None:
    """And when nobody waits, nothing is left in the loop."""
    watch = _Watch()
    first, second = watch.note(), watch.note()
    watch.loop.run_until(100)
    first.queue = None
    watch.loop.run_until(100.05)
    second.queue = None
    watch.loop.run_until(101)

    assert watch.seen == [(0, [first, second]), (0.05, [second])]
    assert watch.loop.handles == []


def test_who_is_gone_is_kept_no_longer() -> None:
    """Nothing but its own wait keeps it."""
    watch = _Watch()
    cast("deque[Permit]", watch.note().queue).clear()
    watch.loop.run_until(103)

    assert watch.seen == []


def test_when_one_was_told_the_others_are_looked_at_in_the_next_turn() -> None:
    """They may wait for themselves still."""
    watch = _Watch()
    permit = watch.note()
    watch.tells = 2
    watch.loop.run_until(100.01)

    assert watch.seen == [(0, [permit])] * 3


def test_a_long_look_is_followed_by_a_long_pause() -> None:
    """However many come meanwhile: looking takes a twentieth of the time at most."""
    watch = _Watch(takes=0.01)
    kept = [watch.note()]
    for step in range(100):
        watch.loop.run_until(100 + 0.01 * step)
        kept.append(watch.note())

    assert watch.moments == [0, 0.21, 0.42, 0.63, 0.84]


async def _held_up(future: Any) -> tuple[HeldUp, "asyncio.Task[Any]"]:
    task = asyncio.ensure_future(_await(future))
    await asyncio.sleep(0)
    return HeldUp([future]), task


async def _await(future: Any) -> Any:
    Permit().ask(cast("Any", None), 1, 1).begin()  # a call, of which it is asked who may end it
    return await future


async def test_a_timer_that_ends_a_wait_lets_it_go_on() -> None:
    """Unless it is cancelled, or about another."""
    loop = asyncio.get_running_loop()
    future, other = loop.create_future(), loop.create_future()
    held_up, task = await _held_up(future)

    assert held_up.doomed(loop, [other], held_up.permits) is other

    loop.call_later(30, other.cancel).cancel()
    handle = loop.call_later(30, task.cancel)

    assert held_up.doomed(loop, [other], held_up.permits) is None

    handle.cancel()

    assert held_up.doomed(loop, [other], held_up.permits) is other

    future.set_result(None)
    await task


async def test_a_timer_that_ends_the_wait_for_a_future_with_it_does_not_count() -> None:
    """That one is not going to be set."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    held_up, task = await _held_up(future)
    handle = loop.call_later(30, task.cancel)

    assert held_up.doomed(loop, [future], held_up.permits) is future

    handle.cancel()
    future.set_result(None)
    await task


async def test_a_timer_that_is_due_counts_too() -> None:
    """It stands among what the loop is about to call."""
    loop = asyncio.get_running_loop()
    future, other = loop.create_future(), loop.create_future()
    held_up, task = await _held_up(future)
    loop.call_soon(task.cancel)

    assert held_up.doomed(loop, [other], held_up.permits) is None

    with pytest.raises(asyncio.CancelledError):
        await task


async def test_on_a_loop_that_shows_no_timers_anything_may_go_on() -> None:
    """As uvloop's."""
    future = asyncio.get_running_loop().create_future()
    held_up, task = await _held_up(future)

    assert held_up.doomed(cast("asyncio.AbstractEventLoop", _Loop()), [future], held_up.permits) is None

    future.set_result(None)
    await task
