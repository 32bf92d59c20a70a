"""Pairs of generators: streamed on both paths, closed at once, their slot held for the life of the stream."""

import asyncio
import itertools
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Iterator
from contextlib import aclosing, closing, nullcontext, suppress
from contextvars import ContextVar
from typing import Any, cast

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables import RunnableConfig, RunnableLambda

from asyncify import BridgeError, Dual, concurrency, dual, watch
from tests.waiting import SAFETY_NET, until

desk: ContextVar[str] = ContextVar("desk", default="nobody")


class Feed:
    """A source of chunks that notes how far it was read, and when it was closed."""

    def __init__(self) -> None:
        self.made = 0
        self.closed = threading.Event()

    def ticks(self, count: int) -> Iterator[str]:
        """Yield chunks by name."""
        try:
            for number in range(count):
                self.made += 1
                yield f"{number} "
        finally:
            self.closed.set()

    async def aticks(self, count: int) -> AsyncIterator[str]:
        """Yield chunks by name, letting others run in between."""
        try:
            for number in range(count):
                await asyncio.sleep(0)
                self.made += 1
                yield f"{number} "
        finally:
            await asyncio.sleep(0)
            self.closed.set()


class Watcher(BaseCallbackHandler):
    """A handler, so that somebody watches; it notes how runs ended."""

    run_inline = True

    def __init__(self) -> None:
        self.ended: list[Any] = []
        self.errors: list[BaseException] = []  # as a tracer might, and with them all the frames that they passed

    def on_chain_end(self, outputs: Any, **kwargs: Any) -> None:
        self.ended.append(outputs)

    def on_chain_error(self, error: BaseException, **kwargs: Any) -> None:
        self.ended.append(type(error))
        self.errors.append(error)


class Counting(Watcher):
    """A handler that counts the runs that have not ended."""

    open = 0

    def on_chain_start(self, *_: Any, **__: Any) -> None:
        self.open += 1

    def on_chain_end(self, outputs: Any, **kwargs: Any) -> None:
        self.open -= 1

    def on_chain_error(self, error: BaseException, **kwargs: Any) -> None:
        self.open -= 1


def native(feed: Feed) -> Any:
    """Both sides written."""
    return dual(sync=feed.ticks, async_=feed.aticks)


def from_sync(feed: Feed) -> Any:
    """The async side bridged."""
    return dual(feed.ticks)


def from_async(feed: Feed) -> Any:
    """The sync side bridged."""
    return dual(feed.aticks)


SIDES = [native, from_sync, from_async]
CONFIGS: list[Callable[[], RunnableConfig]] = [dict, lambda: {"callbacks": [Watcher()]}]  # type: ignore[list-item]
each_side = pytest.mark.parametrize("side", SIDES)
watched_or_not = pytest.mark.parametrize("config", CONFIGS, ids=["unobserved", "observed"])
Side = Callable[[Feed], Any]
MakeConfig = Callable[[], RunnableConfig]

CHUNKS = ["0 ", "1 ", "2 "]

SAME: Dual[Any, Any] = Dual(lambda value: value)
"""A step that changes nothing."""


@each_side
@watched_or_not
def test_a_pair_streams(side: Side, config: MakeConfig) -> None:
    """`stream`, `transform`, `call` and a direct call give the chunks one by one."""
    pair = side(Feed())

    assert list(pair.stream(3, config())) == CHUNKS
    assert list(pair.transform(iter([1, 2]), config())) == CHUNKS
    assert list(pair.call(3)) == CHUNKS


@each_side
@watched_or_not
async def test_a_pair_streams_async(side: Side, config: MakeConfig) -> None:
    """The async twin."""
    pair = side(Feed())

    async def halves() -> AsyncIterator[int]:
        yield 1
        yield 2

    assert [chunk async for chunk in pair.astream(3, config())] == CHUNKS
    assert [chunk async for chunk in pair.atransform(halves(), config())] == CHUNKS
    assert [chunk async for chunk in pair.acall(3)] == CHUNKS


@each_side
@watched_or_not
async def test_chunks_fold(side: Side, config: MakeConfig) -> None:
    """`invoke` and `ainvoke` add the chunks up with `+`."""
    pair = side(Feed())

    assert await asyncio.to_thread(pair.invoke, 3, config()) == "0 1 2 "
    assert await pair.ainvoke(3, config()) == "0 1 2 "


@each_side
@watched_or_not
def test_closing_early_closes_the_generator(side: Side, config: MakeConfig) -> None:
    """A stream that is closed has closed the user's generator when `close` returns."""
    feed, given = Feed(), config()
    stream = side(feed).stream(100, given)
    first = next(stream)
    stream.close()

    assert first == "0 "
    assert feed.closed.is_set()


@each_side
@watched_or_not
async def test_closing_early_closes_the_generator_async(side: Side, config: MakeConfig) -> None:
    """The async twin."""
    feed, given = Feed(), config()
    stream = side(feed).astream(100, given)
    first = await anext(stream)
    await stream.aclose()

    assert first == "0 "
    assert feed.closed.is_set()


def behind_another(pair: Any) -> Any:
    """A pipe that ends with the pair."""
    return SAME | pair


def before_another(pair: Any) -> Any:
    """A pipe that goes on after the pair, one chunk at a time."""

    @dual
    async def each_of(chunks: str) -> AsyncIterator[str]:
        for chunk in chunks.split():
            yield f"{chunk} "

    return pair | each_of


def beside_another(pair: Any) -> Any:
    """A dict whose one branch is the pair, and whose other one never ends."""

    @dual
    async def stuck(value: Any) -> AsyncIterator[str]:
        await asyncio.Event().wait()
        yield "never"

    return SAME | {"pair": pair, "stuck": stuck}


def returned_by_another(pair: Any) -> Any:
    """A pair that returns it."""
    return Dual(lambda value: pair)


@each_side
@watched_or_not
@pytest.mark.parametrize("compose", [behind_another, beside_another, returned_by_another])
async def test_closing_a_composition_early_closes_the_generator(
    compose: Callable[[Any], Any], side: Side, config: MakeConfig
) -> None:
    """When `aclose` returns, the generators of all steps and branches are closed, and no task is left."""
    feed, given = Feed(), config()
    before = asyncio.all_tasks()
    stream = compose(side(feed)).astream(100, given)
    first = await anext(stream)
    await stream.aclose()

    assert first in ("0 ", {"pair": "0 "})
    assert feed.closed.is_set()
    assert asyncio.all_tasks() == before


@watched_or_not
async def test_leaving_while_a_step_is_still_read_closes_it(config: MakeConfig) -> None:
    """A step that is cancelled in the middle of reading the one in front of it closes that."""
    feed = Feed()

    async def read() -> None:
        async for _ in before_another(native(feed)).astream(10**9, config()):
            pass

    reading = asyncio.create_task(read())
    while feed.made < 3:  # noqa: ASYNC110  (there is no event for that)
        await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading

    assert feed.closed.is_set()


@watched_or_not
async def test_an_error_in_one_branch_ends_the_others(config: MakeConfig) -> None:
    """The error itself arrives; the generators of the other branches are closed, and no task is left."""

    @dual
    async def broken(count: int) -> AsyncIterator[str]:
        yield "first"
        raise ValueError(count)

    feed, before = Feed(), asyncio.all_tasks()
    both = SAME | {"feed": native(feed), "broken": broken}
    chunks = []
    with pytest.raises(ValueError, match="3000"):  # noqa: PT012  (what came before the error is wanted)
        async for chunk in both.astream(3000, config()):
            chunks.append(chunk)  # noqa: PERF401

    assert {"broken": "first"} in chunks
    assert feed.made < 3000
    assert feed.closed.is_set()
    assert asyncio.all_tasks() == before


@watched_or_not
def test_an_error_in_one_branch_closes_the_others(config: MakeConfig) -> None:
    """On the sync path too, whoever holds the error; a slot is free again at once."""

    def ticks(count: int) -> Iterator[str]:
        yield from map(str, range(count))

    def broken(count: int) -> Iterator[str]:
        yield "first"
        raise ValueError(count)

    feed: Any = concurrency(limit=1)(Dual(ticks))
    both = SAME | {"feed": feed, "broken": Dual(broken)}
    chunks = []
    with pytest.raises(ValueError, match="3000") as caught:  # noqa: PT012  (what came before the error is wanted)
        for chunk in both.stream(3000, config()):
            chunks.append(chunk)  # noqa: PERF402

    assert {"broken": "first"} in chunks
    assert caught.value.__traceback__ is not None
    assert feed.limiter.stats().in_flight == 0


@watched_or_not
def test_closing_a_dict_early_closes_the_generators(config: MakeConfig) -> None:
    """The sync twin of a dict that is left; with one thread the other branch has not begun."""
    given: dict[str, Any]
    for given in ({}, {"max_concurrency": 1}):
        feed, other = Feed(), Feed()
        both: Any = SAME | {"pair": native(feed), "other": native(other)}
        stream = both.stream(100, {**config(), **given})
        next(stream)
        stream.close()

        assert feed.closed.is_set() or not feed.made
        assert other.closed.is_set() or not other.made


@watched_or_not
def test_closing_a_dict_waits_for_the_chunk_that_a_branch_is_making(config: MakeConfig) -> None:
    """A thread can't be stopped; the branch is closed after its chunk."""
    making, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def quick(value: int) -> Iterator[int]:
        yield from itertools.count(value)

    def slow(value: int) -> Iterator[int]:
        try:
            making.set()
            assert go_on.wait(SAFETY_NET)
            yield value
        finally:
            ended.set()

    limited: Any = concurrency(limit=1)(Dual(slow))
    stream: Any = (SAME | {"quick": Dual(quick), "slow": limited}).stream(1, config())
    next(stream)
    assert making.wait(SAFETY_NET)
    threading.Timer(0.1, go_on.set).start()
    stream.close()

    assert ended.is_set()
    assert limited.limiter.stats().in_flight == 0


@watched_or_not
async def test_a_branch_that_outlives_its_cancellation_does_not_hold_the_others_up(config: MakeConfig) -> None:
    """The error of another branch arrives, and so does a cancellation of the reader."""

    @dual
    async def stubborn(value: Any) -> AsyncIterator[str]:
        try:
            yield "first"
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            yield "cancelled"

    @dual
    async def broken(value: Any) -> AsyncIterator[str]:
        await asyncio.sleep(0.01)
        yield "first"
        raise ValueError(value)

    before = asyncio.all_tasks()
    with pytest.raises(ValueError, match="mine"):  # noqa: PT012  (the timeout is around the loop)
        async with asyncio.timeout(SAFETY_NET):
            async for _ in (SAME | {"stubborn": stubborn, "broken": broken}).astream("mine", config()):
                pass
    with pytest.raises(TimeoutError):  # noqa: PT012  (the timeout is around the loop)
        async with asyncio.timeout(0.05):
            async for _ in (SAME | {"stubborn": stubborn}).astream("mine", config()):
                pass

    assert asyncio.all_tasks() == before


@watched_or_not
async def test_the_stage_in_front_of_a_dict_stays_in_one_task(config: MakeConfig) -> None:
    """However many branches read it: so a timeout in it fires, and each branch gets all of it."""

    @dual
    async def hasty(query: str) -> AsyncIterator[str]:
        try:
            async with asyncio.timeout(0.05):
                yield f"{asyncio.current_task() is reader} "
                await asyncio.Event().wait()
        except TimeoutError:
            yield "late"

    reader = asyncio.current_task()
    async with asyncio.timeout(SAFETY_NET):
        chunks = [chunk async for chunk in (hasty | {"one": SAME, "two": SAME}).astream("EUR", config())]

    assert sorted(map(str, chunks)) == ["{'one': 'True late'}", "{'two': 'True late'}"]


class Chunk:
    """One that can be seen to be let go."""


@watched_or_not
async def test_a_dict_keeps_no_chunk_that_all_branches_have_had(config: MakeConfig) -> None:
    """Only the last few chunks of the stage in front of it are in memory."""
    made: list[weakref.ref[Chunk]] = []
    alive: list[int] = []

    @dual
    async def feed(query: str) -> AsyncIterator[Chunk]:
        for _ in range(50):
            chunk = Chunk()
            made.append(weakref.ref(chunk))
            alive.append(sum(ref() is not None for ref in made))
            yield chunk

    stream = (feed | {"one": SAME, "two": SAME}).astream("EUR", config())

    assert len([chunk async for chunk in stream]) == 2
    assert max(alive) < 10


def chunks_of(chunk: Chunk) -> Iterator[Chunk]:
    """Yield one, and fail."""
    yield chunk
    raise ValueError


async def achunks_of(chunk: Chunk) -> AsyncIterator[Chunk]:
    """Yield one, and fail."""
    yield chunk
    raise ValueError


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("read", [1, None], ids=["left early", "failed"])
def test_a_dict_whose_stream_is_over_lets_its_input_go(read: int | None) -> None:
    """Neither the error nor the closing leaves it to a garbage collection."""
    gone = threading.Event()
    both = SAME | {"one": Dual(chunks_of, achunks_of), "two": Dual(chunks_of, achunks_of)}
    chunk = Chunk()
    weakref.finalize(chunk, gone.set)
    with suppress(ValueError), closing(cast("Generator[Any]", both.stream(chunk))) as stream:
        list(itertools.islice(stream, read))
    del chunk, stream

    assert gone.wait(SAFETY_NET)  # a thread may still be on its way out


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("read", [1, None], ids=["left early", "failed"])
async def test_an_async_dict_whose_stream_is_over_lets_its_input_go(read: int | None) -> None:
    """Neither the error nor the closing leaves it to a garbage collection."""
    both = SAME | {"one": Dual(chunks_of, achunks_of), "two": Dual(chunks_of, achunks_of)}
    chunk = Chunk()
    gone = weakref.ref(chunk)
    with suppress(ValueError):
        async with aclosing(cast("AsyncGenerator[Any]", both.astream(chunk))) as stream:
            await anext(stream)
            if read is None:
                _ = [chunk async for chunk in stream]
    del chunk, stream

    await until(lambda: gone() is None)  # a thread may still be on its way out


@watched_or_not
async def test_an_error_of_the_stage_in_front_reaches_each_branch(config: MakeConfig) -> None:
    """The branches end with it, and it is raised as itself."""

    @dual
    async def broken(query: str) -> AsyncIterator[str]:
        yield query
        raise ValueError(query)

    given = config()
    with pytest.raises(ValueError, match="EUR"):
        _ = [chunk async for chunk in (broken | {"one": SAME, "two": SAME}).astream("EUR", given)]
    ended = [watcher.ended for watcher in cast("list[Watcher]", given.get("callbacks") or [])]
    assert ended in ([], [[ValueError] * 5])  # the stage, both branches, the dict, the pipe


@watched_or_not
@pytest.mark.parametrize("limited", [False, True], ids=["unlimited", "limited"])
async def test_a_timeout_over_a_yield_fires_in_a_branch_whose_reader_is_slow(
    config: MakeConfig, *, limited: bool
) -> None:
    """The branch's task is cancelled while the generator stands at its yield: it hears of it there."""

    @dual
    async def hasty(query: str) -> AsyncIterator[str]:
        try:
            async with asyncio.timeout(0.01):
                yield query
                yield "too much"
        except TimeoutError:
            yield "late"

    pair: Any = concurrency(limit=1)(hasty) if limited else hasty
    for branch in (pair, SAME | pair, Dual(lambda query: pair)):
        chunks = []
        async for chunk in (SAME | {"a": branch}).astream("EUR", config()):
            chunks.append(chunk["a"])
            await asyncio.sleep(0.1)

        assert chunks == ["EUR", "late"]


@watched_or_not
async def test_a_task_group_over_a_yield_raises_its_childs_error_in_a_branch(config: MakeConfig) -> None:
    """The error that ends a group is what ends the branch, and not the cancellation that comes before it."""

    async def fail() -> None:
        await asyncio.sleep(0.01)
        raise ValueError("child")

    @dual
    async def grouped(query: str) -> AsyncIterator[str]:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            yield query
            yield "too much"

    with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012  (the reader is slow)
        async for _ in (SAME | {"a": grouped}).astream("EUR", config()):
            await asyncio.sleep(0.1)
    assert caught.group_contains(ValueError, match="child")


@pytest.mark.parametrize("compose", [lambda pair: pair, behind_another, lambda pair: SAME | {"pair": pair}])
async def test_a_generator_that_fails_as_it_is_closed_is_told_of(compose: Callable[[Any], Any]) -> None:
    """The error of its clean-up is raised where it is closed, and who watches sees the end of every run."""

    class Untidy(Feed):
        def ticks(self, count: int) -> Iterator[str]:
            try:
                yield "first"
            finally:
                raise ValueError(count)

        async def aticks(self, count: int) -> AsyncIterator[str]:
            try:
                yield "first"
            finally:
                raise ValueError(count)

    runnable, sync, async_ = compose(native(Untidy())), Counting(), Counting()
    stream, astream = runnable.stream(3, {"callbacks": [sync]}), runnable.astream(3, {"callbacks": [async_]})
    next(stream)
    await anext(astream)
    with pytest.raises(ValueError, match="3"):
        stream.close()
    with pytest.raises(ValueError, match="3"):
        await astream.aclose()

    assert (sync.open, async_.open) == (0, 0)


@watched_or_not
async def test_a_branch_is_read_no_further_than_the_dict_is_read(config: MakeConfig) -> None:
    """Back-pressure: each branch is at most one chunk ahead of the reader."""
    one, two = Feed(), Feed()
    both = SAME | {"one": native(one), "two": native(two)}
    async with aclosing(cast("AsyncGenerator[Any]", both.astream(100, config()))) as stream:
        for number in range(1, 10):
            await anext(stream)
            await asyncio.sleep(0.01)
            assert one.made + two.made <= number + 2


@watched_or_not
async def test_a_lambda_leaves_open_what_a_pair_closes(config: MakeConfig) -> None:
    """When `aclose` of a lambda's stream returns, its generator waits for the garbage collector."""
    ours, theirs = Feed(), Feed()
    for stream in (Dual(ours.aticks).astream(100, config()), RunnableLambda(theirs.aticks).astream(100, config())):
        async with aclosing(cast("AsyncGenerator[str]", stream)) as chunks:
            await anext(chunks)

    assert ours.closed.is_set()
    assert not theirs.closed.is_set()


@watched_or_not
async def test_a_lambda_refuses_to_stream_a_sync_generator_async(config: MakeConfig) -> None:
    """A pair streams it from a thread, where a lambda raises TypeError."""
    feed = Feed()

    assert [chunk async for chunk in Dual(feed.ticks).astream(3, config())] == CHUNKS
    with pytest.raises(TypeError, match="Cannot stream from a generator function asynchronously"):
        _ = [chunk async for chunk in RunnableLambda(feed.ticks).astream(3, config())]


@each_side
@watched_or_not
def test_a_slot_is_held_for_the_life_of_the_stream(side: Side, config: MakeConfig) -> None:
    """From the first chunk to the end, or to an early close."""
    pair = concurrency(limit=2)(side(Feed()))
    stream, other = pair.stream(3, config()), pair.stream(3, config())
    seen = [pair.limiter.stats().in_flight]
    next(stream)
    next(other)
    seen.append(pair.limiter.stats().in_flight)
    list(stream)
    seen.append(pair.limiter.stats().in_flight)
    other.close()

    assert [*seen, pair.limiter.stats().in_flight] == [0, 2, 1, 0]


@each_side
@watched_or_not
async def test_a_slot_is_held_for_the_life_of_the_stream_async(side: Side, config: MakeConfig) -> None:
    """The async twin."""
    pair = concurrency(limit=2)(side(Feed()))
    stream, other = pair.astream(3, config()), pair.astream(3, config())
    seen = [pair.limiter.stats().in_flight]
    await anext(stream)
    await anext(other)
    seen.append(pair.limiter.stats().in_flight)
    assert [chunk async for chunk in stream] == CHUNKS[1:]
    seen.append(pair.limiter.stats().in_flight)
    await other.aclose()

    assert [*seen, pair.limiter.stats().in_flight] == [0, 2, 1, 0]


@each_side
async def test_a_bridged_stream_reads_no_further_than_it_is_read(side: Side) -> None:
    """Back-pressure: the generator is at most one chunk ahead of its reader, on both paths."""
    feed = Feed()
    async with aclosing(side(feed).astream(100)) as stream:
        for number in range(1, 4):
            await anext(stream)
            await asyncio.sleep(0.01)
            assert feed.made <= number + 1
    feed.made = 0
    with closing(side(feed).stream(100)) as stream:
        for number in range(1, 4):
            next(stream)
            assert feed.made <= number + 1


@watched_or_not
async def test_a_timeout_around_a_stream_fires(config: MakeConfig) -> None:
    """`asyncio.timeout` around `astream` ends a generator that waits for ever, and closes it."""
    closed = asyncio.Event()

    @dual
    async def stuck(query: str) -> AsyncIterator[str]:
        try:
            yield query
            await asyncio.Event().wait()
        finally:
            closed.set()

    chunks = []
    with pytest.raises(TimeoutError):  # noqa: PT012  (the timeout is around the loop)
        async with asyncio.timeout(0.05):
            async for chunk in stuck.astream("EUR", config()):
                chunks.append(chunk)  # noqa: PERF401  (what came before the timeout is wanted)

    assert chunks == ["EUR"]
    assert closed.is_set()


@watched_or_not
async def test_a_timeout_inside_a_generator_fires(config: MakeConfig) -> None:
    """A timeout that a generator holds over its yields belongs to the task that reads it."""

    @dual
    async def hasty(query: str) -> AsyncIterator[str]:
        try:
            async with asyncio.timeout(0.05):
                yield query
                await asyncio.Event().wait()
        except TimeoutError:
            yield "late"

    assert [chunk async for chunk in hasty.astream("EUR", config())] == ["EUR", "late"]
    assert [chunk async for chunk in behind_another(hasty).astream("EUR", config())] == ["EUR", "late"]
    assert [chunk async for chunk in ({"hasty": hasty} | hasty).astream("EUR", config())] == [
        {"hasty": "EURlate"},
        "late",
    ]


@watched_or_not
async def test_a_task_group_inside_a_generator_works(config: MakeConfig) -> None:
    """A task group is entered and left in one task."""

    @dual
    async def grouped(query: str) -> AsyncIterator[str]:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(asyncio.sleep(0, query))
            yield "first"
            yield await task

    assert [chunk async for chunk in grouped.astream("EUR", config())] == ["first", "EUR"]
    assert [chunk async for chunk in behind_another(grouped).astream("EUR", config())] == ["first", "EUR"]


@watched_or_not
async def test_a_stream_runs_in_the_task_that_reads_it(config: MakeConfig) -> None:
    """No task is made for a chunk, where a lambda makes one for each, in which a timeout or a task group is lost."""

    @dual
    async def tasks(query: str) -> AsyncIterator[Any]:
        yield asyncio.current_task()
        await asyncio.sleep(0)
        yield asyncio.current_task()

    assert [chunk async for chunk in tasks.astream("EUR", config())] == [asyncio.current_task()] * 2
    assert [chunk async for chunk in behind_another(tasks).astream("EUR", config())] == [asyncio.current_task()] * 2
    theirs = [chunk async for chunk in RunnableLambda(tasks.afunc).astream("EUR", config())]
    assert asyncio.current_task() not in theirs


async def test_a_step_of_a_stream_does_not_see_the_config_of_the_next() -> None:
    """The second step asks for the first one's chunks, but not from inside its own run."""
    seen: list[tuple[str, Any]] = []

    @dual
    def first(value: int, config: RunnableConfig) -> int:
        seen.append(("first", config.get("max_concurrency")))
        return value

    @dual
    def second(value: int, config: RunnableConfig) -> int:
        seen.append(("second", config.get("max_concurrency")))
        return value

    pipe = first | second.with_config(max_concurrency=3)

    assert list(pipe.stream(1)) == [1]
    assert [chunk async for chunk in pipe.astream(1)] == [1]
    assert seen == [("first", None), ("second", 3)] * 2


@watched_or_not
async def test_what_a_stream_writes_to_a_context_stays_there(config: MakeConfig) -> None:
    """A context variable lives from chunk to chunk, and does not leak to the reader."""

    @dual
    async def aticks(query: str) -> AsyncIterator[str]:
        desk.set("async")
        yield desk.get()
        yield desk.get()

    @aticks.sync
    def ticks(query: str) -> Iterator[str]:
        desk.set("sync")
        yield desk.get()
        yield desk.get()

    assert list(ticks.stream("EUR", config())) == ["sync", "sync"]
    assert [chunk async for chunk in ticks.astream("EUR", config())] == ["async", "async"]
    assert desk.get() == "nobody"


@each_side
async def test_an_error_in_the_middle_arrives(side: Side) -> None:
    """The chunks before it arrive, then the error itself."""

    class Broken(Feed):
        def ticks(self, count: int) -> Iterator[str]:
            yield "first"
            raise ValueError(count)

        async def aticks(self, count: int) -> AsyncIterator[str]:
            yield "first"
            raise ValueError(count)

    pair = side(Broken())
    stream, astream = pair.stream(3), pair.astream(3)

    assert [next(stream), await anext(astream)] == ["first", "first"]
    with pytest.raises(ValueError, match="3"):
        next(stream)
    with pytest.raises(ValueError, match="3"):
        await anext(astream)


async def _reported(runnable: Any, *, early: bool) -> tuple[list[Any], list[Any]]:
    """Return what a watcher is told of the end of a stream, on either path; an early one is closed at once."""
    sync, async_ = Watcher(), Watcher()
    with closing(runnable.stream(2, {"callbacks": [sync]})) as stream:
        list(itertools.islice(stream, 1 if early else None))
    async with aclosing(runnable.astream(2, {"callbacks": [async_]})) as stream:
        async for _ in stream:
            if early:
                break
    return sync.ended, async_.ended


async def test_an_early_close_is_reported_alike_on_both_paths() -> None:
    """Who watches sees the end of a whole stream, and the `GeneratorExit` of one that was closed; a lambda's differ."""
    feed = Feed()
    pair, theirs = native(feed), RunnableLambda(feed.ticks, cast("Any", feed.aticks))

    assert await _reported(pair, early=False) == (["0 1 "], ["0 1 "])
    assert await _reported(pair, early=True) == ([GeneratorExit], [GeneratorExit])
    sync, async_ = await _reported(theirs, early=True)
    assert sync != async_


async def test_events_show_the_chunks() -> None:
    """`astream_events` shows each chunk of a pair, alone and in a pipe."""
    pair = native(Feed())
    pipe = RunnableLambda(int) | pair

    for runnable, value in ((pair, 3), (pipe, "3")):
        events = [event async for event in runnable.astream_events(value, version="v2")]
        own = [event for event in events if event["name"] == "ticks"]

        assert [event["data"]["chunk"] for event in own if event["event"] == "on_chain_stream"] == CHUNKS
        assert [event["event"] for event in own][:: len(own) - 1] == ["on_chain_start", "on_chain_end"]


async def test_a_pair_streams_through_a_pipe() -> None:
    """A pipe that begins or ends with a pair hands its chunks on one by one."""
    pair = native(Feed())

    assert list((RunnableLambda(int) | pair).stream("3")) == CHUNKS
    assert [chunk async for chunk in (RunnableLambda(int) | pair).astream("3")] == CHUNKS
    assert await (pair | RunnableLambda(str.strip)).ainvoke(3) == "0 1 2"


@watched_or_not
async def test_a_function_that_does_not_yield_streams_one_chunk(config: MakeConfig) -> None:
    """`stream` of an ordinary pair gives its result; a runnable that it returns is streamed."""
    pair: Any = dual(lambda query: str(query), name="plain")  # noqa: PLW0108  (a lambda has one parameter)
    returns: Any = dual(lambda query: native(Feed()), name="returns_a_runnable")

    assert list(pair.stream("EUR", config())) == ["EUR"]
    assert [chunk async for chunk in pair.astream("EUR", config())] == ["EUR"]
    assert list(returns.stream(3, config())) == CHUNKS
    assert [chunk async for chunk in returns.astream(3, config())] == CHUNKS


@watched_or_not
async def test_a_stream_gets_the_config(config: MakeConfig) -> None:
    """A generator that names `config` is given the child config, on both paths."""

    @dual
    def tags(query: str, config: RunnableConfig) -> Iterator[list[str]]:
        yield config["tags"]

    @tags.async_
    async def atags(query: str, config: RunnableConfig) -> AsyncIterator[list[str]]:
        yield config["tags"]

    runnable: Any = tags
    given: RunnableConfig = {**config(), "tags": ["desk"]}

    assert list(runnable.stream("EUR", given)) == [["desk"]]
    assert [chunk async for chunk in runnable.astream("EUR", given)] == [["desk"]]


async def test_a_stream_that_is_dropped_is_closed() -> None:
    """A reader that breaks off without closing leaves no generator open and no slot taken."""
    feed = Feed()
    pair = concurrency(limit=1)(native(feed))
    async for _ in pair.astream(100):
        break
    for _ in range(100):
        if feed.closed.is_set():
            break
        await asyncio.sleep(0.01)

    assert feed.closed.is_set()
    assert pair.limiter.stats().in_flight == 0


def _twice(x: Any) -> Any:
    return [x, x]


async def _atwice(x: Any) -> Any:
    return [x, x]


@watched_or_not
async def test_a_stream_of_nothing_is_none(config: MakeConfig) -> None:
    """A step behind a generator that yields nothing gets None, as on `invoke`; a lambda raises UnboundLocalError."""
    pair: Any = Dual(_twice, _atwice)
    nothing: Any = native(Feed())
    theirs: Any = RunnableLambda(_twice, _atwice)

    assert (nothing | pair).invoke(0, config()) == [None, None]
    assert list((nothing | pair).stream(0, config())) == [[None, None]]
    assert [chunk async for chunk in (nothing | pair).astream(0, config())] == [[None, None]]
    with pytest.raises(UnboundLocalError):
        list(theirs.transform(iter([]), config()))


class Tagged(BaseCallbackHandler):
    """A handler that notes how the runs are tagged."""

    run_inline = True

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def on_chain_start(self, *_: Any, tags: list[str] | None = None, **__: Any) -> None:
        self.seen.append(tags or [])


def tagged(make: Any) -> tuple[list[list[str]], list[list[str]]]:
    """Return the tags of the runs of a pipe with a dict, streamed on both paths."""
    sync, async_ = Tagged(), Tagged()
    pipe = make(lambda value: value) | {"a": make(lambda value: value), "b": make(lambda value: value)}

    async def read() -> None:
        async for _ in pipe.astream(1, {"callbacks": [async_]}):
            pass

    list(pipe.stream(1, {"callbacks": [sync]}))
    asyncio.run(read())
    return sorted(sync.seen), sorted(async_.seen)


def test_the_steps_of_a_stream_are_tagged_as_those_of_lambdas() -> None:
    """Steps by their number, branches by their key."""
    assert tagged(Dual) == tagged(RunnableLambda)
    assert ["map:key:a"] in tagged(Dual)[0]


async def test_keyword_arguments_of_a_dicts_streams_are_as_those_of_langchains() -> None:
    """`stream` drops them, `transform` has no place for them."""
    for made in (Dual, RunnableLambda):
        make: Any = made
        both: Any = make(lambda value: value) | {"a": make(lambda value: value)}
        only: Any = both.steps[1]
        assert list(only.stream(1, extra=1)) == [{"a": 1}]
        assert [chunk async for chunk in only.astream(1, extra=1)] == [{"a": 1}]
        with pytest.raises(TypeError, match="extra"):
            list(only.transform(iter([1]), extra=1))
        with pytest.raises((TypeError, UnboundLocalError)):  # LangChain means the one and raises the other
            _ = [chunk async for chunk in only.atransform(_Countdown(1), extra=1)]


@each_side
async def test_a_keyword_argument_of_langchains_own_goes_its_way(side: Side) -> None:
    """On both paths, whichever side is written, alone and in a pipe."""
    for runnable in (side(Feed()), SAME | side(Feed())):
        assert list(runnable.stream(3, run_type="tool")) == CHUNKS
        assert [chunk async for chunk in runnable.astream(3, run_type="tool")] == CHUNKS


@watched_or_not
@pytest.mark.parametrize("end", ["closed", "cancelled"])
async def test_a_generator_is_ended_in_the_context_that_it_ran_in(end: str, config: MakeConfig) -> None:
    """What it has written to a context variable is there as it cleans up."""
    seen: list[str] = []

    @dual
    async def aticks(query: str) -> AsyncIterator[str]:
        desk.set(query)
        try:
            yield desk.get()
            await asyncio.Event().wait()
        finally:
            seen.append(desk.get())

    stream = aticks.astream("EUR", config())
    await anext(stream)
    if end == "cancelled":
        more = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        more.cancel()
        with pytest.raises(asyncio.CancelledError):
            await more
    await stream.aclose()

    assert (seen, desk.get()) == (["EUR"], "nobody")


class _Countdown:
    """An async iterator that is no generator, and can't be closed."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __aiter__(self) -> "_Countdown":
        return self

    async def __anext__(self) -> int:
        self.count -= 1
        if self.count < 0:
            raise StopAsyncIteration
        return self.count


class _CountsDown(Dual[Any, Any]):
    """A pair whose stream is such an iterator."""

    def atransform(self, input: AsyncIterator[Any], config: Any = None, **kwargs: Any) -> AsyncIterator[Any]:
        return _Countdown(3)


async def test_a_stream_that_can_not_be_closed_is_read_as_well() -> None:
    """In a pipe, in a dict and from a pair; leaving it early is no error."""
    pair = _CountsDown(lambda value: value)
    for composed in (SAME | pair, Dual(lambda value: pair)):
        assert [chunk async for chunk in composed.astream(1)] == [2, 1, 0]
    both = SAME | {"a": pair}
    async with aclosing(cast("AsyncGenerator[Any]", both.astream(1))) as stream:
        assert await anext(stream) == {"a": 2}


def run_and_close_generators(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine as `asyncio.run` does, but leave the tasks alone that it leaves behind."""
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(work)
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


@watched_or_not
@pytest.mark.parametrize("run", [asyncio.run, run_and_close_generators])
@pytest.mark.parametrize("compose", [lambda pair: pair, behind_another, beside_another, returned_by_another])
def test_a_stream_that_outlives_its_loop_is_closed_without_a_word(
    compose: Callable[[Any], Any],
    run: Callable[[Coroutine[Any, Any, None]], object],
    config: MakeConfig,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A loop that ends closes all async generators that it knows, at once: those within a stream it does not know."""
    feed, kept = Feed(), list[Any]()

    async def leave() -> None:
        stream = compose(native(feed)).astream(100, config())
        await anext(stream)
        kept.append(stream)

    run(leave())

    assert feed.closed.is_set()
    assert caplog.records == []


async def test_a_stream_that_nobody_watches_is_not_added_up() -> None:
    """An endless one has no end that its sum could be told of, and would be kept whole."""
    added: list[Any] = []

    class Chunk:
        """What notes that it is added to."""

        def __add__(self, other: Any) -> Any:
            added.append(other)
            return self

    def ticks(value: Any) -> Iterator[Chunk]:
        yield from (Chunk(), Chunk(), Chunk())

    for runnable in (Dual(ticks), SAME | Dual(ticks)):
        assert len(list(runnable.stream(1))) == len([chunk async for chunk in runnable.astream(1)]) == 3
    assert added == []
    list((SAME | Dual(ticks)).stream(1, {"callbacks": [Watcher()]}))
    assert len(added) == 4  # for the pair and for the pipe

    added.clear()
    list((SAME | SAME).transform(iter([Chunk(), Chunk(), Chunk()])))
    assert len(added) == 2  # for the input of the first pair, which is one value
    _ = [chunk async for chunk in (SAME | SAME).atransform(Dual(ticks).astream(1))]
    assert len(added) == 4


def conversation(start: str) -> Generator[str, str, str]:
    """Yield what was said last, and return it in the end."""
    said = start
    for _ in range(2):
        said = yield said
    return f"end {said}"


async def aconversation(start: str) -> AsyncGenerator[str, str]:
    """Yield what was said last."""
    said = start
    while said != "end":
        said = yield said


ALL_KINDS: dict[str, Callable[[Any], Any]] = {
    "dual": dual,
    "no warnings": dual(warn=False),
    "limited": concurrency(limit=1),
    "drop-in": Dual,
}


@pytest.mark.parametrize("make", ALL_KINDS.values(), ids=ALL_KINDS)
async def test_a_direct_call_gives_the_generator_that_it_was(make: Callable[[Any], Any]) -> None:
    """What is sent in reaches the function, and what it returns comes out, on an event loop too."""
    chunks = make(conversation)("one")
    heard = [next(chunks), chunks.send("two")]
    with pytest.raises(StopIteration) as end:
        chunks.send("three")

    assert (heard, end.value.value) == (["one", "two"], "end three")


def attentive(start: str) -> Generator[str]:
    """Yield what was thrown in last."""
    said = start
    while True:
        try:
            yield said
        except ValueError as error:
            said = str(error)


@pytest.mark.parametrize("make", ALL_KINDS.values(), ids=ALL_KINDS)
async def test_what_is_thrown_into_a_direct_call_reaches_its_generator(make: Callable[[Any], Any]) -> None:
    """An error that the function does not catch comes out again; on an event loop too."""
    chunks = make(attentive)("one")
    heard = [next(chunks), chunks.throw(ValueError("two"))]
    with pytest.raises(KeyError):
        chunks.throw(KeyError("three"))

    assert (heard, list(chunks)) == (["one", "two"], [])


@pytest.mark.parametrize("make", ALL_KINDS.values(), ids=ALL_KINDS)
@pytest.mark.parametrize("watched", [False, True])
async def test_a_direct_call_gives_the_async_generator_that_it_was(
    make: Callable[[Any], Any], *, watched: bool
) -> None:
    """What is sent in reaches the function, also under a watch."""
    with watch() if watched else nullcontext():
        chunks = make(aconversation)("one")
        heard = [await anext(chunks), await chunks.asend("two"), await chunks.asend("three")]
        with pytest.raises(StopAsyncIteration):
            await chunks.asend("end")

    assert heard == ["one", "two", "three"]


@pytest.mark.parametrize("leave", ["close", "clear"])
def test_a_dict_that_is_left_from_within_one_of_its_branches_does_not_wait_for_itself(leave: str) -> None:
    """By a stop button, or by a garbage collector, which runs anywhere: that branch is closed after its chunk."""
    held: list[Any] = []
    is_read, ended = threading.Event(), threading.Event()

    def count(value: int) -> Iterator[int]:
        yield from itertools.count(value)

    def leave_it(value: int) -> Iterator[int]:
        try:
            yield 3
            assert is_read.wait(SAFETY_NET)
            if leave == "close" and held:
                held[0].close()
            held.clear()
            yield 4
        finally:
            ended.set()

    leaving = concurrency(limit=1)(Dual(leave_it, name="leaving"))
    held.append((Dual(lambda value: value) | {"a": Dual(count), "b": leaving}).stream(1))
    while "b" not in next(held[0]):
        pass
    assert "a" in next(held[0])  # so the other branch has been asked for its second chunk
    is_read.set()

    assert ended.wait(SAFETY_NET)
    following = threading.Thread(target=leaving.invoke, args=(1,), daemon=True)
    following.start()
    following.join(SAFETY_NET)
    assert not following.is_alive()  # its slot is free


async def test_bridge_error_forbids_to_make_a_side_of_a_generator() -> None:
    """With `bridge="error"` the missing side raises, on a stream too."""

    @dual(bridge="error", name="sync_feed")
    def feed(count: int) -> Iterator[str]:
        yield from Feed().ticks(count)

    @dual(bridge="error", name="async_feed")
    async def afeed(count: int) -> AsyncIterator[str]:
        async for tick in Feed().aticks(count):
            yield tick

    for read in (feed.ainvoke(1), anext(feed.acall(1)), anext(feed.astream(1)), feed.abatch([1])):
        with pytest.raises(BridgeError, match=r"feed .* has no async side .* give it as async_="):
            await read
    for read_sync in (afeed.invoke, lambda count: list(afeed.call(count)), lambda count: list(afeed.stream(count))):
        with pytest.raises(BridgeError, match=r"feed .* has no sync side .* give it as sync="):
            read_sync(1)


@pytest.mark.parametrize("call", ["astream", "acall"])
def test_a_bridged_stream_that_is_left_open_is_closed_with_its_loop(call: str) -> None:
    """And without a complaint, though the loop closes all async generators at once."""
    feed = Feed()
    pair: Any = dual(feed.ticks, name=f"left open by {call}")
    complaints: list[Any] = []
    left: list[Any] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, complaint: complaints.append(complaint))
        left.append(getattr(pair, call)(5))
        assert await anext(left[0]) == "0 "

    asyncio.run(main())

    assert feed.closed.wait(SAFETY_NET)
    assert complaints == []


async def test_an_unobserved_stream_gives_a_run_manager_to_who_asks() -> None:
    """It is a run of LangChain's then, for either side in its colour, whether that yields or returns."""

    async def ayielding(query: str, run_manager: Any) -> AsyncIterator[str]:
        yield type(run_manager).__name__

    def yielding(query: str, run_manager: Any) -> Iterator[str]:
        yield type(run_manager).__name__

    async def areturning(query: str, run_manager: Any) -> str:
        return type(run_manager).__name__

    def returning(query: str, run_manager: Any) -> str:
        return type(run_manager).__name__

    pairs: list[Any] = [dual(sync=yielding, async_=ayielding), dual(sync=returning, async_=areturning)]
    for pair in pairs:
        assert list(pair.stream("EUR")) == ["CallbackManagerForChainRun"]
        assert [chunk async for chunk in pair.astream("EUR")] == ["AsyncCallbackManagerForChainRun"]
