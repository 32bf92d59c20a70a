"""Bridges: a call over each, a limited rush over a sync function, a sync batch over an async one, and `watch`.

Peers: `RunnableLambda`, asyncer, asgiref, anyio. In the first two cases the pair is the reference, so that a peer
which is no cheaper shows a ratio of 1 or more. They count CPU seconds, for what a thread's wake-up takes by the wall
clock is mostly the machine's.
"""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import anyio
import anyio.from_thread
import anyio.to_thread
import asyncer
from asgiref.sync import async_to_sync, sync_to_async
from langchain_core.runnables import RunnableLambda

from asyncify import concurrency, dual, watch
from benchmarks.delegation import bare, nap, nap_async
from benchmarks.harness import Case, Gauge, Side, Target

LIMIT = 100
NO_CHEAPER = Target(at_least=1.0)


def double(number: int) -> int:
    """Return at once, on a thread."""
    return number * 2


async def double_async(number: int) -> int:
    """Return at once, on a loop."""
    return number * 2


only_sync = dual(double, name="only_sync")
only_async = dual(double_async, name="only_async")
lambda_of_sync = RunnableLambda(double)
limited_nap = concurrency(limit=LIMIT)(nap)
limited_nap_async = concurrency(limit=1000)(nap_async)
lambda_of_nap = RunnableLambda(nap)


# One call


async def pair_acall() -> int:
    """Call the async side that is made of threads."""
    return await only_sync.acall(1)


async def anyio_thread() -> int:
    """Call by anyio; with `abandon_on_cancel`, as a pair does, the caller is free when it is cancelled."""
    return await anyio.to_thread.run_sync(double, 1, abandon_on_cancel=True)


async def asyncer_thread() -> int:
    """Call by asyncer."""
    return await asyncer.asyncify(double, abandon_on_cancel=True)(1)


async def asgiref_thread() -> int:
    """Call by asgiref, on any thread."""
    return await sync_to_async(double, thread_sensitive=False)(1)


async def lambda_ainvoke() -> int:
    """Call by LangChain."""
    return await lambda_of_sync.ainvoke(1)


async def pair_ainvoke() -> int:
    """Call the pair as a runnable."""
    return await only_sync.ainvoke(1)


def async_from_sync(calls: int) -> Case:
    """Compare a call of a sync function from a loop."""
    return Case(
        name="async from sync, one call",
        reference="pair.acall",
        gauge=Gauge.CPU,
        inner=calls,
        rounds=9,
        sides=[
            Side("pair.acall", pair_acall),
            Side("anyio.to_thread.run_sync", anyio_thread, target=NO_CHEAPER),
            Side("asyncer.asyncify", asyncer_thread, target=NO_CHEAPER),
            Side("asgiref.sync_to_async", asgiref_thread, target=NO_CHEAPER),
            Side("pair.ainvoke", pair_ainvoke),
            Side("RunnableLambda.ainvoke", lambda_ainvoke, target=NO_CHEAPER, against="pair.ainvoke"),
        ],
    )


class Portal:
    """An anyio portal, open for as long as the program runs."""

    def __init__(self) -> None:
        self._manager = anyio.from_thread.start_blocking_portal()
        self._portal = self._manager.__enter__()

    def call(self) -> int:
        """Call an async function by the portal."""
        return self._portal.call(double_async, 1)

    def naps(self, calls: int) -> None:
        """Start so many naps by the portal and wait for all of them."""
        for started in [self._portal.start_task_soon(nap_async, call) for call in range(calls)]:
            started.result()


def sync_from_async(calls: int, portal: Portal) -> Case:
    """Compare a call of an async function from a thread without a loop."""
    return Case(
        name="sync from async, one call",
        reference="pair.call",
        gauge=Gauge.CPU,
        inner=calls,
        rounds=9,
        sides=[
            Side("pair.call", partial(only_async.call, 1)),
            Side("anyio portal", portal.call, target=NO_CHEAPER),
            Side("asyncer.syncify", partial(asyncer.syncify(double_async, raise_sync_error=False), 1), NO_CHEAPER),
            Side("asgiref.async_to_sync", partial(async_to_sync(double_async), 1), target=NO_CHEAPER),
        ],
    )


# Many calls


async def by_anyio(calls: int) -> None:
    """Call a sync function by anyio, with a limiter of the same size."""
    limiter = anyio.CapacityLimiter(LIMIT)
    async with anyio.create_task_group() as group:
        for call in range(calls):
            group.start_soon(partial(anyio.to_thread.run_sync, nap, call, limiter=limiter))


async def by_asgiref(calls: int) -> None:
    """Call a sync function by asgiref, with a pool of the same size."""
    with ThreadPoolExecutor(LIMIT) as pool:
        call = sync_to_async(nap, thread_sensitive=False, executor=pool)
        await asyncio.gather(*(call(number) for number in range(calls)))


def rush(calls: int) -> Case:
    """Compare many calls of a limited sync function."""
    limit = "physical limit, 100 at once"
    return Case(
        name=f"{calls:,} calls of 0.1 s, sync only, limit=100",
        reference=limit,
        sides=[
            Side(limit, partial(bare, calls, LIMIT)),
            Side("pair.abatch", partial(limited_nap.abatch, list(range(calls))), target=Target(at_most=1.10)),
            Side("anyio, CapacityLimiter(100)", partial(by_anyio, calls)),
            Side("asgiref, ThreadPoolExecutor(100)", partial(by_asgiref, calls)),
            Side("RunnableLambda.abatch", partial(lambda_of_nap.abatch, list(range(calls))), rounds=1, warm=False),
        ],
    )


def asgiref_batch(calls: int) -> None:
    """Gather on a loop that asgiref makes."""
    async_to_sync(partial(bare, calls, calls))()


def sync_batch(calls: int, portal: Portal) -> Case:
    """Compare a sync batch over an async function; LangChain has none (`invoke` raises a TypeError)."""
    return Case(
        name=f"sync batch of {calls:,} calls of 0.1 s, async only, limit=1000",
        reference="physical limit",
        sides=[
            Side("physical limit", partial(bare, calls, calls)),
            Side("pair.batch", partial(limited_nap_async.batch, list(range(calls))), target=Target(at_most=1.5)),
            Side("anyio portal, unlimited", partial(portal.naps, calls)),
            Side("asgiref of gather, unlimited", partial(asgiref_batch, calls)),
        ],
    )


# watch


@dual
async def walk(steps: int) -> None:
    """Take so many steps."""
    for _ in range(steps):
        await asyncio.sleep(0)


async def off(steps: int) -> float:
    """Return what a step costs without a watch, in microseconds."""
    start = time.perf_counter()
    await walk.acall(steps)
    return (time.perf_counter() - start) / steps * 1e6


async def on(steps: int) -> float:
    """Return what a step costs with a watch, in microseconds."""
    with watch():
        return await off(steps)


async def added(steps: int) -> float:
    """Return what a watch adds to a step, in microseconds."""
    return await on(steps) - await off(steps)


def watching(steps: int) -> Case:
    """Compare a step of an async side with and without a watch."""
    return Case(
        name="watch, one step of an async side",
        reference="off",
        gauge=Gauge.RETURNED,
        unit="us",
        sides=[
            Side("off", partial(off, steps)),
            Side("on", partial(on, steps)),
            Side("added", partial(added, steps), target=Target(at_most=10, of="median")),
        ],
    )


def benchmark(*, quick: bool) -> Sequence[Case]:
    """Return a case for each bridge, for many calls over each, and for `watch`."""
    portal = Portal()
    return [
        async_from_sync(10 if quick else 1000),
        sync_from_async(10 if quick else 300, portal),
        rush(20 if quick else 1000),
        sync_batch(20 if quick else 1000, portal),
        watching(100 if quick else 20_000),
    ]
