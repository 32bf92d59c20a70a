"""`concurrency`: what it makes of functions and pairs, and that each of its arguments holds on both paths."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import itemgetter
from typing import Any
from unittest.mock import Mock

import pytest

from asyncify import Dual, Limiter, LimitTimeout, concurrency, dual, registry
from tests.waiting import SAFETY_NET


class Room:
    """Counts who is inside, and lets them out when it is told to."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.inside = 0
        self.peak = 0
        self._open = False

    def _enter(self) -> None:
        with self._changed:
            self.inside += 1
            self.peak = max(self.peak, self.inside)
            self._changed.notify_all()

    def _leave(self) -> None:
        with self._changed:
            self.inside -= 1
            self._changed.notify_all()

    def stay(self, query: str) -> str:
        """Be inside until the room is opened."""
        self._enter()
        with self._changed:
            assert self._changed.wait_for(lambda: self._open, SAFETY_NET)
        self._leave()
        return query

    async def astay(self, query: str) -> str:
        """Be inside until the room is opened."""
        self._enter()
        async with asyncio.timeout(SAFETY_NET):
            while not self._open:  # noqa: ASYNC110  (the room is opened by a thread too)
                await asyncio.sleep(0)
        self._leave()
        return query

    def wait_for(self, inside: int) -> None:
        """Wait until so many are inside."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.inside >= inside, SAFETY_NET)

    def open(self) -> None:
        """Let all out, now and later."""
        with self._changed:
            self._open = True
            self._changed.notify_all()


Decorator = Callable[[Callable[..., Any]], Dual[Any, Any]]


def _on_sync(room: Room, limit: Decorator) -> Dual[Any, Any]:
    @limit
    def stay(query: str) -> str:
        return room.stay(query)

    return stay


def _on_async(room: Room, limit: Decorator) -> Dual[Any, Any]:
    @limit
    async def stay(query: str) -> str:
        return await room.astay(query)

    return stay


def _on_pair(room: Room, limit: Decorator) -> Dual[Any, Any]:
    return limit(dual(sync=room.stay, async_=room.astay))


def _over_dual(room: Room, limit: Decorator) -> Dual[Any, Any]:
    @limit
    @dual(async_=room.astay)
    def stay(query: str) -> str:
        return room.stay(query)

    return stay


def _under_dual(room: Room, limit: Decorator) -> Dual[Any, Any]:
    @dual(async_=room.astay)
    @limit
    def stay(query: str) -> str:
        return room.stay(query)

    return stay


def _under_dual_async(room: Room, limit: Decorator) -> Dual[Any, Any]:
    @dual(sync=room.stay)
    @limit
    async def stay(query: str) -> str:
        return await room.astay(query)

    return stay


def _on_the_second_side(room: Room, limit: Decorator) -> Dual[Any, Any]:
    @dual
    def stay(query: str) -> str:
        return room.stay(query)

    return stay.async_(limit(room.astay))


def _on_the_second_side_sync(room: Room, limit: Decorator) -> Dual[Any, Any]:
    @dual
    async def stay(query: str) -> str:
        return await room.astay(query)

    return stay.sync(limit(room.stay))


def _over_dual_async(room: Room, limit: Decorator) -> Dual[Any, Any]:
    @limit
    @dual(sync=room.stay)
    async def stay(query: str) -> str:
        return await room.astay(query)

    return stay


PLACES = [
    _on_sync,
    _on_async,
    _on_pair,
    _over_dual,
    _over_dual_async,
    _under_dual,
    _under_dual_async,
    _on_the_second_side,
    _on_the_second_side_sync,
]
Place = Callable[[Room, Decorator], Dual[Any, Any]]


@pytest.mark.parametrize("place", PLACES)
def test_the_limit_holds_for_threads(place: Place) -> None:
    """Eight threads that invoke are never more than three inside."""
    room = Room()
    pair = place(room, concurrency(limit=3))
    with ThreadPoolExecutor(8) as threads:
        calls = [threads.submit(pair.invoke, str(number)) for number in range(8)]
        room.wait_for(3)
        room.open()

    assert [call.result() for call in calls] == [str(number) for number in range(8)]
    assert room.peak == 3
    assert isinstance(pair.limiter, Limiter)
    assert pair.limiter.stats().in_flight == 0


@pytest.mark.parametrize("place", PLACES)
async def test_the_limit_holds_for_tasks(place: Place) -> None:
    """Eight tasks that ainvoke are never more than three inside."""
    room = Room()
    pair = place(room, concurrency(limit=3))
    calls = [asyncio.create_task(pair.ainvoke(str(number))) for number in range(8)]
    await asyncio.to_thread(room.wait_for, 3)
    room.open()

    assert await asyncio.gather(*calls) == [str(number) for number in range(8)]
    assert room.peak == 3
    assert isinstance(pair.limiter, Limiter)
    assert pair.limiter.stats().in_flight == 0


@pytest.mark.parametrize("place", PLACES)
async def test_both_paths_share_the_limit(place: Place) -> None:
    """Four threads and four tasks together are never more than three inside."""
    room = Room()
    pair = place(room, concurrency(limit=3))
    calls = [
        *(asyncio.create_task(asyncio.to_thread(pair.invoke, "thread")) for _ in range(4)),
        *(asyncio.create_task(pair.ainvoke("task")) for _ in range(4)),
    ]
    await asyncio.to_thread(room.wait_for, 3)
    room.open()

    assert await asyncio.gather(*calls) == ["thread"] * 4 + ["task"] * 4
    assert room.peak == 3


@pytest.mark.parametrize("place", PLACES)
def test_the_function_becomes_one_registered_pair(place: Place) -> None:
    """The registry knows one pair with the limiter, and no half of it."""
    before = {record.name for record in registry}
    pair = place(Room(), concurrency(limit=3))
    new = [record for record in registry if record.name not in before]

    assert [record.pair for record in new if record.pair is pair] == [pair]
    assert all(record.limiter is pair.limiter for record in new)


ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"limit": 7}, "0/7 in flight, 0 waiting"),
    ({"per_second": 50}, "50 per second, 0 waiting"),
    ({"per_minute": 500.5}, "500.5 per minute, 0 waiting"),
    ({"limit": 2, "per_second": 5, "per_minute": 60}, "0/2 in flight, 5 per second, 60 per minute, 0 waiting"),
    ({"per_second": 5, "burst": 5}, "5 per second, 0 waiting"),
]


@pytest.mark.parametrize(("arguments", "state"), ARGUMENTS, ids=[str(case[0]) for case in ARGUMENTS])
@pytest.mark.parametrize("place", PLACES)
def test_each_argument_reaches_the_limiter(place: Place, arguments: dict[str, Any], state: str) -> None:
    """Wherever the decorator stands, its limits are the pair's."""
    pair = place(Room(), concurrency(**arguments))

    assert isinstance(pair.limiter, Limiter)
    assert pair.limiter._state() == state
    assert repr(pair).endswith(f" {state}>")


def test_a_limiter_is_called_as_its_function() -> None:
    """Errors and `repr` name it, unless it is given a name, or is somebody else's."""

    class Desk:
        @concurrency(limit=1)
        def quote(self, query: str) -> None: ...

    def news(query: str) -> None: ...

    assert repr(Desk.quote.limiter) == "<Limiter Desk.quote 0/1 in flight, 0 waiting>"
    assert repr(concurrency(limit=1)(dual(news)).limiter) == "<Limiter news 0/1 in flight, 0 waiting>"
    assert repr(concurrency(limit=1)(dual(news, name="wire")).limiter) == "<Limiter wire 0/1 in flight, 0 waiting>"
    assert repr(dual(concurrency(limit=1)(news), name="post").limiter) == "<Limiter post 0/1 in flight, 0 waiting>"
    assert repr(concurrency(limit=1, name="paper")(news).limiter) == "<Limiter paper 0/1 in flight, 0 waiting>"
    for nameless in (lambda query: query, partial(round, ndigits=1), itemgetter("a"), Mock()):
        assert repr(concurrency(limit=1)(nameless).limiter) == "<Limiter 0/1 in flight, 0 waiting>"
    assert repr(concurrency(limiter=Limiter(limit=1))(news).limiter) == "<Limiter 0/1 in flight, 0 waiting>"
    assert repr(concurrency(limit=1, key=str)(news).limiter) == "<KeyedLimiter news 0 keys>"


@pytest.mark.parametrize("place", PLACES)
async def test_a_burst_starts_back_to_back(place: Place) -> None:
    """A burst of three is admitted before anybody has left; without one, calls are spaced evenly."""
    room = Room()
    room.open()
    pair = place(room, concurrency(per_minute=3, burst=3))
    results = [pair.invoke("a"), await pair.ainvoke("b"), await asyncio.to_thread(pair.invoke, "c")]

    assert results == ["a", "b", "c"]
    assert isinstance(pair.limiter, Limiter)
    assert pair.limiter.stats().wait_p99 == 0
    assert pair.limiter.acquire(blocking=False) is False


@pytest.mark.parametrize("place", PLACES)
def test_a_thread_that_waits_too_long_gets_a_limit_timeout(place: Place) -> None:
    """`timeout` bounds the wait for admission, and the place in the queue is given back."""
    room = Room()
    pair = place(room, concurrency(limit=1, timeout=0.01))
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(pair.invoke, "first")
        room.wait_for(1)
        with pytest.raises(LimitTimeout, match=r"not admitted within .* Raise timeout="):
            pair.invoke("second")
        room.open()

    assert first.result() == "first"
    assert pair.invoke("third") == "third"


@pytest.mark.parametrize("place", PLACES)
async def test_a_task_that_waits_too_long_gets_a_limit_timeout(place: Place) -> None:
    """The async twin."""
    room = Room()
    pair = place(room, concurrency(limit=1, timeout=0.01))
    first = asyncio.create_task(pair.ainvoke("first"))
    await asyncio.to_thread(room.wait_for, 1)
    with pytest.raises(LimitTimeout, match=r"not admitted within .* Raise timeout="):
        await pair.ainvoke("second")
    room.open()

    assert await first == "first"
    assert await pair.ainvoke("third") == "third"


def test_one_limiter_serves_several_pairs() -> None:
    """Pairs that share a `Limiter` are together never more than its limit inside."""
    room = Room()
    limiter = Limiter(limit=2, name="bank")
    pairs = [_on_sync(room, concurrency(limiter=limiter)), _on_async(room, concurrency(limiter=limiter))]
    with ThreadPoolExecutor(8) as threads:
        calls = [threads.submit(pairs[number % 2].invoke, "x") for number in range(8)]
        room.wait_for(2)
        room.open()

    assert [call.result() for call in calls] == ["x"] * 8
    assert room.peak == 2
    assert pairs[0].limiter is pairs[1].limiter is limiter


def test_a_timeout_beside_a_shared_limiter_is_the_pairs_own() -> None:
    """One pair gives up early while another of the same limiter would wait."""
    room = Room()
    limiter = Limiter(limit=1)
    hasty = _on_sync(room, concurrency(limiter=limiter, timeout=0.01))
    patient = _on_sync(room, concurrency(limiter=limiter))
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(patient.invoke, "first")
        room.wait_for(1)
        second = threads.submit(patient.invoke, "second")
        with pytest.raises(LimitTimeout):
            hasty.invoke("hasty")
        room.open()

    assert [first.result(), second.result()] == ["first", "second"]


def test_both_sides_may_bring_the_same_limiter() -> None:
    """A limiter that each side was given on its own is the limiter of the pair."""
    room = Room()
    limiter = Limiter(limit=1)
    pair = dual(sync=concurrency(limiter=limiter)(room.stay), async_=concurrency(limiter=limiter)(room.astay))

    assert pair.limiter is limiter


def test_a_pair_given_to_concurrency_is_the_pair_returned() -> None:
    """A pair that is in pipes already gets its limit there too."""
    room = Room()
    pair = dual(sync=room.stay, async_=room.astay)

    assert concurrency(limit=1)(pair) is pair


def test_a_call_that_fails_gives_its_slot_back() -> None:
    """An exception in the function leaves no slot taken."""

    @concurrency(limit=1)
    def fail(query: str) -> str:
        raise ValueError(query)

    for _ in range(3):
        with pytest.raises(ValueError, match="EUR"):
            fail.invoke("EUR")
    assert repr(fail).endswith("0/1 in flight, 0 waiting>")


async def test_an_async_call_that_fails_gives_its_slot_back() -> None:
    """The async twin."""

    @concurrency(limit=1)
    async def fail(query: str) -> str:
        raise ValueError(query)

    for _ in range(3):
        with pytest.raises(ValueError, match="EUR"):
            await fail.ainvoke("EUR")
    assert repr(fail).endswith("0/1 in flight, 0 waiting>")


def test_each_function_under_one_decorator_has_a_limit_of_its_own() -> None:
    """What functions are to share is given as `limiter=`; a decorator that is kept under a name shares nothing."""
    limited = concurrency(limit=1)

    @limited
    def fetch(query: str) -> str:
        return query

    @limited
    def search(query: str) -> str:
        return fetch(query)

    assert fetch.limiter is not search.limiter
    assert search("a") == "a"
