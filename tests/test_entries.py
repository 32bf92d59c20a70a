"""Entries: a side with its limit around it, made from the other side where nobody wrote it."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from asyncify import BridgeError, DeadlockError, Limiter, pools
from asyncify.entries import Bridge, Entries, make_entries
from asyncify.gate import Gate
from asyncify.pools import DEFAULT_THREADS
from tests.waiting import SAFETY_NET, until


def fetch(query: str) -> str:
    """Do the work of the sync sides below."""
    return query.upper()


async def fetch_async(query: str) -> str:
    """Do the work of the async sides below."""
    return query.upper()


def chunks(query: str) -> Iterator[str]:
    """Yield the letters."""
    yield from query


async def chunks_async(query: str) -> AsyncIterator[str]:
    """Yield the letters."""
    for letter in query:
        yield letter


Side = Callable[..., Any] | None


def entries(sides: tuple[Side, Side], limiter: Limiter | None = None, bridge: Bridge = "thread") -> Entries:
    """Make the entries of a pair that has these sides, sync and async."""
    gate = None if limiter is None else Gate(limiter)
    return make_entries(*sides, gate=gate, bridge=bridge, name="fetch", called_like=fetch)


SIDES = [
    pytest.param((fetch, fetch_async), id="both native"),
    pytest.param((fetch, None), id="async bridged"),
    pytest.param((None, fetch_async), id="sync bridged"),
]
STREAMS = [
    pytest.param((chunks, chunks_async), id="both native"),
    pytest.param((chunks, None), id="async bridged"),
    pytest.param((None, chunks_async), id="sync bridged"),
]
LIMITS = [pytest.param(False, id="unlimited"), pytest.param(True, id="limited")]


@pytest.fixture(params=LIMITS)
def limiter(request: pytest.FixtureRequest) -> Limiter | None:
    """Return a limiter of one slot, or none."""
    return Limiter(limit=1) if request.param else None


@pytest.mark.parametrize("sides", SIDES)
def test_the_sync_entry_gives_the_result(sides, limiter):
    """Whichever side is native, the sync entry returns the function's result, again and again."""
    run = entries(sides, limiter).sync.run

    assert [run("usd"), run(query="eur")] == ["USD", "EUR"]


@pytest.mark.parametrize("sides", SIDES)
async def test_the_async_entry_gives_the_result(sides, limiter):
    """Whichever side is native, the async entry returns the function's result, again and again."""
    run = entries(sides, limiter).async_.run

    assert [await run("usd"), await run(query="eur")] == ["USD", "EUR"]


@pytest.mark.parametrize("sides", STREAMS)
def test_the_sync_entry_streams(sides, limiter):
    """Whichever side is native, the sync entry yields the generator's chunks, again and again."""
    run = entries(sides, limiter).sync.run

    assert [list(run("usd")), list(run("eur"))] == [["u", "s", "d"], ["e", "u", "r"]]


@pytest.mark.parametrize("sides", STREAMS)
async def test_the_async_entry_streams(sides, limiter):
    """Whichever side is native, the async entry yields the generator's chunks, again and again."""
    run = entries(sides, limiter).async_.run

    assert [[chunk async for chunk in run(query)] for query in ("usd", "eur")] == [["u", "s", "d"], ["e", "u", "r"]]


@pytest.mark.parametrize(
    ("sides", "bridge", "kinds"),
    [
        ((fetch, fetch_async), "thread", ("native", "native")),
        ((fetch, None), "thread", ("native", "bridged")),
        ((None, fetch_async), "thread", ("bridged", "native")),
        ((fetch, None), "error", ("native", "missing")),
        ((None, fetch_async), "error", ("missing", "native")),
    ],
)
def test_an_entry_knows_whether_somebody_wrote_it(sides, bridge, kinds):
    """A side is native, bridged, or missing where a bridge is forbidden."""
    made = entries(sides, bridge=bridge)

    assert (made.sync.kind, made.async_.kind) == kinds


def test_a_forbidden_sync_side_says_what_to_write():
    """With `bridge="error"` a call of the side that nobody wrote names the function and the argument to give."""
    run = entries((None, fetch_async), bridge="error").sync.run

    with pytest.raises(BridgeError, match=r"test_entries\.fetch_async .* no sync side .* give it as sync="):
        run("usd")


async def test_a_forbidden_async_side_says_what_to_write():
    """With `bridge="error"` a call of the side that nobody wrote names the function and the argument to give."""
    run = entries((fetch, None), bridge="error").async_.run

    with pytest.raises(BridgeError, match=r"test_entries\.fetch .* no async side .* give it as async_="):
        await run("usd")


@pytest.mark.parametrize("sides", SIDES)
def test_a_failed_sync_call_gives_its_slot_back(sides):
    """Whatever a call raises, a wrong argument included, its slot is free afterwards."""
    limiter = Limiter(limit=1)
    run = entries(sides, limiter).sync.run
    for arguments in ([None], [], ["usd", "eur"]):
        with pytest.raises((TypeError, AttributeError)):
            run(*arguments)

    assert limiter.stats().in_flight == 0
    assert run("usd") == "USD"


@pytest.mark.parametrize("sides", SIDES)
async def test_a_failed_async_call_gives_its_slot_back(sides):
    """Whatever a call raises, a wrong argument included, its slot is free afterwards."""
    limiter = Limiter(limit=1)
    run = entries(sides, limiter).async_.run
    for arguments in ([None], [], ["usd", "eur"]):
        with pytest.raises((TypeError, AttributeError)):
            await run(*arguments)

    assert limiter.stats().in_flight == 0
    assert await run("usd") == "USD"


@pytest.mark.parametrize("sides", STREAMS)
def test_a_sync_stream_holds_its_slot_for_its_life(sides):
    """The slot is taken with the first chunk and given back when the stream is closed, however early."""
    limiter = Limiter(limit=2)
    stream = entries(sides, limiter).sync.run("usd")
    held = [limiter.stats().in_flight]
    next(stream)
    held.append(limiter.stats().in_flight)
    stream.close()
    held.append(limiter.stats().in_flight)

    assert held == [0, 1, 0]


@pytest.mark.parametrize("sides", STREAMS)
async def test_an_async_stream_holds_its_slot_for_its_life(sides):
    """The slot is taken with the first chunk and given back when the stream is closed, however early."""
    limiter = Limiter(limit=2)
    stream = entries(sides, limiter).async_.run("usd")
    held = [limiter.stats().in_flight]
    await anext(stream)
    held.append(limiter.stats().in_flight)
    await stream.aclose()

    assert held == [0, 1]
    await until_idle(limiter)


async def until_idle(limiter: Limiter) -> None:
    """Wait until no call is in flight: a thread may need a moment to end."""
    await until(lambda: not limiter.stats().in_flight)


class Stuck:
    """A function that stays in its thread until it is let go."""

    def __init__(self) -> None:
        self.started = threading.Semaphore(0)
        self.go = threading.Event()
        self.calls = 0

    def __call__(self, query: str) -> str:
        self.calls += 1
        self.started.release()
        assert self.go.wait(SAFETY_NET)
        return query

    async def until_started(self) -> None:
        assert await asyncio.to_thread(self.started.acquire, timeout=SAFETY_NET)


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    """Return a function that blocks, and let it go in the end."""
    stuck = Stuck()
    yield stuck
    stuck.go.set()


async def test_a_cancelled_call_holds_its_slot_until_its_thread_ends(stuck):
    """A thread can't be stopped, so its call counts against the limit for as long as it really runs."""
    limiter = Limiter(limit=1)
    run = entries((stuck, None), limiter).async_.run
    call = asyncio.create_task(run("usd"))
    await stuck.until_started()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    following = asyncio.create_task(run("eur"))
    await asyncio.sleep(0)
    held = (limiter.stats().in_flight, limiter.stats().waiting, stuck.calls)
    stuck.go.set()

    assert await following == "eur"
    assert held == (1, 1, 1)


async def test_a_call_cancelled_at_the_limiter_never_runs(stuck):
    """A call that waits for its slot leaves nothing behind when it is cancelled."""
    limiter = Limiter(limit=1)
    run = entries((stuck, None), limiter).async_.run
    first = asyncio.create_task(run("usd"))
    await stuck.until_started()
    second = asyncio.create_task(run("eur"))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    waiting = limiter.stats().waiting
    stuck.go.set()
    await first
    await until_idle(limiter)

    assert waiting == 0
    assert stuck.calls == 1


async def test_a_limit_has_a_thread_for_each_of_its_calls(stuck):
    """With a limit above the default number of threads, that many calls run at once."""
    limiter = Limiter(limit=DEFAULT_THREADS + 6)
    run = entries((stuck, None), limiter).async_.run
    calls = [asyncio.create_task(run("usd")) for _ in range(DEFAULT_THREADS + 6)]
    for _ in calls:
        await stuck.until_started()
    stuck.go.set()

    assert await asyncio.gather(*calls) == ["usd"] * (DEFAULT_THREADS + 6)


@pytest.mark.parametrize("limiter", [None, Limiter(per_second=1_000_000, burst=1000)], ids=["none", "a rate alone"])
async def test_without_a_limit_there_are_as_many_threads_as_documented(stuck, limiter):
    """Where nothing bounds the calls in flight, the pair's own threads do."""
    run = entries((stuck, None), limiter).async_.run
    calls = [asyncio.create_task(run("usd")) for _ in range(DEFAULT_THREADS + 1)]
    for _ in range(DEFAULT_THREADS):
        await stuck.until_started()
    one_more = stuck.started.acquire(blocking=False)
    stuck.go.set()
    await asyncio.gather(*calls)

    assert not one_more
    assert stuck.calls == DEFAULT_THREADS + 1


class Counting(ThreadPoolExecutor):
    """The default executor of a loop, which counts what it is given."""

    given = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self.given += 1
        return super().submit(fn, *args, **kwargs)


async def test_full_bridges_leave_the_loops_own_threads_alone(stuck):
    """With every bridge full and calls waiting, the loop's only thread is free for `asyncio.to_thread`."""
    executor = Counting(1)
    asyncio.get_running_loop().set_default_executor(executor)

    def stuck_chunks(query: str) -> Iterator[str]:
        yield stuck(query)

    async def consume() -> str:
        return "".join([chunk async for chunk in entries((stuck_chunks, None)).async_.run("usd")])

    unlimited = entries((stuck, None)).async_.run
    limited = entries((stuck, None), Limiter(limit=5)).async_.run
    calls = [asyncio.create_task(unlimited("usd")) for _ in range(DEFAULT_THREADS + 1)]
    calls += [asyncio.create_task(limited("usd")) for _ in range(6)]
    calls += [asyncio.create_task(consume())]
    await until(lambda: stuck.calls == DEFAULT_THREADS + 5 + 1)
    before = executor.given
    async with asyncio.timeout(SAFETY_NET):
        answer = await asyncio.to_thread(lambda: "at once")
    still_full = stuck.calls
    stuck.go.set()

    assert await asyncio.gather(*calls) == ["usd"] * len(calls)
    assert (before, answer, executor.given) == (0, "at once", 1)
    assert still_full == DEFAULT_THREADS + 5 + 1


async def test_a_thousand_bridged_pairs_leave_no_threads(monkeypatch):
    """1,000 pairs that were called all at once mean no thread when they have been idle: as many as there were."""
    monkeypatch.setattr(pools, "_IDLE_SECONDS", 0.01)
    before = set(threading.enumerate())
    runs = [entries((fetch, None)).async_.run for _ in range(1000)]

    assert await asyncio.gather(*(run("usd") for run in runs)) == ["USD"] * 1000
    await until(lambda: not set(threading.enumerate()) - before)


async def test_a_coroutine_that_a_sync_function_returns_is_within_the_limit():
    """`lambda q: fetch(q)` over an async function is awaited, and holds its slot until it has ended."""
    limiter = Limiter(limit=1)
    held: list[int] = []

    async def fetch() -> str:
        await asyncio.sleep(0)
        held.append(limiter.stats().in_flight)
        return "rate"

    run = entries((lambda _: fetch(), None), limiter).async_.run

    assert await run("usd") == "rate"
    assert (held, limiter.stats().in_flight) == ([1], 0)


async def test_a_bridged_call_that_waits_for_itself_is_told_so():
    """A function in a thread that calls itself with its only slot taken gets an error, not a deadlock."""
    limiter = Limiter(limit=1)
    made: list[Entries] = []

    def again(query: str) -> Any:
        return made[0].sync.run(query)

    made.append(entries((again, None), limiter))

    with pytest.raises(DeadlockError, match="held by calls that wait for a slot of this very limiter"):
        await made[0].async_.run("usd")
    assert limiter.stats().in_flight == 0


async def test_a_bridged_stream_that_waits_for_itself_is_told_so():
    """A generator in a thread that calls itself with its only slot taken gets an error, not a deadlock."""
    limiter = Limiter(limit=1)
    made: list[Entries] = []

    def again(query: str) -> Iterator[str]:
        yield from made[0].sync.run(query)

    made.append(entries((again, None), limiter))

    with pytest.raises(DeadlockError, match="held by calls that wait for a slot of this very limiter"):
        async for _ in made[0].async_.run("usd"):
            pass
    await until_idle(limiter)


async def test_a_thread_that_waits_for_the_task_that_waits_for_it_is_told_so():
    """A task that holds the only slot awaits a thread, and the thread wants that slot: an error, not a deadlock."""
    limiter = Limiter(limit=1)
    limited = entries((fetch, fetch_async), limiter)
    bridged = entries((limited.sync.run, None))

    async def outer(query: str) -> Any:
        return await bridged.async_.run(query)

    with pytest.raises(DeadlockError):
        await entries((None, outer), limiter).async_.run("usd")
    assert limiter.stats().in_flight == 0


def test_a_coroutine_that_waits_for_the_thread_that_waits_for_it_is_told_so():
    """A thread that holds the only slot waits for a coroutine, and that wants the slot: an error, not a deadlock."""
    limiter = Limiter(limit=1)
    limited = entries((fetch, fetch_async), limiter)

    async def inner(query: str) -> Any:
        return await limited.async_.run(query)

    bridged = entries((None, inner))

    with pytest.raises(DeadlockError):
        entries((bridged.sync.run, None), limiter).sync.run("usd")
    assert limiter.stats().in_flight == 0
