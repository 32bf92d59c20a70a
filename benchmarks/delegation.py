"""Concurrent calls of 0.1 s: LangChain's thread pool, `afunc=`, a pair, and a limited sync function.

LangChain hands a sync function to the event loop's default pool, which has 6 threads on a machine with 2 cores. The
physical limit is what the same number of bare `asyncio.sleep` takes. A function limited to 50 calls at once can't be
faster than bare sleeps of which 50 run at once, so for more calls than that it is compared with those.
"""

import asyncio
import time
from collections.abc import Sequence
from functools import partial

from langchain_core.runnables import RunnableLambda

from asyncify import concurrency, dual
from benchmarks.harness import Case, Side, Target

SECONDS = 0.1
LIMIT = 50
UPSTREAM_IS_SLOW = 1000  # calls; its pool of 6 threads takes 17 s for them
NEAR = Target(at_most=1.10)


def nap(call: int) -> int:
    """Take 0.1 s of a thread."""
    time.sleep(SECONDS)
    return call


async def nap_async(call: int) -> int:
    """Take 0.1 s and no thread."""
    await asyncio.sleep(SECONDS)
    return call


@concurrency(limit=LIMIT)
def limited_nap(call: int) -> int:
    """Take 0.1 s of a thread, at most 50 at once."""
    return nap(call)


lambda_of_sync = RunnableLambda(nap)
lambda_of_both = RunnableLambda(nap, afunc=nap_async)
pair = dual(sync=nap, async_=nap_async)


async def bare(calls: int, at_once: int) -> None:
    """Sleep as often as there are calls, so many at once: nothing can be faster."""
    for done in range(0, calls, at_once):
        await asyncio.gather(*(nap_async(call) for call in range(done, min(done + at_once, calls))))


def case(calls: int) -> Case:
    """Compare all sides over so many calls, made by `abatch` at once."""
    inputs = range(calls)
    in_waves = calls > LIMIT
    slow = calls >= UPSTREAM_IS_SLOW
    waves = [Side(f"physical limit, {LIMIT} at once", partial(bare, calls, LIMIT))] if in_waves else []
    return Case(
        name="1 call" if calls == 1 else f"{calls:,} calls",
        reference="physical limit",
        sides=[
            Side("physical limit", partial(bare, calls, calls)),
            *waves,
            Side(
                "RunnableLambda(sync)",
                partial(lambda_of_sync.abatch, list(inputs)),
                rounds=2 if slow else None,
                warm=not slow,
            ),
            Side("RunnableLambda(sync, afunc=...)", partial(lambda_of_both.abatch, list(inputs))),
            Side(
                "dual(sync=..., async_=...)",
                partial(pair.abatch, list(inputs)),
                target=NEAR if calls == LIMIT else None,
            ),
            Side(
                f"sync only, @concurrency(limit={LIMIT})",
                partial(limited_nap.abatch, list(inputs)),
                target=NEAR if calls == LIMIT else None,
                against=waves[0].name if waves else None,
            ),
        ],
    )


def benchmark(*, quick: bool) -> Sequence[Case]:
    """Return one case for each number of calls."""
    return [case(calls) for calls in ((1, 8) if quick else (1, LIMIT, 100, 1000))]
