"""The traps that a pair's callers are told of: each as the documentation shows it, and the corrected version."""

import asyncio
import threading
import time
import warnings
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langchain_core.runnables import RunnableLambda

from asyncify import (
    BlockingWarning,
    BridgedWarning,
    Dual,
    UnboundedWarning,
    aeach,
    concurrency,
    dual,
    each,
    registry,
    traps,
)

MANY = 10_000


@pytest.fixture(autouse=True, scope="module")
def unhurried() -> None:
    """Tell of sync calls that hold an event loop, as always outside tests."""


def fetch(query: int) -> int:
    """Stand for a call over the network."""
    return query


async def fetch_async(query: int) -> int:
    """Stand for a call over the network."""
    return query


async def told(batch: Any) -> list[warnings.WarningMessage]:
    """Await a batch and return what it warned of."""
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        await batch
    return list(messages)


# --- no native async side ---


async def test_a_large_async_batch_over_threads_is_told():
    """The forgotten async side: the warning names the pair and the line to write, and points at the batch."""
    pair = Dual(fetch)
    with pytest.warns(BridgedWarning) as messages:
        outputs = await pair.abatch(list(range(10)))
    line = test_a_large_async_batch_over_threads_is_told.__code__.co_firstlineno + 4

    assert outputs == list(range(10))
    assert (messages[0].filename, messages[0].lineno) == (__file__, line)
    assert "10 async calls of fetch run in threads" in str(messages[0].message)
    assert "@dual(async_=fetch_async) over test_traps.fetch (" in str(messages[0].message)
    assert "; or warn=False in @dual or @concurrency, if threads will do" in str(messages[0].message)


async def test_a_pair_with_an_async_side_is_not_told_of_threads():
    """The corrected version has both sides, and says nothing."""
    assert await told(Dual(fetch, fetch_async).abatch(list(range(50)))) == []


async def test_a_small_async_batch_over_threads_is_not_told():
    """Up to nine calls threads do as well as anything."""
    assert await told(Dual(fetch).abatch(list(range(9)))) == []


async def test_it_is_told_once_for_each_pair():
    """A second batch of the same pair says nothing, another pair does."""
    first, second = Dual(fetch), Dual(fetch)
    counts = [len(await told(pair.abatch(list(range(10))))) for pair in (first, first, second)]

    assert counts == [1, 0, 1]


async def test_a_limit_does_not_make_an_async_side():
    """A limit sizes the threads, and they are threads all the same."""
    messages = await told(concurrency(limit=20)(Dual(fetch)).abatch(list(range(10))))

    assert [message.category for message in messages] == [BridgedWarning]


async def test_a_lambda_is_told_by_its_place():
    """It has no name of its own, and the class's says nothing."""
    messages = await told(Dual(lambda number: number).abatch(list(range(10))))

    text = str(messages[0].message)
    assert ".<lambda> (" in text.partition(" run in threads")[0]
    assert "@dual(async_=pair_async) over " in text


async def test_an_executor_of_ones_own_is_meant():
    """Who gives an executor knows what the async side is made of."""
    with ThreadPoolExecutor(2) as threads:
        pair: Any = Dual(fetch)
        pair._furnish(bridge=threads)

        assert await told(pair.abatch(list(range(10)))) == []


# --- no limit ---


async def test_a_huge_batch_without_a_limit_is_told():
    """10,000 inputs at once: the warning names the pair and both lines to write, and points at the batch."""
    pair = Dual(fetch, fetch_async)
    with pytest.warns(UnboundedWarning) as messages:
        outputs = await pair.abatch(list(range(MANY)))
    line = test_a_huge_batch_without_a_limit_is_told.__code__.co_firstlineno + 4

    assert outputs == list(range(MANY))
    assert (messages[0].filename, messages[0].lineno) == (__file__, line)
    assert "10,000 calls of fetch run at once" in str(messages[0].message)
    assert "@concurrency(limit=50) over test_traps.fetch_async (" in str(messages[0].message)
    assert 'config={"max_concurrency": 50}' in str(messages[0].message)


@pytest.mark.parametrize(
    ("make", "config", "calls"),
    [
        pytest.param(lambda: concurrency(limit=50)(Dual(fetch, fetch_async)), None, 1000, id="a limit"),
        pytest.param(lambda: concurrency(per_second=1e6, burst=1000)(Dual(fetch, fetch_async)), None, 101, id="a rate"),
        pytest.param(lambda: Dual(fetch, fetch_async), {"max_concurrency": 50}, 1000, id="max_concurrency"),
        pytest.param(lambda: Dual(fetch, fetch_async), [{"max_concurrency": 50}] * 101, 101, id="a list of configs"),
        pytest.param(lambda: Dual(fetch, fetch_async), None, 100, id="100 calls"),
    ],
)
async def test_with_a_limit_or_few_calls_nothing_is_told(make, config, calls):
    """The corrected versions say nothing, and 100 calls need none."""
    assert await told(make().abatch(list(range(calls)), config)) == []


async def test_a_stream_of_completed_calls_is_told_as_well():
    """`abatch_as_completed` runs into the same traps as `abatch`."""

    async def consume(pair: Any, calls: int) -> None:
        async for _ in pair.abatch_as_completed(list(range(calls))):
            pass

    unbounded = await told(consume(Dual(fetch, fetch_async), 101))
    bridged = await told(consume(Dual(fetch), 10))

    assert [message.category for message in unbounded + bridged] == [UnboundedWarning, BridgedWarning]


async def stream(way: str, pair: Any, calls: int, **options: Any) -> list[Any]:
    """Return all that a stream yields."""
    if way == "aeach":
        return [output async for output in aeach(pair, range(calls), **options)]
    via: Any = "async" if way == "each via async" else "threads"
    return await asyncio.to_thread(lambda: list(each(pair, range(calls), via=via, **options)))


@pytest.mark.parametrize("window", [1, 64])
@pytest.mark.parametrize("way", ["aeach", "each via async"])
async def test_a_long_stream_over_threads_is_told(way, window):
    """From the tenth call on, at the line of the loop, once for each pair."""
    pair = Dual(fetch)

    assert await told(stream(way, pair, 9, window=window)) == []
    messages = await told(stream(way, pair, 10, window=window))
    assert [(message.category, message.filename) for message in messages] == [(BridgedWarning, __file__)]
    assert "10 async calls of fetch run in threads" in str(messages[0].message)
    assert await told(stream(way, pair, 50)) == []


async def test_a_stream_tells_where_it_is_read():
    """The warning points at the loop, also where the stream was made elsewhere."""
    results = aeach(Dual(fetch), range(10))
    with pytest.warns(BridgedWarning) as messages:
        async for _ in results:
            pass
    line = test_a_stream_tells_where_it_is_read.__code__.co_firstlineno + 4

    assert (messages[0].filename, messages[0].lineno) == (__file__, line)


@pytest.mark.parametrize("way", ["aeach", "each via async"])
async def test_a_stream_of_a_pipe_or_a_binding_tells_for_its_pairs(way):
    """What has been told of a pair with a config is not told of the pair alone."""
    pair = Dual(fetch)
    pipe = (pair | {"a": Dual(fetch), "b": Dual(fetch, fetch_async)}).with_config(tags=["t"])
    messages = await told(stream(way, pipe, 10))

    assert [message.category for message in messages] == [BridgedWarning] * 2
    assert await told(stream(way, pair, 10)) == []


@pytest.mark.parametrize(
    ("way", "make"),
    [
        pytest.param("aeach", lambda: Dual(fetch, fetch_async), id="aeach"),
        pytest.param("each via async", lambda: Dual(fetch, fetch_async), id="each via async"),
        pytest.param("each in threads", lambda: Dual(fetch), id="each in threads"),
        pytest.param("aeach", lambda: dual(warn=False)(fetch), id="silent"),
        pytest.param("aeach", lambda: RunnableLambda(fetch), id="LangChain's"),
    ],
)
async def test_a_stream_in_no_trap_tells_nothing(way, make):
    """Both sides, or threads that were asked for; and a window of any size is a limit."""
    assert await told(stream(way, make(), 300, window=200)) == []


async def test_what_a_checkpoint_has_is_no_call(tmp_path):
    """A stream over many inputs that makes few calls is told of none."""
    file = tmp_path / "run.sqlite"
    await stream("each in threads", Dual(fetch), 95, checkpoint=file)

    assert await told(stream("aeach", Dual(fetch), 100, checkpoint=file)) == []


async def test_a_pipe_tells_for_its_pairs():
    """A batch of a pipe or of a dict of pairs tells each pair's trap, at the caller's line."""
    pipe = Dual(fetch) | {"a": Dual(fetch), "b": Dual(fetch, fetch_async)}
    messages = await told(pipe.abatch(list(range(10))))

    assert [message.category for message in messages] == [BridgedWarning] * 2
    assert {message.filename for message in messages} == {__file__}


async def test_a_pipe_of_langchains_tells_at_the_callers_line():
    """Also where LangChain calls the pair's batch, the warning points past it."""
    pipe = RunnableLambda(fetch, afunc=fetch_async) | Dual(fetch)
    messages = await told(pipe.abatch(list(range(10))))

    assert [(message.category, message.filename) for message in messages] == [(BridgedWarning, __file__)]


async def test_a_fake_is_in_no_trap():
    """A pair that a test has put a fake in place of is told of nothing."""
    pair = dual(fetch, name="faked")
    with registry.override(pair, lambda query: query):
        assert await told(pair.abatch(list(range(10)))) == []


async def test_a_bound_pair_is_told_once_for_all_instances():
    """Of a method the pair of the class is told, not each bound one."""

    class Client:
        @dual
        def fetch(self, query: int) -> int:
            return query

    counts = [len(await told(Client().fetch.abatch(list(range(10))))) for _ in range(2)]

    assert counts == [1, 0]


# --- a sync side on an event loop ---


class Clock:
    """The time that the package sees; it passes only when a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Put a clock of the test's own into the package."""
    clock = Clock()
    monkeypatch.setattr(traps, "perf_counter", clock)
    return clock


def sides(clock: Clock, seconds: float) -> dict[str, Any]:
    """Return pairs, of both sides and bridged, whose sync call takes so long."""

    def slow(query: str) -> str:
        clock.now += seconds
        return query

    async def slow_async(query: str) -> str:
        clock.now += seconds
        return query

    return {"native": Dual(slow), "bridged": Dual(slow_async), "limited": concurrency(limit=1)(Dual(slow))}


@pytest.mark.parametrize("side", ["native", "bridged", "limited"])
@pytest.mark.parametrize("call", ["invoke", "call"])
async def test_a_sync_call_that_held_the_loop_is_told(clock, side, call):
    """`pair.invoke` inside an `async def`, for over 50 ms: told with the line to write, at the caller's line."""
    pair = sides(clock, 0.12)[side]
    with pytest.warns(BlockingWarning) as messages:
        result = getattr(pair, call)("usd")
    line = test_a_sync_call_that_held_the_loop_is_told.__code__.co_firstlineno + 6

    assert result == "usd"
    assert (messages[0].filename, messages[0].lineno) == (__file__, line)
    assert "held the event loop for over 100 ms" in str(messages[0].message)
    assert ".ainvoke(...)" in str(messages[0].message)


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.051, "50"), (0.0999, "50"), (0.1, "100"), (0.2, "200"), (0.6, "500"), (7, "5,000")]
)
async def test_what_is_said_of_a_sync_call_is_one_of_few(clock, seconds, said):
    """Python's default filter goes by the text: with the milliseconds in it a line would be told at each call."""
    with pytest.warns(BlockingWarning, match=f"held the event loop for over {said} ms;"):
        sides(clock, seconds)["native"].invoke("usd")


@pytest.mark.parametrize("side", ["native", "bridged", "limited"])
async def test_a_short_sync_call_on_the_loop_is_not_told(clock, side):
    """Up to 50 ms a sync call on a loop is nobody's business."""
    assert sides(clock, 0.05)[side].invoke("usd") == "usd"


@pytest.mark.parametrize("code", ["pair.invoke('usd')", "(lambda: pair.call('usd'))()", "list(pair.stream('usd'))"])
async def test_a_sync_call_by_the_code_of_a_module_is_not_told(clock, code):
    """A notebook runs its cells on a loop of its own, where nothing else of the program waits."""
    exec(compile(code, "<cell>", "exec"), {"pair": sides(clock, 0.12)["native"], "__name__": "notebook"})  # noqa: S102  (of the test's own code)


@pytest.mark.parametrize("side", ["native", "bridged", "limited"])
def test_a_sync_call_without_a_loop_is_not_told(clock, side):
    """Where there is no loop, none was held."""
    assert sides(clock, 0.12)[side].invoke("usd") == "usd"


@pytest.mark.parametrize("side", ["native", "bridged", "limited"])
async def test_a_sync_call_in_a_thread_is_not_told(clock, side):
    """The corrected version: in a thread a sync call holds no loop."""
    assert await asyncio.to_thread(sides(clock, 0.12)[side].invoke, "usd") == "usd"


async def test_a_sync_call_that_fails_is_told_too(clock):
    """The error passes through, and with it what it has cost the loop."""

    def fail(query: str) -> None:
        clock.now += 0.12
        raise KeyError(query)

    with pytest.warns(BlockingWarning), pytest.raises(KeyError, match="usd"):
        Dual(fail).invoke("usd")


async def test_a_warning_that_is_an_error_hides_no_error_of_the_call(clock):
    """Under `-W error` a call that is slow and fails raises what it has raised."""

    def fail(query: str) -> None:
        clock.now += 0.12
        raise KeyError(query)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError, match="usd"):
            Dual(fail).invoke("usd")


async def test_a_sync_stream_is_told_of_the_chunk_that_held_the_loop(clock):
    """Each chunk is timed for itself, and what its consumer does is not."""

    def letters(query: str) -> Iterator[str]:
        yield query
        clock.now += 0.12
        yield query

    def consume() -> None:
        for _ in Dual(letters).call("usd"):
            clock.now += 1

    with pytest.warns(BlockingWarning) as messages:
        consume()

    assert [str(message.message).partition(" ms")[0][-3:] for message in messages] == ["100"]


@pytest.mark.parametrize("run", [lambda pair: pair.call("usd"), lambda pair: pair.stream("usd")])
async def test_a_warning_that_is_an_error_ends_the_stream_and_frees_its_slot(clock, run):
    """Under `-W error` the generator is closed before the warning reaches its reader, not when it is collected."""
    closed: list[str] = []

    def letters(query: str) -> Iterator[str]:
        try:
            clock.now += 0.12
            yield query
        finally:
            closed.append(query)

    pair = concurrency(limit=1)(Dual(letters))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BlockingWarning):
            next(run(pair))

    assert (closed, pair.limiter.stats().in_flight) == (["usd"], 0)


async def test_a_sync_call_on_a_loop_works_for_a_bridged_stream(clock):
    """An async generator can be streamed by sync code on a loop without a deadlock."""

    async def letters(query: str) -> AsyncIterator[str]:
        for letter in query:
            await asyncio.sleep(0)
            yield letter

    assert list(Dual(letters).call("usd")) == ["u", "s", "d"]


async def test_the_real_clock_sees_a_real_sleep():
    """`time.sleep` for longer than the threshold is told, whatever the machine."""
    with pytest.warns(BlockingWarning, match="held the event loop"):
        Dual(time.sleep).invoke(0.06)


# --- silence ---


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(dual(warn=False), id="@dual"),
        pytest.param(lambda fn: dual(fn, warn=False, name="quiet"), id="dual()"),
        pytest.param(concurrency(limit=5, warn=False), id="@concurrency"),
        pytest.param(lambda fn: concurrency(limit=5)(dual(warn=False)(fn)), id="@concurrency over @dual"),
        pytest.param(lambda fn: dual(concurrency(limit=5, warn=False)(fn)), id="@dual over @concurrency"),
    ],
)
async def test_a_pair_can_be_told_to_be_silent(clock, make):
    """With `warn=False` on either decorator, in either order, no trap is told."""

    def fetch(query: int) -> int:
        clock.now += 0.12
        return query

    pair = make(fetch)

    assert await told(pair.abatch(list(range(10)))) == []
    assert pair.invoke(1) == 1


async def test_a_pair_of_a_limited_function_is_not_silent():
    """Nobody has told either decorator to be."""
    pair = dual(concurrency(limit=5)(fetch), name="limited")

    assert [message.category for message in await told(pair.abatch(list(range(10))))] == [BridgedWarning]


async def test_two_sides_can_be_told_to_be_silent():
    """`warn=False` holds for a pair of two functions as well."""
    pair = dual(sync=fetch, async_=fetch_async, warn=False, name="both")

    assert await told(pair.abatch(list(range(101)))) == []


# --- a sync batch of an async function ---


def test_a_sync_batch_of_an_async_function_runs_at_once():
    """With a limit, a sync batch over an async function has all its calls on the loop at once, and no threads."""
    inside = 0
    most = 0
    all_in = asyncio.Event()
    threads: list[int] = []
    before = threading.active_count()

    @concurrency(limit=200)
    async def fetch(query: int) -> int:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        if inside == 200:
            threads.append(threading.active_count())
            all_in.set()
        await all_in.wait()
        inside -= 1
        return query

    assert fetch.batch(list(range(200))) == list(range(200))
    assert most == 200
    assert threads[0] <= before + 1  # the background loop's


def test_a_sync_batch_of_an_async_function_keeps_to_max_concurrency():
    """`max_concurrency` bounds the calls that a sync batch has on the loop."""
    inside = 0
    most = 0

    async def fetch(query: int) -> int:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0)
        inside -= 1
        return query

    assert Dual(fetch).batch(list(range(50)), {"max_concurrency": 7}) == list(range(50))
    assert most == 7


_NOTEBOOK = """
import asyncio
from asyncify import dual

@dual
def fetch(query):
    return query

outputs = asyncio.run(fetch.abatch(list(range(20))))
"""


@pytest.mark.parametrize("names", [{}, {"__spec__": None}, {"__spec__": None, "__loader__": None}], ids=repr)
def test_a_notebook_is_told_of_a_trap_and_gets_its_outputs(names):
    """Its `__main__` names no loader of a module, which Python 3.12 and later take ill in a warning."""
    cell = {"__name__": "__main__", **names}

    with pytest.warns(BridgedWarning, match="fetch run in threads") as told:
        exec(compile(_NOTEBOOK, "cell.py", "exec"), cell)  # noqa: S102

    assert cell["outputs"] == list(range(20))
    assert [(warning.filename, warning.lineno) for warning in told] == [("cell.py", 9)]
