"""`watch`: which step of an async side held the event loop, for how long and where."""

import asyncio
import contextlib
import functools
import gc
import pickle
import threading
import time
import urllib.request
import warnings
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from asyncify import BlockingWarning, Dual, concurrency, dual, registry, watch, watches
from asyncify.runnable import AnyDual
from tests.waiting import SAFETY_NET, run_program


class Clock:
    """The time that a watch sees; it passes only when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Put a clock of the test's own into the watch."""
    clock = Clock()
    monkeypatch.setattr(watches, "perf_counter", clock)
    return clock


@pytest.fixture
def quiet() -> Iterator[None]:
    """Let the warnings pass where a test looks at the records."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BlockingWarning)
        yield


# --- what is reported ---


@pytest.mark.usefixtures("quiet")
async def test_a_step_that_held_the_loop_is_reported(clock):
    """A step over the threshold is a record with the pair, the seconds and the await that it went on from."""

    @dual
    async def fetch(query: str) -> str:
        await asyncio.sleep(0)
        clock.pass_by(0.12)
        return query

    with watch() as watching:
        result = await fetch.ainvoke("usd")
    (held,) = watching.held

    assert result == "usd"
    assert held.pair == "fetch"
    assert held.seconds == pytest.approx(0.12)
    assert held.since is not None
    assert (held.since.file, held.since.line) == (__file__, fetch.afunc.__code__.co_firstlineno + 2)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("limited", [False, True], ids=["free", "limited"])
@pytest.mark.parametrize("call", ["__call__", "acall", "ainvoke"])
async def test_a_def_that_is_awaited_is_watched(clock, call, limited):
    """What it returns is timed, as the async side."""

    async def hold(query: str) -> str:
        clock.pass_by(0.12)
        return query

    @dual(sync=lambda query: query)
    def fetch(query: str) -> Awaitable[str]:
        return hold(query)

    if limited:
        concurrency(limit=1)(fetch)
    with watch() as watching:
        result = await getattr(fetch, call)("usd")

    assert (result, [held.pair for held in watching.held]) == ("usd", ["fetch"])


@pytest.mark.usefixtures("quiet")
async def test_a_first_step_has_no_await_before_it(clock):
    """What holds the loop right from the start of the call is reported as such."""

    @dual
    async def fetch(query: str) -> None:
        clock.pass_by(0.12)

    with watch() as watching:
        await fetch.ainvoke("usd")

    assert [held.since for held in watching.held] == [None]
    assert "from its start" in str(watching.held[0])


@pytest.mark.usefixtures("quiet")
async def test_the_await_before_may_be_in_a_coroutine_of_ones_own(clock):
    """The await is looked for as deep as one's own code goes, and not in the standard library."""

    async def helper() -> None:
        await asyncio.sleep(0)
        clock.pass_by(0.12)

    @dual
    async def fetch(query: str) -> None:
        await helper()

    with watch() as watching:
        await fetch.ainvoke("usd")

    assert watching.held[0].since is not None
    assert watching.held[0].since.function.endswith("helper")
    assert watching.held[0].since.line == helper.__code__.co_firstlineno + 1


async def test_awaiting_holds_nothing(clock):
    """The corrected version awaits, and however long that takes, nothing is reported."""

    async def elsewhere() -> None:
        clock.pass_by(0.12)

    @dual
    async def fetch(query: str) -> None:
        await asyncio.create_task(elsewhere())

    with watch() as watching:
        await fetch.ainvoke("usd")

    assert list(watching.held) == []


async def test_a_step_within_the_threshold_is_not_reported(clock):
    """Up to the threshold is no finding, neither for one step nor for the sum of several."""

    @dual
    async def fetch(query: str) -> None:
        for _ in range(3):
            clock.pass_by(0.25)
            await asyncio.sleep(0)

    with watch(threshold=0.25) as watching:
        await fetch.ainvoke("usd")

    assert list(watching.held) == []


@pytest.mark.usefixtures("quiet")
async def test_a_pair_that_awaits_another_is_not_blamed_for_it(clock):
    """The innermost pair whose step it was is reported, and its caller only for time of its own."""

    @dual
    async def inner(query: str) -> None:
        clock.pass_by(0.12)

    @dual
    async def outer(query: str) -> None:
        await inner.acall(query)

    @dual
    async def guilty(query: str) -> None:
        await inner.acall(query)
        clock.pass_by(0.3)

    with watch() as watching:
        await outer.ainvoke("usd")
        await guilty.ainvoke("usd")

    assert [(held.pair, round(held.seconds, 2)) for held in watching.held] == [
        ("inner", 0.12),
        ("inner", 0.12),
        ("guilty", 0.3),
    ]


@pytest.mark.usefixtures("quiet")
async def test_a_step_that_raises_is_reported_too(clock):
    """The error passes through unchanged."""

    @dual
    async def fetch(query: str) -> None:
        clock.pass_by(0.12)
        raise KeyError(query)

    with watch() as watching, pytest.raises(KeyError, match="usd"):
        await fetch.ainvoke("usd")

    assert len(watching.held) == 1


@pytest.mark.usefixtures("quiet")
async def test_a_limited_side_is_watched(clock):
    """What waits at the limiter is not the step's; what the function does is."""

    @concurrency(limit=1)
    async def fetch(query: str) -> None:
        await asyncio.sleep(0)
        clock.pass_by(0.12)

    with watch() as watching:
        await asyncio.gather(*(fetch.ainvoke("usd") for _ in range(3)))

    assert [held.pair for held in watching.held] == ["fetch"] * 3


@pytest.mark.usefixtures("quiet")
def test_a_bridged_sync_call_is_watched(clock):
    """An async side that is called by sync code holds the background loop for all other such calls."""

    @dual
    async def fetch(query: str) -> None:
        clock.pass_by(0.12)

    with watch() as watching:
        fetch.invoke("usd")

    assert [held.pair for held in watching.held] == ["fetch"]


@pytest.mark.usefixtures("quiet")
async def test_an_async_generator_is_watched(clock):
    """Each step of a stream is timed, and its chunks, its end and its early close are as without a watch."""
    closed: list[str] = []

    @dual
    async def letters(query: str) -> AsyncIterator[str]:
        try:
            for letter in query:
                yield letter
                await asyncio.sleep(0)
                clock.pass_by(0.12)
        finally:
            closed.append(query)

    with watch() as watching:
        all_of_them = [letter async for letter in letters.acall("usd")]
        early: Any = letters.acall("eur")
        first = await anext(early)
        await early.aclose()

    assert (all_of_them, first, closed) == (["u", "s", "d"], "e", ["usd", "eur"])
    assert [held.since.line if held.since else None for held in watching.held] == [
        letters.afunc.__code__.co_firstlineno + 5
    ] * 3


@pytest.mark.usefixtures("quiet")
async def test_cancellation_reaches_a_watched_coroutine():
    """A watched coroutine can be cancelled, and may take its time to clean up."""
    events: list[str] = []

    @dual
    async def fetch(query: str) -> None:
        try:
            await asyncio.sleep(SAFETY_NET)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            events.append("cleaned up")
            raise

    with watch():
        call = asyncio.create_task(fetch.acall("usd"))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    assert events == ["cleaned up"]


async def test_a_watched_coroutine_that_is_cancelled_before_it_starts_leaves_nothing():
    """Its function is not called; a coroutine that nobody awaits would be warned of."""
    called: list[str] = []

    @dual
    async def fetch(query: str) -> None:
        called.append(query)

    with watch():
        call = asyncio.create_task(fetch.acall("usd"))
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    gc.collect()

    assert called == []


@pytest.mark.parametrize("watched", [False, True], ids=["plain", "watched"])
def test_a_timeout_over_a_yield_of_a_watched_generator_fires(watched):
    """What is thrown in at its yield reaches the generator, as it does without a watch."""

    @dual
    async def hasty(query: str) -> AsyncIterator[str]:
        try:
            async with asyncio.timeout(0.01):
                yield query
                await asyncio.sleep(SAFETY_NET)
        except TimeoutError:
            yield "late"

    with watch() if watched else contextlib.nullcontext():
        stream = hasty.stream("usd")
        first = next(stream)
        time.sleep(0.1)  # in which the timeout fires, at the yield

        assert [first, *stream] == ["usd", "late"]


async def test_an_abandoned_watched_coroutine_is_closed():
    """A watched coroutine that is closed closes the one that it watches."""
    events: list[str] = []

    @dual
    async def fetch(query: str) -> None:
        try:
            await asyncio.sleep(SAFETY_NET)
        finally:
            events.append("closed")

    with watch():
        call: Any = fetch.acall("usd")
        call.send(None)
        call.close()

    assert events == ["closed"]


# --- how it is told ---


async def test_the_warning_stands_at_the_line_and_says_what_to_do(clock):
    """The warning names pair, milliseconds and await, and points at the user's own line."""

    @dual
    async def fetch(query: str) -> None:
        await asyncio.sleep(0)
        clock.pass_by(0.12)

    line = fetch.afunc.__code__.co_firstlineno + 2
    with watch(), pytest.warns(BlockingWarning) as told:
        await fetch.ainvoke("usd")

    assert (told[0].filename, told[0].lineno) == (__file__, line)
    assert str(told[0].message).startswith("fetch held the event loop for 120 ms, after the await in ")
    assert f"fetch (test_watch.py:{line}); await an async client there, or run it in a thread" in str(told[0].message)


async def test_as_an_error_the_warning_is_raised_where_the_pair_is_awaited(clock):
    """With warnings as errors, as in tests, the call fails and the coroutine is closed."""
    events: list[str] = []

    @dual
    async def fetch(query: str) -> None:
        try:
            clock.pass_by(0.12)
            await asyncio.sleep(SAFETY_NET)
        finally:
            events.append("closed")

    with watch(), pytest.raises(BlockingWarning, match="held the event loop for 120 ms"):
        await fetch.ainvoke("usd")
    gc.collect()

    assert events == ["closed"]


@pytest.mark.usefixtures("quiet")
async def test_as_an_error_the_warning_does_not_hide_the_calls_own(clock):
    """What the function raises is what its caller handles; the finding is kept."""
    warnings.simplefilter("error", BlockingWarning)

    @dual
    async def fetch(query: str) -> None:
        clock.pass_by(0.12)
        raise KeyError(query)

    @dual
    async def letters(query: str) -> AsyncIterator[str]:
        yield query
        clock.pass_by(0.12)
        raise KeyError(query)

    with watch() as watching:
        with pytest.raises(KeyError, match="usd"):
            await fetch.ainvoke("usd")
        with pytest.raises(KeyError, match="eur"):
            _ = [letter async for letter in letters.astream("eur")]

    assert [held.pair for held in watching.held] == ["fetch", "letters"]


@pytest.mark.usefixtures("quiet")
async def test_as_an_error_the_warning_is_raised_at_the_end_of_a_stream_too(clock):
    """That a generator ends is no error."""
    warnings.simplefilter("error", BlockingWarning)

    @dual
    async def letters(query: str) -> AsyncIterator[str]:
        yield query
        clock.pass_by(0.12)

    with watch(), pytest.raises(BlockingWarning, match="held the event loop for 120 ms"):
        _ = [letter async for letter in letters.astream("usd")]


# --- the sampler, by the real clock ---

THRESHOLD = 0.001


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Return what is set once the stack of a step has been looked at."""
    looked = threading.Event()
    look = watches._Step.look

    def look_and_tell(step: Any, thread: int) -> None:
        look(step, thread)
        looked.set()

    monkeypatch.setattr(watches._Step, "look", look_and_tell)
    return looked


@pytest.mark.usefixtures("quiet")
async def test_the_blocking_line_itself_is_found(looked):
    """`time.sleep` in an async side is seen while it sleeps: file, line and function of the call."""

    def hold() -> None:
        time.sleep(THRESHOLD * looked.wait(SAFETY_NET))

    @dual
    async def fetch(query: str) -> None:
        await asyncio.sleep(0)
        hold()

    with watch(threshold=THRESHOLD) as watching:
        await fetch.ainvoke("usd")
    held = watching.held[-1]

    assert held.at is not None
    assert (held.at.file, held.at.line) == (__file__, hold.__code__.co_firstlineno + 1)
    assert f" in {held.at}, after the await in " in str(held)


@contextlib.contextmanager
def slow_server(wait: Callable[[], Any]) -> Iterator[str]:
    """Serve one request, which takes a while, and give the address."""

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wait()
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Slow)
    serving = threading.Thread(target=server.handle_request, daemon=True)
    serving.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    serving.join()
    server.server_close()


def read(url: str) -> int:
    """Read over HTTP, and block for as long as that takes."""
    with urllib.request.urlopen(url, timeout=SAFETY_NET) as response:  # noqa: S310  (the test's own server)
        return int(response.status)


@pytest.mark.usefixtures("quiet")
async def test_a_blocking_http_read_is_found_at_the_users_line(looked):
    """A read over a socket is reported where the user's code calls it, not where the library sits in `recv`."""

    @dual
    async def fetch(url: str) -> int:
        with urllib.request.urlopen(url, timeout=SAFETY_NET) as response:  # noqa: ASYNC210, S310  (the trap itself)
            return int(response.status)

    def wait() -> None:
        time.sleep(THRESHOLD * looked.wait(SAFETY_NET))

    with slow_server(wait) as url, watch(threshold=THRESHOLD) as watching:
        status = await fetch.ainvoke(url)

    assert status == 204
    assert watching.held[-1].at is not None
    assert watching.held[-1].at.line == fetch.afunc.__code__.co_firstlineno + 2


async def test_a_sleep_in_a_thread_holds_nothing(clock):
    """The corrected version of `time.sleep`: the await of a thread takes as long, and nothing is reported."""
    step_is_over = threading.Event()

    def sleep() -> None:
        assert step_is_over.wait(SAFETY_NET)
        clock.pass_by(0.12)

    @dual
    async def fetch(query: str) -> None:
        asyncio.get_running_loop().call_soon(step_is_over.set)
        await asyncio.to_thread(sleep)

    with watch() as watching:
        await fetch.ainvoke("usd")

    assert clock.now == 0.12
    assert list(watching.held) == []


async def test_an_http_read_in_a_thread_holds_nothing(clock):
    """The corrected version of a blocking read: the await of a thread takes as long, and nothing is reported."""
    step_is_over = threading.Event()

    def wait() -> None:
        assert step_is_over.wait(SAFETY_NET)
        clock.pass_by(0.12)

    @dual
    async def fetch(url: str) -> int:
        asyncio.get_running_loop().call_soon(step_is_over.set)
        return await asyncio.to_thread(read, url)

    with slow_server(wait) as url, watch() as watching:
        status = await fetch.ainvoke(url)

    assert (status, clock.now) == (204, 0.12)
    assert list(watching.held) == []


# --- on and off ---


def nothing(query: str) -> None:
    """Do nothing."""


def runs(pair: AnyDual) -> Any:
    """Return what a call of the async side runs just now."""
    return pair._live.async_.run


@pytest.mark.parametrize("make", [Dual, dual, lambda afunc: Dual(nothing, afunc)])
def test_without_a_watch_a_side_is_the_function_itself(make):
    """Off, it costs nothing: before and after a watch, what a pair without a limit runs is the user's own function."""

    async def fetch(query: str) -> None:
        pass

    async def letters(query: str) -> AsyncIterator[str]:
        yield query

    pairs = [make(fetch), Dual(letters)]
    before = [runs(pair) for pair in pairs]
    with watch():
        during = [runs(pair) for pair in pairs]
        pairs.append(Dual(fetch))
    after = [runs(pair) for pair in pairs]

    assert before == [fetch, letters]
    assert not {fetch, letters} & set(during)
    assert after == [fetch, letters, fetch]


async def hold(query: str) -> None:
    """Hold the loop, by the clock that the watch sees."""
    vars(watches)["perf_counter"].pass_by(0.12)


async def hold_and_yield(query: str) -> AsyncIterator[str]:
    """Hold the loop before a chunk."""
    await hold(query)
    yield query


class Client:
    """What has a method."""

    @dual
    async def hold(self, query: str) -> None:
        """Hold the loop."""
        await hold(query)


def overridden(fake: Any) -> Callable[[contextlib.ExitStack], AnyDual]:
    """Return what puts a fake in the place of a pair."""
    return lambda overrides: overrides.enter_context(registry.override(Dual(nothing), fake))


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda _: Dual(hold), id="plain"),
        pytest.param(lambda _: concurrency(limit=1)(Dual(hold)), id="limited"),
        pytest.param(lambda _: Client().hold, id="method"),
        pytest.param(lambda _: Dual(hold_and_yield), id="generator"),
        pytest.param(lambda _: pickle.loads(pickle.dumps(Dual(hold))), id="pickled"),  # noqa: S301  (made here)
        pytest.param(overridden(hold), id="fake"),
        pytest.param(overridden(Dual(hold)), id="fake pair"),
    ],
)
@pytest.mark.parametrize("call", ["ainvoke", "invoke"])
@pytest.mark.parametrize("made", ["before", "during"])
async def test_a_pair_is_watched_while_a_watch_is_on(clock, monkeypatch, make, call, made):
    """Whatever a pair is, however called and whenever made: during a watch it is timed, and after it no more."""

    async def run(pair: AnyDual) -> None:
        await (pair.ainvoke("usd") if call == "ainvoke" else asyncio.to_thread(pair.invoke, "usd"))

    with contextlib.ExitStack() as overrides:
        pair = make(overrides) if made == "before" else None
        with watch() as watching:
            pair = pair or make(overrides)
            await run(pair)
        monkeypatch.delattr(watches, "_stepped")
        held = clock.now
        await run(pair)

    assert len(watching.held) == 1
    assert clock.now > held


@pytest.mark.usefixtures("quiet")
async def test_a_fake_that_a_watch_outlives_is_gone(clock):
    """An override that begins before a watch and ends in it leaves the pair's own side, watched."""

    @dual
    async def fetch(query: str) -> None:
        clock.pass_by(0.12)

    override = registry.override(fetch, nothing)
    override.__enter__()
    with watch() as watching:
        await fetch.ainvoke("usd")
        override.__exit__(None, None, None)
        await fetch.ainvoke("usd")

    assert len(watching.held) == 1
    assert runs(fetch) is fetch.afunc


async def test_a_call_in_flight_when_a_watch_begins_or_ends_goes_on(clock):
    """What began before a watch is not watched, and what began in it ends after it, unreported."""
    go = asyncio.Event()

    @dual
    async def fetch(query: str) -> str:
        await go.wait()
        clock.pass_by(0.12)
        return query

    @dual
    async def letters(query: str) -> AsyncIterator[str]:
        for letter in query:
            yield letter
            clock.pass_by(0.12)

    async def spell(chunks: AsyncIterator[str]) -> str:
        return "".join([letter async for letter in chunks])

    async def begin(query: str) -> tuple[asyncio.Task[str], AsyncIterator[str]]:
        chunks = letters.acall(query)
        call = asyncio.create_task(fetch.acall(query))
        assert await anext(chunks) == query[0]
        await asyncio.sleep(0)
        return call, chunks

    call_before, chunks_before = await begin("before")
    with watch() as watching:
        rest_before = await spell(chunks_before)
        call_during, chunks_during = await begin("during")
    go.set()

    assert (rest_before, await spell(chunks_during)) == ("efore", "uring")
    assert (await call_before, await call_during) == ("before", "during")
    assert list(watching.held) == []


def test_a_watch_keeps_no_pair_alive():
    """A pair that nobody uses any more goes, watched or not."""

    async def fetch(query: str) -> None:
        pass

    with watch():
        pair = Dual(fetch)
        ref = weakref.ref(pair)
        del pair
        gc.collect()

    assert ref() is None


def test_pairs_that_are_equal_are_all_watched():
    """Two pairs of one function are equal, and each is told of a watch."""
    pairs = [Dual(hold), Dual(hold)]
    with watch():
        during = [runs(pair) for pair in pairs]

    assert pairs[0] == pairs[1]
    assert hold not in during
    assert [runs(pair) for pair in pairs] == [hold, hold]


def test_a_pair_made_in_the_midst_of_a_change_follows_it():
    """A finalizer may make a pair at any moment, also while the others are being told of a watch."""

    async def fetch(query: str) -> None:
        pass

    made: list[AnyDual] = []

    class Maker:
        def _set_watched(self, *, on: bool) -> None:
            made.append(Dual(fetch))

    maker = Maker()
    watches.subscribe(maker)
    with watch():
        during = [runs(pair) for pair in made]

    assert len(during) == 2
    assert fetch not in during
    del maker

    assert [runs(pair) for pair in made] == [fetch] * 3


def test_a_pair_made_while_another_thread_begins_a_watch_follows_it():
    """A pair that is just being told that there is no watch is told of a new one after that, not before."""
    told: list[bool] = []
    first, second = threading.Event(), threading.Event()

    class Slow:
        def _set_watched(self, *, on: bool) -> None:
            (second if first.is_set() else first).set()
            second.wait(0 if on else 0.1)  # which the watch would use, if it did not have to wait for the end of this
            told.append(on)

    slow = Slow()
    making = threading.Thread(target=watches.subscribe, args=(slow,))
    making.start()
    assert first.wait(SAFETY_NET)
    with watch():
        making.join(SAFETY_NET)
        during = list(told)

    assert during == [False, True]


async def test_after_a_watch_nothing_is_left(clock):
    """When a watch ends, its thread has ended, and later calls are nobody's."""

    @dual
    async def fetch(query: str) -> None:
        clock.pass_by(0.12)

    with watch() as watching:
        threads = [thread for thread in threading.enumerate() if thread.name == "asyncify-watch"]
    await fetch.ainvoke("usd")

    assert len(threads) == 1
    assert not threads[0].is_alive()
    assert list(watching.held) == []


@pytest.mark.usefixtures("quiet")
async def test_watches_within_each_other_have_thresholds_of_their_own(clock):
    """Each watch keeps what is over its own threshold."""

    @dual
    async def fetch(query: str) -> None:
        clock.pass_by(0.12)

    with watch(threshold=1) as coarse, watch(threshold=0.1) as fine:
        await fetch.ainvoke("usd")

    assert (len(coarse.held), len(fine.held)) == (0, 1)


@pytest.mark.usefixtures("quiet")
async def test_a_watch_that_is_entered_twice_reports_once(clock):
    """One watch in two hands, as a decorator of two functions that run at once, watches until both have ended."""

    @dual
    async def fetch(query: str) -> None:
        clock.pass_by(0.12)

    watching = watch()
    with watching:
        with watching:
            await fetch.ainvoke("usd")
        await fetch.ainvoke("usd")

    assert len(watching.held) == 2


@pytest.mark.usefixtures("quiet")
def test_a_decorated_function_is_watched_while_it_runs(clock):
    """`@watch()` on a sync function watches what it calls, and gives its result."""
    watching = watch()

    @dual
    async def fetch(query: str) -> str:
        clock.pass_by(0.12)
        return query

    @watching
    def main(query: str) -> str:
        return str(fetch.invoke(query))

    assert main("usd") == "usd"
    assert main.__name__ == "main"
    assert len(watching.held) == 1


@pytest.mark.usefixtures("quiet")
async def test_a_decorated_async_function_is_watched_while_it_runs(clock):
    """`@watch()` on an async function watches until it has ended, not only until its coroutine is made."""
    watching = watch()

    @dual
    async def fetch(query: str) -> str:
        clock.pass_by(0.12)
        return query

    @watching
    async def main(query: str) -> str:
        return str(await fetch.ainvoke(query))

    assert await main("usd") == "usd"
    assert len(watching.held) == 1


def test_a_generator_can_not_be_decorated():
    """Its call ends before anything of it has run, so nothing would be watched; the message says what to write."""

    def chunks() -> Iterator[int]:
        yield 1

    for fn in (chunks, hold_and_yield, functools.lru_cache(chunks)):
        with pytest.raises(TypeError, match=rf"{fn.__name__} is a generator, .* write the `with` in it"):
            watch()(fn)


@pytest.mark.parametrize("threshold", [0, -1, float("nan"), float("inf")])
def test_a_threshold_that_can_not_be_meant_is_refused(threshold):
    """A threshold is a positive number of seconds."""
    with pytest.raises(ValueError, match="must be above 0 and finite, as in watch"):
        watch(threshold)


@pytest.mark.parametrize("threshold", [True, "0.1", None])
def test_a_threshold_of_another_type_is_refused(threshold):
    """A bare `@watch`, which would take the function for a threshold, is told as well."""
    with pytest.raises(TypeError, match="must be a number, as in watch"):
        watch(threshold)


FORKING = """
import os, threading
from asyncify import Dual, watch, watches

async def fetch(query):
    pass

pairs = [Dual(fetch) for _ in range(100)]
over = threading.Event()

def come_and_go():
    while not over.is_set():
        with watch():
            pass

def agree():
    on = bool(watches._watches)
    return all((pair._live.async_.run is not fetch) is on for pair in [*pairs, Dual(fetch)])

thread = threading.Thread(target=come_and_go)
thread.start()
for _ in range(30):
    if os.fork() == 0:
        os._exit(not agree())
    print(os.wait()[1], end=" ")
over.set()
thread.join()
print(agree())
"""


def test_a_process_that_is_forked_while_a_watch_begins():
    """A child can make pairs, and all its pairs agree on whether there is a watch."""
    assert run_program(FORKING) == "0 " * 30 + "True\n"


IN_A_STEP = """
import os
from asyncify import Dual, watch

async def fetch(query):
    return "child" if os.fork() == 0 else f"parent {os.wait()[1]}"

with watch(threshold=1000):
    try:
        Dual(fetch).acall("usd").send(None)
    except StopIteration as end:
        print(end.value, flush=True)
"""


def test_a_process_that_is_forked_in_a_watched_step():
    """The step that forked goes on in the child, and those of other threads are not there."""
    assert run_program(IN_A_STEP) == "child\nparent 0\n"


PROGRAM = """
import asyncio, os, time, warnings
from asyncify import dual, watches

time_passed = [0.0]
watches.perf_counter = lambda: time_passed[0]

@dual
async def fetch(query):
    time_passed[0] += 0.12

def watched():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        asyncio.run(fetch.ainvoke("usd"))
    return len(told)

print("here", watched(), flush=True)
if os.fork() == 0:
    alive = [watch._thread.is_alive() for watch in watches._watches]
    print("child", watched(), alive, flush=True)
    os._exit(0)
os.wait()
"""


@pytest.mark.parametrize(
    ("value", "printed"),
    [("1", "here 1\nchild 1 [True]\n"), ("False", "here 0\nchild 0 []\n"), ("", "here 0\nchild 0 []\n")],
)
def test_the_environment_switches_a_watch_on(value, printed, monkeypatch):
    """`ASYNCIFY_WATCH=1` watches the whole program and the processes that it forks; false and nothing do not."""
    monkeypatch.setenv("ASYNCIFY_WATCH", value)

    assert run_program(PROGRAM) == printed
