"""Many inputs: `abatch`, `batch`, `aeach` and a checkpoint, beside LangChain, gather, aiometer and aiostream.

The functions return at once, so that a side shows what it costs itself, or wait 0.1 s, so that it shows how near it
comes to having all of them wait at the same time.
"""

import asyncio
import gc
import tempfile
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from itertools import count, islice
from typing import Any

import aiometer
from aiostream import stream
from langchain_core.runnables import RunnableLambda

from asyncify import Dual, aeach, each
from benchmarks.harness import Case, Gauge, Side, Target

SECONDS = 0.1
WINDOW = 100
FLOOR = 40_000  # inputs a second that `aeach` is to reach


def at_once(value: int) -> int:
    """Return the input."""
    return value


async def at_once_async(value: int) -> int:
    """Return the input."""
    return value


async def nap(value: int) -> int:
    """Return the input after 0.1 s."""
    await asyncio.sleep(SECONDS)
    return value


quick: Dual[int, int] = Dual(at_once, at_once_async)
slow: Dual[int, int] = Dual(at_once, nap)
upstream_quick: RunnableLambda[int, int] = RunnableLambda(at_once, afunc=at_once_async)
upstream_slow: RunnableLambda[int, int] = RunnableLambda(at_once, afunc=nap)


async def gathered(call: Callable[[int], Awaitable[int]], calls: int) -> None:
    """Make all calls by a raw gather."""
    await asyncio.gather(*(call(value) for value in range(calls)))


async def by_semaphore(call: Callable[[int], Awaitable[int]], calls: int) -> None:
    """Make all calls by a gather, so many of them at once."""
    places = asyncio.Semaphore(WINDOW)

    async def held(value: int) -> int:
        async with places:
            return await call(value)

    await asyncio.gather(*(held(value) for value in range(calls)))


async def by_aiometer(call: Callable[[int], Awaitable[int]], calls: int, max_at_once: int | None) -> None:
    """Make all calls by aiometer."""
    await aiometer.run_on_each(call, list(range(calls)), max_at_once=max_at_once)


async def by_aiostream(call: Callable[..., Awaitable[int]], calls: int) -> None:
    """Make all calls by aiostream, so many of them at once, and read them one after the other."""

    async def called(value: int, *_: int) -> int:
        return await call(value)

    mapped: Any = stream.map(stream.iterate(range(calls)), called, task_limit=WINDOW)
    async with mapped.stream() as results:
        async for _ in results:
            pass


async def abatch(runnable: RunnableLambda[int, int], calls: int) -> None:
    """Make all calls by `abatch`."""
    await runnable.abatch(list(range(calls)))


def batch(runnable: RunnableLambda[int, int], calls: int) -> None:
    """Make all calls by `batch`."""
    runnable.batch(list(range(calls)))


async def streamed(calls: int, **options: Any) -> None:
    """Read all results from `aeach`."""
    async for _ in aeach(quick, range(calls), window=WINDOW, **options):
        pass


def by_the_background_loop(calls: int) -> None:
    """Read all results of slow calls from `each(..., via="async")`."""
    for _ in each(slow, range(calls), via="async", window=calls):
        pass


async def one_task_each(calls: int) -> None:
    """Make a task for each call, a window of them at a time: the floor of what `aeach` can cost."""
    values = count()
    for _ in range(0, calls, WINDOW):
        for task in [asyncio.create_task(at_once_async(value)) for value in islice(values, WINDOW)]:
            await task


async def peak_difference(few: int, many: int) -> float:
    """Return by how many megabytes the peak memory of `aeach` over many inputs exceeds that over few."""
    return (await peak(many) - await peak(few)) / 1e6


async def peak(calls: int) -> int:
    """Return the most bytes that were allocated at once while `aeach` went over so many inputs."""
    gc.enable()
    gc.collect()
    tracemalloc.start()
    try:
        await streamed(calls)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        gc.disable()


async def rate(calls: int) -> float:
    """Return how many inputs a second `aeach` gets through."""
    began = asyncio.get_running_loop().time()
    await streamed(calls)
    return calls / (asyncio.get_running_loop().time() - began)


async def floor_rate(calls: int) -> float:
    """Return the same for one task each."""
    began = asyncio.get_running_loop().time()
    await one_task_each(calls)
    return calls / (asyncio.get_running_loop().time() - began)


def abatch_at_once(calls: int) -> Case:
    """Compare `abatch` over calls that return at once."""
    return Case(
        name=f"abatch of {calls:,} calls that return at once",
        reference="raw asyncio.gather",
        rounds=15,
        sides=[
            Side("raw asyncio.gather", partial(gathered, at_once_async, calls)),
            Side(f"gather with Semaphore({WINDOW})", partial(by_semaphore, at_once_async, calls), rounds=5),
            Side("aiometer", partial(by_aiometer, at_once_async, calls, None), rounds=2),
            Side(f"aiostream, {WINDOW} at once", partial(by_aiostream, at_once_async, calls), rounds=2),
            Side("RunnableLambda(f, afunc=g).abatch", partial(abatch, upstream_quick, calls), rounds=3),
            Side("Dual(f, g).abatch", partial(abatch, quick, calls), Target(at_most=2.0)),
            Side(
                "the same, against LangChain's",
                partial(abatch, quick, calls),
                Target(at_most=1 / 20),
                against="RunnableLambda(f, afunc=g).abatch",
            ),
        ],
    )


def abatch_of_naps(calls: int) -> Case:
    """Compare `abatch` over calls that wait."""
    return Case(
        name=f"abatch of {calls:,} calls of 0.1 s",
        reference="raw asyncio.gather",
        rounds=15,
        sides=[
            Side("raw asyncio.gather", partial(gathered, nap, calls)),
            Side("aiometer", partial(by_aiometer, nap, calls, None), rounds=2),
            Side("RunnableLambda(f, afunc=g).abatch", partial(abatch, upstream_slow, calls), rounds=2, warm=False),
            Side("Dual(f, g).abatch", partial(abatch, slow, calls), Target(at_most=1.15)),
        ],
    )


def batch_at_once(calls: int) -> Case:
    """Compare `batch` over calls that return at once."""
    return Case(
        name=f"batch of {calls:,} calls that return at once",
        reference="RunnableLambda(f).batch",
        sides=[
            Side("RunnableLambda(f).batch", partial(batch, upstream_quick, calls), rounds=3),
            Side("Dual(f).batch", partial(batch, quick, calls), Target(at_most=1 / 15)),
        ],
    )


def via_async(calls: int) -> Case:
    """Compare a sync caller's calls on the background loop with the 0.1 s that one of them takes."""
    return Case(
        name=f'each(..., via="async") over {calls:,} calls of 0.1 s',
        reference="physical limit",
        sides=[
            Side("physical limit", partial(nap, 0)),
            Side("raw asyncio.gather", partial(gathered, nap, calls)),
            Side('each(..., via="async")', partial(by_the_background_loop, calls), Target(at_most=1.5)),
        ],
    )


def streams(calls: int) -> Case:
    """Compare `aeach` with what reads results as they come."""
    return Case(
        name=f"a stream over {calls:,} inputs that return at once, {WINDOW} at a time",
        reference="aeach",
        rounds=3,
        sides=[
            Side("one task each", partial(one_task_each, calls)),
            Side("aeach", partial(streamed, calls)),
            Side("aeach, unordered", partial(streamed, calls, ordered=False)),
            Side("aiostream", partial(by_aiostream, at_once_async, calls), rounds=1, warm=False),
        ],
    )


class InTurns:
    """A stream without a checkpoint and one with, each read for a while in turn.

    A million inputs take many seconds, and the machine may be twice as slow in one of them as in the next: in turns,
    it is so for both.
    """

    def __init__(self, calls: int, turns: int) -> None:
        self.calls = calls
        self.turn = calls // turns
        self.seconds_recorded = 0.0

    async def without(self) -> float:
        """Read both streams from their beginning to their end; return the seconds that the one without took."""
        seconds = self.seconds_recorded = 0.0
        with tempfile.TemporaryDirectory() as directory:
            plain = aeach(quick, range(self.calls), window=WINDOW)
            recorded = aeach(quick, range(self.calls), window=WINDOW, checkpoint=f"{directory}/run.sqlite")
            async with aclosing(plain), aclosing(recorded):
                for _ in range(0, self.calls + 1, self.turn):  # the last turn finds the end, and closes the file
                    seconds += await self.read(plain)
                    self.seconds_recorded += await self.read(recorded)
        return seconds

    async def with_checkpoint(self) -> float:
        """Return the seconds that the other took, just then."""
        return self.seconds_recorded

    async def read(self, results: AsyncIterator[int]) -> float:
        """Read a stream for a turn; return the seconds that this took."""
        start = time.perf_counter()
        left = self.turn
        async for _ in results:
            left -= 1
            if not left:
                break
        return time.perf_counter() - start


def with_checkpoint(calls: int) -> Case:
    """Compare `aeach` with itself over a new checkpoint."""
    both = InTurns(calls, turns=min(calls, 100))
    return Case(
        name=f"aeach over {calls:,} inputs that return at once, {WINDOW} at a time, in turns",
        reference="aeach",
        gauge=Gauge.RETURNED,
        rounds=3,
        warmups=0,
        sides=[
            Side("aeach", both.without),
            Side("aeach with checkpoint", both.with_checkpoint, Target(at_most=2.0)),
        ],
    )


def stream_rate(calls: int) -> Case:
    """Measure how many inputs a second `aeach` gets through."""
    return Case(
        name=f"inputs a second over {calls:,}, {WINDOW} at a time",
        reference="one task each",
        rounds=1,
        warmups=0,
        gauge=Gauge.RETURNED,
        unit="a second",
        sides=[
            Side("one task each", partial(floor_rate, calls)),
            Side("aeach", partial(rate, calls), Target(at_least=FLOOR, of="median")),
        ],
    )


def memory(few: int, many: int) -> Case:
    """Measure by how much the peak memory grows with the inputs."""
    return Case(
        name=f"peak memory of aeach over {many:,} inputs, less that over {few:,}",
        reference="aeach",
        rounds=1,
        warmups=0,
        gauge=Gauge.RETURNED,
        unit="MB",
        sides=[Side("aeach", partial(peak_difference, few, many), Target(at_most=5.0, of="median"))],
    )


def benchmark(*, quick: bool) -> Sequence[Case]:
    """Return the cases; small ones if `quick`."""
    calls = 50 if quick else 10_000
    return [
        abatch_at_once(calls),
        abatch_of_naps(calls),
        batch_at_once(calls),
        via_async(calls // 10),
        streams(10 * calls),
        with_checkpoint(10 * calls),
        with_checkpoint(100 * calls),
        stream_rate(100 * calls),
        memory(calls, 10 * calls if quick else 100 * calls),
    ]
