"""A pair that waits for itself: told when it is certain, through every way that a pair can call a pair."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from asyncify import DeadlockError, Limiter, concurrency, dual

LIMIT = 2
"""Calls at once; a call nested more deeply than that waits for itself."""

SAFETY_NET = 30
"""Seconds after which a test that hangs fails."""


def _ancestors() -> tuple[Any, Any]:
    """Return a pair that calls itself so many times more, by `invoke` and by `ainvoke`, and its limiter."""
    limiter = Limiter(limit=LIMIT, name="family")

    async def adescend(generations: int) -> int:
        return await pair.ainvoke(generations - 1) + 1 if generations else 0

    def descend(generations: int) -> int:
        return pair.invoke(generations - 1) + 1 if generations else 0

    pair = concurrency(limiter=limiter)(dual(sync=descend, async_=adescend))
    return pair, limiter


def test_a_nested_invoke_that_fits_is_admitted() -> None:
    """As many generations as there are slots wait for nobody."""
    pair, limiter = _ancestors()

    assert pair.invoke(LIMIT - 1) == LIMIT - 1
    assert limiter.stats().in_flight == 0


async def test_a_nested_ainvoke_that_fits_is_admitted() -> None:
    """The async twin."""
    pair, limiter = _ancestors()

    assert await pair.ainvoke(LIMIT - 1) == LIMIT - 1
    assert limiter.stats().in_flight == 0


def test_a_nested_invoke_that_waits_for_itself_is_told() -> None:
    """The call that finds all slots held by its own callers gets the error, and the slots come back."""
    pair, limiter = _ancestors()
    with pytest.raises(DeadlockError, match="limiter family: all 2 slots"):
        pair.invoke(LIMIT)

    assert limiter.stats().in_flight == 0


async def test_a_nested_ainvoke_that_waits_for_itself_is_told() -> None:
    """The async twin: each call is a task of its own, and its caller waits for it and for nothing else."""
    pair, limiter = _ancestors()
    async with asyncio.timeout(SAFETY_NET):
        with pytest.raises(DeadlockError, match="limiter family: all 2 slots"):
            await pair.ainvoke(LIMIT)

    assert limiter.stats().in_flight == 0


async def test_an_ainvoke_through_a_pipe_that_waits_for_itself_is_told() -> None:
    """A pipe of pairs awaits its steps one by one, so a step that waits for the pipe's caller is certain."""
    limiter = Limiter(limit=1)

    async def pass_on(word: str) -> str:
        return word

    async def call_pipe(word: str) -> str:
        return str(await pipe.ainvoke(word))

    inner: Any = concurrency(limiter=limiter)(pass_on)
    pipe: Any = dual(str.strip, name="strip") | inner
    outer: Any = concurrency(limiter=limiter)(call_pipe)
    async with asyncio.timeout(SAFETY_NET):
        with pytest.raises(DeadlockError):
            await outer.ainvoke("a")

    assert limiter.stats().in_flight == 0


BRIDGES: dict[str, Callable[[Any], Any]] = {
    "a thread's invoke": lambda pair: pair.sync_calls_sync,
    "invoke on the event loop": lambda pair: pair.async_calls_sync,
}


class _Mixed:
    """Functions with one side, that call each other over the bridges."""

    def __init__(self, limiter: Limiter) -> None:
        def sync_calls_sync(generations: int) -> int:
            return int(self.sync_calls_sync.invoke(generations - 1)) if generations else 0

        async def async_calls_sync(generations: int) -> int:
            return int(self.async_calls_sync.invoke(generations - 1)) if generations else 0

        limited = concurrency(limiter=limiter)
        self.sync_calls_sync: Any = limited(sync_calls_sync)
        self.async_calls_sync: Any = limited(async_calls_sync)


@pytest.mark.parametrize("bridge", BRIDGES)
async def test_a_call_over_a_bridge_that_waits_for_itself_is_told(bridge: str) -> None:
    """Who waits for a bridged call waits for nothing else, in whichever thread it runs."""
    limiter = Limiter(limit=1)
    pair = BRIDGES[bridge](_Mixed(limiter))
    async with asyncio.timeout(SAFETY_NET):
        with pytest.raises(DeadlockError):
            await pair.ainvoke(1)

    assert limiter.stats().in_flight == 0


async def test_a_call_left_in_the_background_is_no_proof() -> None:
    """A task that a call has started, and does not wait for, has inherited its context, but holds it up in nothing."""
    limiter = Limiter(limit=1)
    started: list[asyncio.Task[str]] = []

    async def pass_on(word: str) -> str:
        return word

    inner: Any = concurrency(limiter=limiter)(pass_on)

    async def leave_behind(word: str) -> str:
        started.append(asyncio.create_task(inner.ainvoke(word)))
        while not limiter.stats().waiting:  # noqa: ASYNC110  (a limiter sets no event)
            await asyncio.sleep(0)
        return word

    outer: Any = concurrency(limiter=limiter)(leave_behind)
    async with asyncio.timeout(SAFETY_NET):
        assert await outer.ainvoke("a") == "a"
        assert await started[0] == "a"


async def test_calls_that_are_gathered_are_no_proof() -> None:
    """One of several calls may fail and set its caller free: so nobody is told, and the caller's timeout ends it."""
    limiter = Limiter(limit=1)

    async def pass_on(word: str) -> str:
        return word

    inner: Any = concurrency(limiter=limiter)(pass_on)

    async def call_both(word: str) -> None:
        await asyncio.gather(inner.ainvoke(word), inner.ainvoke(word))

    outer: Any = concurrency(limiter=limiter)(call_both)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await outer.ainvoke("a")

    assert limiter.stats().in_flight == 0
    assert limiter.stats().waiting == 0
